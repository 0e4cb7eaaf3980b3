"""ssdops: state space duality as a compiler-style operator library. `ssd(q, k, v, mask)` is `Y = (L ∘ QKᵀ)V`.

What stands here is imported when it is first asked for, so that `import ssdops` costs next to nothing. A program that only
loads an exported graph, and asks for none of it, imports `ssdops.ops` to have the operators registered.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import VERSION as __version__

if TYPE_CHECKING:
    from . import masks
    from .api import Explanation, explain, ssd, ssd_step
    from .backends.registry import register_backend
    from .errors import SsdopsError
    from .ir.problem import Target
    from .masks import Mask
    from .register import operand, register_mask

__all__ = [
    "Explanation",
    "Mask",
    "SsdopsError",
    "Target",
    "__version__",
    "explain",
    "masks",
    "operand",
    "register_backend",
    "register_mask",
    "ssd",
    "ssd_step",
]

_HOMES = {
    "Mask": "masks", "SsdopsError": "errors", "Target": "ir.problem", "operand": "register", "register_mask": "register",
    "register_backend": "backends.registry",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "masks":
        return import_module(".masks", __name__)
    value = globals()[name] = getattr(import_module(f".{_HOMES.get(name, 'api')}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
