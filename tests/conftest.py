"""Hypothesis profiles: `default` is fast and always the same; `pytest --hypothesis-profile=thorough` goes deeper.

Without a GPU Triton's kernels run in its interpreter, which must be said before they are imported.
"""

import os

import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile(
    "default",
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
settings.register_profile("thorough", max_examples=600, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("default")
