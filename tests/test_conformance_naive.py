"""The quadratic backend keeps every law, for every mask."""

from ssdops.testing import Conformance


class TestNaive(Conformance):
    backend = "naive"
    kind = "any"
