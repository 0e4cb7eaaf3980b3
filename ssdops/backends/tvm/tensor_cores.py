"""What tensor cores do with tiles of 16 by 16, as intrinsics that schedules put in the place of blocks.

Each is a pair of programs: the block that it stands for, and the call that it becomes. Fragments are CUDA's `wmma`, which a
warp holds together; TVM has such pairs too, in a module that takes most of a minute to import, and none for sums that begin
with other sums.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

SIDE = 16
"""Rows and columns of a tile."""
A, B, SUM, SHARED = "wmma.matrix_a", "wmma.matrix_b", "wmma.accumulator", "shared.dyn"
"""Scopes: the left and the right side of a product, what it adds to, and what a block of threads shares."""

CARRIED = """
template <class Fragment>
__forceinline__ __device__ void ssdops_carried(
    Fragment* to, int at, const float* from, int stride, float factor, const Fragment* more, int more_at) {
  nvcuda::wmma::load_matrix_sync(to[at], from, stride, nvcuda::wmma::mem_row_major);
  for (int i = 0; i < to[at].num_elements; ++i) to[at].x[i] = to[at].x[i] * factor + more[more_at].x[i];
}
"""
JOINED = """
template <class Fragment>
__forceinline__ __device__ void ssdops_joined(
    float* to, int stride, const Fragment* one, int one_at, const Fragment* other, int other_at) {
  Fragment sum;
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] = one[one_at].x[i] + other[other_at].x[i];
  nvcuda::wmma::store_matrix_sync(to, sum, stride, nvcuda::wmma::mem_row_major);
}
"""


def load(side: str, dtype: str, turned: bool) -> str:
    """A tile of shared memory as a side of a product; turned, as its transpose."""
    layout = "col_major" if turned else "row_major"

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def block(source: T.handle, target: T.handle) -> None:
        X = T.match_buffer(source, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=SHARED)
        Y = T.match_buffer(target, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=side)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE])
            T.writes(Y[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("load"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = X[vi, vj]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(source: T.handle, target: T.handle) -> None:
        x1, x0, y1, y0 = T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(source, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=SHARED, strides=[x1, x0])
        Y = T.match_buffer(target, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=side, strides=[y1, y0])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE])
            T.writes(Y[0:SIDE, 0:SIDE])
            T.evaluate(
                T.tvm_load_matrix_sync(
                    Y.data, SIDE, SIDE, SIDE, number(Y, y1), X.access_ptr("r", ptr_type=dtype), x1, layout, dtype="void"
                )
            )

    return register(f"load {side} {dtype} {layout}", block, call)


def fill() -> str:
    """Sums begin with 0."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def block(target: T.handle) -> None:
        Y = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        with T.sblock("root"):
            T.reads()
            T.writes(Y[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("fill"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = T.float32(0)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(target: T.handle) -> None:
        y1, y0 = T.int32(), T.int32()
        Y = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[y1, y0])
        with T.sblock("root"):
            T.reads()
            T.writes(Y[0:SIDE, 0:SIDE])
            T.evaluate(T.tvm_fill_fragment(Y.data, SIDE, SIDE, SIDE, number(Y, y1), T.float32(0), dtype="void"))

    return register("fill", block, call)


def joined() -> str:
    """Two tiles of sums, added, to shared memory."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def block(one: T.handle, other: T.handle, target: T.handle) -> None:
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("joined"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Z[vi, vj] = X[vi, vj] + Y[vi, vj]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(one: T.handle, other: T.handle, target: T.handle) -> None:
        x1, x0, y1, y0, z1, z0 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[x1, x0])
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[y1, y0])
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED, strides=[z1, z0])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_joined", Z.access_ptr("w", ptr_type="float32"), z1, X.data, number(X, x1), Y.data, number(Y, y1),
                    source_code=JOINED,
                )  # fmt: skip
            )

    return register("joined", block, call)


def carried() -> str:
    """A tile of shared memory, times a factor, and a tile of sums added to it."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def block(source: T.handle, factor: T.handle, more: T.handle, target: T.handle) -> None:
        X = T.match_buffer(source, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED)
        F = T.match_buffer(factor, (1,), "float32", align=4, offset_factor=1, scope="local")
        Y = T.match_buffer(more, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], F[0], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("carried"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Z[vi, vj] = X[vi, vj] * F[0] + Y[vi, vj]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(source: T.handle, factor: T.handle, more: T.handle, target: T.handle) -> None:
        x1, x0, y1, y0, z1, z0 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(source, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED, strides=[x1, x0])
        F = T.match_buffer(factor, (1,), "float32", align=4, offset_factor=1, scope="local")
        Y = T.match_buffer(more, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[y1, y0])
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[z1, z0])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], F[0], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_carried", Z.data, number(Z, z1), X.access_ptr("r", ptr_type="float32"), x1, F[0], Y.data,
                    number(Y, y1), source_code=CARRIED,
                )  # fmt: skip
            )

    return register("carried", block, call)


