"""Blocks of tensor programs by name, for programs of many: what a block reads is given as functions of its indices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from tvm.script import tirx as T

from .parts import behind, beside, bound, first_segment, first_slot, fits, number, one_if, put, under
from .tile import Tile

At = Callable[..., Any]
"""What is at an index."""


def fill(name: str, *shape: int) -> Callable[[Any, At], None]:
    """`fill(name, I, J)(tile, value)`: tile[i, j] = value(i, j). Of any number of axes.

    No macro, like `store` and `locate`: for each call of one TVM looks for the text of all functions that are being called.
    """

    def block(tile: Any, value: At) -> None:
        with T.grid(*shape) as loops, T.sblock(name):
            at = [T.axis.spatial(*of) for of in zip(shape, loops if len(shape) > 1 else (loops,), strict=True)]
            put(tile, value(*at), *at)

    return block


class Rows:
    """The rows of a tile from one on, as a tile of their own."""

    def __init__(self, tile: Any, first: Any) -> None:
        self.tile, self.first = tile, first

    def __getitem__(self, index: tuple[Any, Any]) -> Any:
        return self.tile[self.first + index[0], index[1]]


FETCH = """
#ifndef SSDOPS_FETCH
#define SSDOPS_FETCH
template <class T> __forceinline__ __device__ void ssdops_fetch(T* to, const T* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__forceinline__ __device__ void ssdops_arrive() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__forceinline__ __device__ void ssdops_depart() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__forceinline__ __device__ void ssdops_arrive_but_last() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }
#endif
"""
"""Copies to shared memory that are under way while a program goes on, 16 bytes each; those that depart together arrive so."""


def fetch(
    name: str, machine: Tile, rows: int, cols: int, dtype: str, whole: bool, again: bool = False
) -> Callable[[Any, Any, At], None]:
    """`fetch(name, machine, I, J, dtype, whole)(tile, first, value)`: tile[first + i, j] = value(i, j), as of `arrive`.

    What is not loaded ahead, or may have to be filled up, is there at once. TVM does not see that a copy writes to its tile:
    only one that has a place for as long as the whole walk can be written so, which tiles have that are loaded ahead.

    Args:
        again: where a tile was read before, which rules do not want to be told of.
    """
    vector = 16 // getattr(torch, dtype).itemsize
    names = (f"{name}_{call}" if call else name for call in count())  # no two blocks have one

    def at_once(tile: Any, first: Any, value: At) -> None:
        with T.grid(rows, cols) as (i, j), T.sblock(next(names)):
            vi, vj = T.axis.remap("SS", [i, j])
            put(tile, value(vi, vj), first + vi, vj)

    def later(tile: Any, first: Any, value: At) -> None:
        with T.grid(rows, cols // vector) as (i, j), T.sblock(next(names)):
            vi, vj = T.axis.remap("SS", [i, j])
            T.reads()
            T.writes(*([] if again else [tile[first + vi, vj * vector : vj * vector + vector]]))
            to, origin = T.address_of(tile[first + vi, vj * vector]), T.address_of(value(vi, vj * vector))
            T.evaluate(T.cuda.func_call("ssdops_fetch", to, origin, source_code=FETCH))

    return later if whole and machine.ahead and machine.target != "cpu" else at_once


def arrive(tile: Tile) -> None:
    """What was fetched is there, for the thread that fetched it; for others behind a barrier."""
    if tile.ahead and tile.target != "cpu":
        with T.sblock("barrier_arrive"):
            T.evaluate(T.cuda.func_call("ssdops_arrive", source_code=FETCH))


def arrive_but_last(tile: Tile) -> None:
    """As `arrive`, but for what departed last, where not all arrives at once."""
    if tile.late and tile.target != "cpu":
        with T.sblock("barrier_arrive_but_last"):
            T.evaluate(T.cuda.func_call("ssdops_arrive_but_last", source_code=FETCH))


def depart(tile: Tile) -> None:
    """What has been fetched since the last one that departed goes together, where not all arrives at once."""
    if tile.late and tile.target != "cpu":
        with T.sblock("barrier_depart"):
            T.evaluate(T.cuda.func_call("ssdops_depart", source_code=FETCH))


def update(name: str, heads: int, rows: int, cols: int) -> Callable[[Any, Any, At], None]:
    """`update(name, H, I, J)(stack, h, value)`: stack[h, i, j] = value(h, i, j) of one h, which may be of what is there.

    No rule has it: a block that reads what it writes is none that TVM would move, and LLVM makes vectors of it by itself.
    """

    def block(stack: Any, h: Any, value: At) -> None:
        with T.grid(rows, cols) as (i, j), T.sblock(name):
            vh = T.axis.spatial(heads, h)
            vi, vj = T.axis.remap("SS", [i, j])
            put(stack, value(vh, vi, vj), vh, vi, vj)

    return block


def product(name: str, rows: int, cols: int, depth: int, dtype: str) -> Callable[[Any, At, At], None]:
    """`product(name, I, J, M, dtype)(tile, a, b)`: tile[i, j] = Σ_m a(i, m) b(m, j)."""

    def block(tile: Any, a: At, b: At) -> None:
        with T.grid(rows, cols, depth) as (i, j, m), T.sblock(name):
            vi, vj, vm = T.axis.remap("SSR", [i, j, m])
            with T.init():
                put(tile, number(0, dtype), vi, vj)
            put(tile, tile[vi, vj] + a(vi, vm) * b(vm, vj), vi, vj)

    return block


def sums(name: str, rows: int, lanes: int, steps: int, dtype: str) -> Callable[[Any, At], None]:
    """`sums(name, I, L, S, dtype)(tile, value)`: tile[i, l] = Σ_s value(i, s · L + l)."""

    def block(tile: Any, value: At) -> None:
        with T.grid(rows, lanes, steps) as (i, lane, step), T.sblock(name):
            vi, vl, vs = T.axis.remap("SSR", [i, lane, step])
            with T.init():
                put(tile, number(0, dtype), vi, vl)
            put(tile, tile[vi, vl] + value(vi, vs * lanes + vl), vi, vl)

    return block


def near_sums(size: int, dtype: str) -> Callable[..., None]:
    """`near_sums(C, dtype)(pairs, rows, cols, u, w, causal, distance)`: sums of pairs closer than `distance`, which is 1 or 2.

    rows[i] = Σ_j pairs[i, j] w(j) and cols[j] = Σ_i pairs[i, j] u(i), over the token itself and the one beside it.
    """

    def along(name: str, out: Any, pair: At, weight: At, forwards: Any, distance: Any) -> None:
        with T.grid(size, 2) as (i, back), T.sblock(name):
            vi, vb = T.axis.remap("SR", [i, back])
            with T.init():
                put(out, number(0, dtype), vi)
            there = behind(vi, vb, forwards, size)
            counts = one_if(under(vb, distance), dtype) * one_if(beside(vi, vb, forwards, size), dtype)
            put(out, out[vi] + pair(vi, there) * weight(there) * counts, vi)

    def block(pairs: Any, rows: Any, cols: Any, u: At, w: At, causal: Any, distance: Any) -> None:
        along("near_rows", rows, lambda i, j: pairs[i, j], w, causal, distance)
        along("near_cols", cols, lambda j, i: pairs[i, j], u, 1 - causal, distance)

    return block


def store(name: str, rows: int, cols: int, whole: bool) -> Callable[[Any, Any, Any, Any, Any, At], None]:
    """`store(name, I, J, whole)(out, head, first, end, size, value)`: tokens before the end of a row, and what sizes have."""

    def block(out: Any, head: Any, first: Any, end: Any, size: Any, value: At) -> None:
        with T.grid(rows, cols) as (i, j), T.sblock(name):
            vi, vj = T.axis.remap("SS", [i, j])
            T.where(T.And(first + i < end, fits(whole, j, size)))
            put(out, value(vi, vj), first + vi, head, vj)

    return block


def locate(place: Any, begin: Any, row: Any, seqlen: Any, chunk: int) -> None:
    """place = the first token of a row, its end, its first slot, and its first segment."""
    with T.serial(0, 1) as i, T.sblock("place"):
        vi = T.axis.spatial(1, i)
        put(place, bound(begin, row, seqlen), vi)
        put(place, bound(begin, row + 1, seqlen), vi + 1)
        put(place, first_slot(begin, row, seqlen, chunk), vi + 2)
        put(place, first_segment(begin, row, seqlen, chunk), vi + 3)
