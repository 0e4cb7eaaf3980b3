"""ssdops: state space duality as a compiler-style operator library. `ssd(q, k, v, mask)` is `Y = (L ∘ QKᵀ)V`."""

from . import masks
from .api import Explanation, explain, ssd, ssd_step
from .errors import SsdopsError
from .masks import Mask

__version__ = "0.1.0"
__all__ = ["Explanation", "Mask", "SsdopsError", "explain", "masks", "ssd", "ssd_step"]
