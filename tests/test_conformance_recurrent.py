"""The recurrent backend keeps every law, for every sum of scans."""

from ssdops.testing import Conformance


class TestRecurrent(Conformance):
    backend = "recurrent"
    kind = "linear"
