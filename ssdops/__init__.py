"""ssdops: state space duality as a compiler-style operator library. `ssd(q, k, v, mask)` is `Y = (L ∘ QKᵀ)V`."""

from . import masks
from .api import Explanation, explain, ssd, ssd_step
from .config import VERSION as __version__
from .errors import SsdopsError
from .ir.problem import Target
from .masks import Mask

__all__ = ["Explanation", "Mask", "SsdopsError", "Target", "__version__", "explain", "masks", "ssd", "ssd_step"]
