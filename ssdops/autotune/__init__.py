"""Choosing among backends and configurations by measuring them: `with ssdops.autotune.mode("on"): …`."""

from .policy import MODES, mode

__all__ = ["MODES", "mode"]
