"""Keeps pytest away from the backends whose compiler is not installed, so that doctests are collected everywhere."""

from importlib.util import find_spec

collect_ignore = [f"ssdops/backends/{name}" for name in ("triton", "tvm") if find_spec(name) is None]
if find_spec("triton") is None:
    collect_ignore += ["ssdops/nn/conv_triton.py", "ssdops/nn/kernels"]
