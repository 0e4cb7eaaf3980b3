"""Triton kernels of what blocks have beside the scan."""
