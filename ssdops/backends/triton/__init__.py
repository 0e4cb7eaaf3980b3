"""Triton kernels for NVIDIA GPUs (and, in Triton's interpreter, for tests on a CPU)."""
