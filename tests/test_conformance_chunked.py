"""The chunked backend keeps every law at every chunk size: for sums of scans, and for scans with decay per channel alone."""

from ssdops import masks
from ssdops.masks import Mask
from ssdops.testing import Conformance
from ssdops.testing.source import Source
from ssdops.testing.strategies import CHANNEL_SCANS, scaled

SIZES = (4, 1, 3, 16, 64)


class TestChunked(Conformance):
    backend = "chunked"
    kind = "linear"
    chunk_sizes = SIZES


def channel_scan(s: Source) -> Mask:
    """A scan with decay per channel, shifted, strict, turned, scaled or not."""
    mask = CHANNEL_SCANS[s.pick(list(CHANNEL_SCANS))](s)
    mask = mask * masks.channel_decay(s.channel_log()) if s.chance(5) else mask
    mask = mask.shift(1) if s.chance(4) else mask
    mask = mask.strict() if s.chance(4) else mask
    turned = s.pick(["", "", "T", "reverse"])  # not both: a causal scan over flipped operands has no steps
    mask = getattr(mask, turned) if turned == "T" else mask.reverse() if turned else mask
    return scaled(s, mask) if s.chance(3) else mask


class TestChannels(Conformance):
    backend = "chunked"
    kind = "linear"
    make_mask = channel_scan
    chunk_sizes = SIZES
