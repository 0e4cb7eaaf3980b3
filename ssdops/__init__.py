"""ssdops: state space duality as a compiler-style operator library. `ssd(q, k, v, mask)` is `Y = (L ∘ QKᵀ)V`."""

from . import masks
from .api import ssd
from .errors import SsdopsError

__version__ = "0.1.0"
__all__ = ["SsdopsError", "masks", "ssd"]
