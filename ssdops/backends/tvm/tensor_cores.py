"""What tensor cores do with tiles of 16 by 16, as intrinsics that schedules put in the place of blocks.

Each is a pair of programs: the block that it stands for, and the call that it becomes. A tile in registers is a fragment, 8
numbers of each thread of a warp, as PTX lays operands and sums of `mma.m16n8k16` out; it is the first 8 elements of the tile's
256 in a thread's own array, and compilers drop the others. TVM has such pairs, too, in a module that takes most of a minute to
import; those of CUDA's `wmma` load what is shared number by number, and cannot say which rows a thread has.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from .parts import summed

SIDE = 16
"""Rows and columns of a tile."""
SHARED, OWN = "shared.dyn", "local"
"""Where tiles lie: in what a block of threads shares, or in registers, as fragments."""

SOURCE = """
#ifndef SSDOPS_TILES  // TVM puts this before each of the functions that are called
#define SSDOPS_TILES
template <bool turned, class T>
__forceinline__ __device__ void ssdops_load(T* to, const T* from, int stride, int down, int right) {
  unsigned* to32 = reinterpret_cast<unsigned*>(to);
  unsigned at = __cvta_generic_to_shared(from + (down * 8 + threadIdx.x % 8) * stride + right * 8);
  if (turned)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to32[0]), "=r"(to32[1]), "=r"(to32[2]), "=r"(to32[3]) : "r"(at));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to32[0]), "=r"(to32[1]), "=r"(to32[2]), "=r"(to32[3]) : "r"(at));
}
template <class T> __forceinline__ __device__ void ssdops_left(T* to, int, const T* from, int stride) {
  ssdops_load<false>(to, from, stride, threadIdx.x / 8 % 2, threadIdx.x / 16);
}
template <class T> __forceinline__ __device__ void ssdops_left_turned(T* to, int, const T* from, int stride) {
  ssdops_load<true>(to, from, stride, threadIdx.x / 16, threadIdx.x / 8 % 2);
}
template <class T> __forceinline__ __device__ void ssdops_right(T* to, int, const T* from, int stride) {
  ssdops_load<true>(to, from, stride, threadIdx.x / 8 % 2, threadIdx.x / 16);
}
template <class T> __forceinline__ __device__ void ssdops_right_turned(T* to, int, const T* from, int stride) {
  ssdops_load<false>(to, from, stride, threadIdx.x / 16, threadIdx.x / 8 % 2);
}
#define SSDOPS_MULTIPLY(T, NAME)                                                                                       \\
  __forceinline__ __device__ void ssdops_multiply(float* c, const T* a16, const T* b16) {                              \\
    const unsigned *a = reinterpret_cast<const unsigned*>(a16), *b = reinterpret_cast<const unsigned*>(b16);           \\
    for (int n = 0; n < 2; ++n)                                                                                        \\
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "                    \\
                   "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                                     \\
                   : "+f"(c[4 * n]), "+f"(c[4 * n + 1]), "+f"(c[4 * n + 2]), "+f"(c[4 * n + 3])                        \\
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * n]), "r"(b[2 * n + 1]));                    \\
  }