def multiply(dtype: str, a_turned: bool, b_turned: bool) -> str:
    """A tile of sums, and the product of two others; turned ones are held as their transposes."""

    def a_at(i: Any, k: Any) -> Any:
        return (k, i) if a_turned else (i, k)

    def b_at(k: Any, j: Any) -> Any:
        return (j, k) if b_turned else (k, j)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def block(a: T.handle, b: T.handle, c: T.handle) -> None:
        X = T.match_buffer(a, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=A)
        Y = T.match_buffer(b, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=B)
        Z = T.match_buffer(c, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        with T.sblock("root"):
            T.reads(Z[0:SIDE, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j, k in T.grid(SIDE, SIDE, SIDE):
                with T.sblock(""):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    a0, a1 = T.meta_var(a_at(vi, vk))
                    b0, b1 = T.meta_var(b_at(vk, vj))
                    Z[vi, vj] = Z[vi, vj] + T.Cast("float32", X[a0, a1]) * T.Cast("float32", Y[b0, b1])

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(a: T.handle, b: T.handle, c: T.handle) -> None:
        a1, a0, b1, b0, c1, c0 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(a, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=A, strides=[a1, a0])
        Y = T.match_buffer(b, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=B, strides=[b1, b0])
        Z = T.match_buffer(c, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[c1, c0])
        with T.sblock("root"):
            T.reads(Z[0:SIDE, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.tvm_mma_sync(
                    Z.data, number(Z, c1), X.data, number(X, a1), Y.data, number(Y, b1), Z.data, number(Z, c1), dtype="void"
                )
            )

    return register(f"multiply {dtype} {a_turned} {b_turned}", block, call)


def store(scope: str) -> str:
    """A tile of sums to memory."""

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def block(source: T.handle, target: T.handle) -> None:
        X = T.match_buffer(source, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM)
        Y = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=scope)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE])
            T.writes(Y[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("store"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = X[vi, vj]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def call(source: T.handle, target: T.handle) -> None:
        x1, x0, y1, y0 = T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(source, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=SUM, strides=[x1, x0])
        Y = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=scope, strides=[y1, y0])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE])
            T.writes(Y[0:SIDE, 0:SIDE])
            T.evaluate(
                T.tvm_store_matrix_sync(
                    X.data, SIDE, SIDE, SIDE, number(X, x1), Y.access_ptr("w", ptr_type="float32"), y1, "row_major",
                    dtype="void",
                )  # fmt: skip
            )

    return register(f"store {scope}", block, call)


def number(buffer: Any, stride: Any) -> Any:
    """Which of a buffer's fragments a tile is."""
    return buffer.elem_offset // stride // SIDE * (stride // SIDE) + buffer.elem_offset % stride // SIDE


_registered: set[str] = set()


def register(name: str, block: Any, call: Any) -> str:
    """Make the pair known to TVM by name."""
    if name not in _registered:
        TensorIntrin.register(f"ssdops {name}", block, call)
        _registered.add(name)
    return f"ssdops {name}"


load, fill, joined, carried, multiply, store = map(cache, (load, fill, joined, carried, multiply, store))  # type: ignore[assignment]
