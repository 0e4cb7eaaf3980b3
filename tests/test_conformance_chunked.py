"""The chunked backend keeps every law at every chunk size, for every sum of scans with scalar decay."""

from ssdops.testing import Conformance


class TestChunked(Conformance):
    backend = "chunked"
    kind = "scalar"
    chunk_sizes = (4, 1, 3, 16, 64)
