"""Hypothesis profiles: `default` is fast and always the same; `pytest --hypothesis-profile=thorough` goes deeper."""

from hypothesis import Phase, settings

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
