"""What a reader of an example's figures needs to know of the run that gave them."""

import platform
from datetime import datetime, timezone

import torch


def environment(device: str, commit: str | None = None) -> dict[str, str | int]:
    """The machine and the releases, in fields named as in benchmarks/results; the commit, if it is given."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return facts if commit is None else facts | {"commit": commit}
