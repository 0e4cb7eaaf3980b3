"""Kernels: `@triton.jit` functions alone. Grids, strides and allocation are their launchers' business."""
