"""What the commands share: names from the command line made into torch's objects, with errors of one line."""

from __future__ import annotations

import torch

from .errors import DeviceError, DtypeError
from .ir.problem import FLOATS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def dtype_of(name: str) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        DtypeError: there is none; the message lists those there are.

    >>> dtype_of("bfloat16")
    torch.bfloat16
    """
    if name not in DTYPES:
        raise DtypeError(f"--dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """The device of that name, which may be absent.

    Raises:
        DeviceError: torch knows no such device.
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"--device {name!r} is not a device: {str(error).splitlines()[0]}") from None


def present_device(name: str) -> torch.device:
    """The device of that name, tried out with one allocation.

    Raises:
        DeviceError: it is not a device, or not here.
    """
    device = device_of(name)
    try:
        torch.empty(1, device=device).item()  # meta has no values, and fails here as it should
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