SSDOPS_MULTIPLY(KIND, "NAME")
__forceinline__ __device__ int ssdops_row(int i) { return threadIdx.x / 4 + i / 2 % 2 * 8; }
__forceinline__ __device__ int ssdops_column(int i) { return threadIdx.x % 4 * 2 + i / 4 * 8; }
__forceinline__ __device__ void ssdops_fill(float* to) {
  for (int i = 0; i < 8; ++i) to[i] = 0;
}
__forceinline__ __device__ void ssdops_copy(float* to, int, const float* from, int) {
  for (int i = 0; i < 8; ++i) to[i] = from[i];
}
__forceinline__ __device__ void ssdops_take(float* to, int, const float* from, int stride) {
  for (int i = 0; i < 8; i += 2)
    *reinterpret_cast<float2*>(to + i) =
        *reinterpret_cast<const float2*>(from + ssdops_row(i) * stride + ssdops_column(i));
}
__forceinline__ __device__ void ssdops_store(float* to, int stride, const float* from, int) {
  for (int i = 0; i < 8; i += 2)
    *reinterpret_cast<float2*>(to + ssdops_row(i) * stride + ssdops_column(i)) = make_float2(from[i], from[i + 1]);
}
template <class T> __forceinline__ __device__ void ssdops_round(T* to, int stride, const float* from, int) {
  for (int i = 0; i < 8; i += 2) {
    T two[2] = {T(from[i]), T(from[i + 1])};
    *reinterpret_cast<unsigned*>(to + ssdops_row(i) * stride + ssdops_column(i)) = *reinterpret_cast<unsigned*>(two);
  }
}
__forceinline__ __device__ void ssdops_carry(float* to, const float* from, float factor, const float* more) {
  for (int i = 0; i < 8; ++i) to[i] = from[i] * factor + more[i];
}
template <class T> __forceinline__ __device__ void ssdops_join(
    T* to, int stride, const float* factors, int next, const float* one, const float* other) {
  for (int i = 0; i < 8; i += 2) {
    float first = factors[ssdops_row(i)], both = factors[next + ssdops_row(i)];
    T two[2] = {T(both * (first * one[i] + other[i])), T(both * (first * one[i + 1] + other[i + 1]))};
    *reinterpret_cast<unsigned*>(to + ssdops_row(i) * stride + ssdops_column(i)) = *reinterpret_cast<unsigned*>(two);
  }
}
__forceinline__ __device__ void ssdops_gather(float* to, const float* factors, int next, const float* sums,
                                              const float* one, const float* other) {
  for (int i = 0; i < 8; ++i)
    to[i] = sums[i] + (factors[ssdops_row(i)] * factors[next + ssdops_row(i)] * one[i] + other[i]);
}
template <class T> __forceinline__ __device__ void ssdops_dots(float* to, const float* one, const T* other, int stride) {
  float rows[2] = {0, 0};
  for (int i = 0; i < 8; ++i) rows[i / 2 % 2] += one[i] * float(other[ssdops_row(i) * stride + ssdops_column(i) + i % 2]);
  for (int i = 0; i < 2; ++i) {
    rows[i] += __shfl_xor_sync(0xffffffffu, rows[i], 1);
    rows[i] += __shfl_xor_sync(0xffffffffu, rows[i], 2);
    if (threadIdx.x % 4 == 0) to[threadIdx.x / 4 + 8 * i] = rows[i];
  }
}
#endif
"""
KINDS = {"bfloat16": ("nv_bfloat16", "bf16"), "float16": ("half", "f16")}
"""CUDA's and PTX's names of dtypes."""


def source(dtype: str) -> str:
    """The functions that calls become, for products of a dtype."""
    kind, name = KINDS[dtype]
    return SOURCE.replace("KIND", kind).replace('"NAME"', f'"{name}"')


@cache
def moved(name: str, origin: str, source_dtype: str, to: str, dtype: str, products: str) -> str:
    """A tile from one place to another, and perhaps to another dtype."""
    text = source(products)

    @T.prim_func(s_tir=True)
    def block(source: T.handle, target: T.handle) -> None:
        X = T.match_buffer(source, (SIDE, SIDE), source_dtype, align=64, offset_factor=SIDE, scope=origin)
        Y = T.match_buffer(target, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=to)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE])
            T.writes(Y[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("moved"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = X[vi, vj] if source_dtype == dtype else T.Cast(dtype, X[vi, vj])

    @T.prim_func(s_tir=True)
    def call(source: T.handle, target: T.handle) -> None:
        x1, x0, y1, y0 = T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(source, (SIDE, SIDE), source_dtype, align=64, offset_factor=SIDE, scope=origin, strides=[x1, x0])
        Y = T.match_buffer(target, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=to, strides=[y1, y0])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE])
            T.writes(Y[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    f"ssdops_{name}",
                    Y.access_ptr("w", ptr_type=dtype),
                    y1,
                    X.access_ptr("r", ptr_type=source_dtype),
                    x1,
                    source_code=text,
                )
            )

    return register(f"{name} {origin} {source_dtype} {to} {dtype} {products}", block, call)


def load(side: str, turned: bool, dtype: str) -> str:
    """A shared tile as the left or the right side of a product; turned, as its transpose."""
    return moved(f"{side}_turned" if turned else side, SHARED, dtype, OWN, dtype, dtype)


def store(dtype: str, to: str = SHARED) -> str:
    """A tile of sums to memory."""
    return moved("store", OWN, "float32", to, "float32", dtype)


def take(dtype: str, origin: str = SHARED) -> str:
    """A tile of sums from memory."""
    return moved("take", origin, "float32", OWN, "float32", dtype)


def turn(dtype: str) -> str:
    """A tile of sums as another."""
    return moved("copy", OWN, "float32", OWN, "float32", dtype)


def rounded(dtype: str, to: str = SHARED) -> str:
    """A tile of sums to memory, as what products multiply."""
    return moved("round", OWN, "float32", to, dtype, dtype)


@cache
def fill(dtype: str) -> str:
    """Sums begin with 0."""
    text = source(dtype)

    @T.prim_func(s_tir=True)
    def block(target: T.handle) -> None:
        Y = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        with T.sblock("root"):
            T.reads()
            T.writes(Y[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("fill"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = T.float32(0)

    @T.prim_func(s_tir=True)
    def call(target: T.handle) -> None:
        Y = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        with T.sblock("root"):
            T.reads()
            T.writes(Y[0:SIDE, 0:SIDE])
            T.evaluate(T.cuda.func_call("ssdops_fill", Y.access_ptr("w", ptr_type="float32"), source_code=text))

    return register(f"fill {dtype}", block, call)


@cache
def join(dtype: str) -> str:
    """Two tiles of sums, the rows of one times factors, added, and rows of that times others, to shared memory, rounded."""
    text = source(dtype)

    @T.prim_func(s_tir=True)
    def block(factors: T.handle, one: T.handle, other: T.handle, target: T.handle) -> None:
        F = T.match_buffer(factors, (2, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED)
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        Z = T.match_buffer(target, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=SHARED)
        with T.sblock("root"):
            T.reads(F[0:2, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("join"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Z[vi, vj] = T.Cast(dtype, F[1, vi] * (F[0, vi] * X[vi, vj] + Y[vi, vj]))

    @T.prim_func(s_tir=True)
    def call(factors: T.handle, one: T.handle, other: T.handle, target: T.handle) -> None:
        z1, z0, f1, f0 = T.int32(), T.int32(), T.int32(), T.int32()
        F = T.match_buffer(factors, (2, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED, strides=[f1, f0])
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Z = T.match_buffer(target, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=SHARED, strides=[z1, z0])
        with T.sblock("root"):
            T.reads(F[0:2, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_join",
                    Z.access_ptr("w", ptr_type=dtype),
                    z1,
                    F.access_ptr("r", ptr_type="float32"),
                    f1,
                    X.access_ptr("r", ptr_type="float32"),
                    Y.access_ptr("r", ptr_type="float32"),
                    source_code=text,
                )
            )

    return register(f"join {dtype}", block, call)


@cache
def gather(dtype: str) -> str:
    """Sums, a tile whose rows are multiplied by both of two factors, and another, added up."""
    text = source(dtype)

    @T.prim_func(s_tir=True)
    def block(factors: T.handle, sums: T.handle, one: T.handle, other: T.handle, target: T.handle) -> None:
        F = T.match_buffer(factors, (2, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED)
        S = T.match_buffer(sums, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        with T.sblock("root"):
            T.reads(S[0:SIDE, 0:SIDE], F[0:2, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("gather"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Z[vi, vj] = S[vi, vj] + (F[0, vi] * F[1, vi] * X[vi, vj] + Y[vi, vj])

    @T.prim_func(s_tir=True)
    def call(factors: T.handle, sums: T.handle, one: T.handle, other: T.handle, target: T.handle) -> None:
        f1, f0 = T.int32(), T.int32()
        F = T.match_buffer(factors, (2, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED, strides=[f1, f0])
        S = T.match_buffer(sums, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        with T.sblock("root"):
            T.reads(S[0:SIDE, 0:SIDE], F[0:2, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_gather",
                    Z.access_ptr("w", ptr_type="float32"),
                    F.access_ptr("r", ptr_type="float32"),
                    f1,
                    S.access_ptr("r", ptr_type="float32"),
                    X.access_ptr("r", ptr_type="float32"),
                    Y.access_ptr("r", ptr_type="float32"),
                    source_code=text,
                )
            )

    return register(f"gather {dtype}", block, call)


@cache
def dots(dtype: str) -> str:
    """Dot products of the rows of a tile of sums and of a shared tile."""
    text = source(dtype)

    @T.prim_func(s_tir=True)
    def block(one: T.handle, other: T.handle, target: T.handle) -> None:
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        Y = T.match_buffer(other, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=SHARED)
        Z = T.match_buffer(target, (1, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:1, 0:SIDE])
            for i in range(SIDE):
                with T.sblock("dots"):
                    vi = T.axis.spatial(SIDE, i)
                    Z[0, vi] = summed(SIDE, lambda j: X[vi, j] * T.Cast("float32", Y[vi, j]))

    @T.prim_func(s_tir=True)
    def call(one: T.handle, other: T.handle, target: T.handle) -> None:
        y1, y0, z1, z0 = T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Y = T.match_buffer(other, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=SHARED, strides=[y1, y0])
        Z = T.match_buffer(target, (1, SIDE), "float32", align=64, offset_factor=SIDE, scope=SHARED, strides=[z1, z0])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:1, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_dots",
                    Z.access_ptr("w", ptr_type="float32"),
                    X.access_ptr("r", ptr_type="float32"),
                    Y.access_ptr("r", ptr_type=dtype),
                    y1,
                    source_code=text,
                )
            )

    return register(f"dots {dtype}", block, call)


@cache
def carry(dtype: str) -> str:
    """A tile of sums, times a factor, and another added to it."""
    text = source(dtype)

    @T.prim_func(s_tir=True)
    def block(one: T.handle, factor: T.handle, other: T.handle, target: T.handle) -> None:
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        F = T.match_buffer(factor, (1,), "float32", align=4, offset_factor=1, scope=OWN)
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], F[0], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j in T.grid(SIDE, SIDE):
                with T.sblock("carry"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Z[vi, vj] = X[vi, vj] * F[0] + Y[vi, vj]

    @T.prim_func(s_tir=True)
    def call(one: T.handle, factor: T.handle, other: T.handle, target: T.handle) -> None:
        X = T.match_buffer(one, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        F = T.match_buffer(factor, (1,), "float32", align=4, offset_factor=1, scope=OWN)
        Y = T.match_buffer(other, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Z = T.match_buffer(target, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        with T.sblock("root"):
            T.reads(X[0:SIDE, 0:SIDE], F[0], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_carry",
                    Z.access_ptr("w", ptr_type="float32"),
                    X.access_ptr("r", ptr_type="float32"),
                    F[0],
                    Y.access_ptr("r", ptr_type="float32"),
                    source_code=text,
                )
            )

    return register(f"carry {dtype}", block, call)


@cache
def multiply(dtype: str, a_turned: bool, b_turned: bool) -> str:
    """A tile of sums, and the product of two others; turned ones were shared as their transposes."""
    text = source(dtype)

    def a_at(i: Any, k: Any) -> Any:
        return (k, i) if a_turned else (i, k)

    def b_at(k: Any, j: Any) -> Any:
        return (j, k) if b_turned else (k, j)

    @T.prim_func(s_tir=True)
    def block(a: T.handle, b: T.handle, c: T.handle) -> None:
        X = T.match_buffer(a, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=OWN)
        Y = T.match_buffer(b, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=OWN)
        Z = T.match_buffer(c, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN)
        with T.sblock("root"):
            T.reads(Z[0:SIDE, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            for i, j, k in T.grid(SIDE, SIDE, SIDE):
                with T.sblock(""):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    a0, a1 = T.meta_var(a_at(vi, vk))
                    b0, b1 = T.meta_var(b_at(vk, vj))
                    Z[vi, vj] = Z[vi, vj] + T.Cast("float32", X[a0, a1]) * T.Cast("float32", Y[b0, b1])

    @T.prim_func(s_tir=True)
    def call(a: T.handle, b: T.handle, c: T.handle) -> None:
        X = T.match_buffer(a, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Y = T.match_buffer(b, (SIDE, SIDE), dtype, align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        Z = T.match_buffer(c, (SIDE, SIDE), "float32", align=64, offset_factor=SIDE, scope=OWN, strides=[T.int32(), 1])
        with T.sblock("root"):
            T.reads(Z[0:SIDE, 0:SIDE], X[0:SIDE, 0:SIDE], Y[0:SIDE, 0:SIDE])
            T.writes(Z[0:SIDE, 0:SIDE])
            T.evaluate(
                T.cuda.func_call(
                    "ssdops_multiply",
                    Z.access_ptr("rw", ptr_type="float32"),
                    X.access_ptr("r", ptr_type=dtype),
                    Y.access_ptr("r", ptr_type=dtype),
                    source_code=text,
                )
            )

    return register(f"multiply {dtype} {a_turned} {b_turned}", block, call)


def register(name: str, block: Any, call: Any) -> str:
    """Make the pair known to TVM by name."""
    TensorIntrin.register(f"ssdops {name}", block, call)
    return f"ssdops {name}"
