"""Where the documents of a packed batch lie, for what reads a token's neighbours without a scan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import config
from ..errors import DeviceError, DtypeError, MaskError, ShapeError
from ..ir import nodes as n
from ..ir.problem import check_values, count_states
from ..ir.resolve import resolve, segment_ids
from ..masks import Mask
from . import packing_ops


@dataclass(frozen=True)
class Packing:
    """The documents of `(batch, seqlen)` tokens; a document's row is where its state and its window stand.

    Attributes:
        position: of each token in its document, `(batch, seqlen)`.
        row: the row of each token's document, `(batch, seqlen)`; meaningless where n_rows is None.
        starts, stops: the tokens `[start, stop)` of each document in its batch row, `(n_rows,)`, or empty.
        n_rows: how many documents there may be in all; None if their mask does not say.
    """

    position: Tensor
    row: Tensor
    starts: Tensor
    stops: Tensor
    n_rows: int | None

    @property
    def tensors(self) -> list[Tensor]:
        """All that it is made of, for an operator; `of` is the way back."""
        return [self.position, self.row, self.starts, self.stops]

    @staticmethod
    def of(tensors: list[Tensor]) -> Packing | None:
        """The packing of these tensors, whose documents have rows if they have any; None of none."""
        if not tensors:
            return None
        position, row, starts, stops = tensors
        return Packing(position, row, starts, stops, len(starts))


def packing(documents: Mask, x: Tensor, by_kernel: bool = False) -> Packing:
    """The documents of x `(batch, seqlen, …)`, worked out by torch or by one kernel. On a GPU nothing is read on the host.

    Raises:
        MaskError, DtypeError, ShapeError, DeviceError, ValueRangeError: what documents() or its operands should be.
    """
    batch, seqlen = x.shape[:2]
    node = documents_node(documents, x)
    if not torch.compiler.is_compiling() and (x.device.type == "cpu" or config.check_values()):
        check_values(node, documents.operands, seqlen)
    n_rows = count_states(node, documents.operands, batch)
    per_row = 0 if n_rows is None else n_rows // max(batch, 1)
    if by_kernel:
        return Packing(*_by_kernel(node, documents, batch, seqlen, per_row), n_rows)
    ids = segment_ids(node, documents.operands, seqlen).expand(batch, -1).contiguous()
    tokens = torch.arange(seqlen, device=x.device).expand(batch, -1)
    same = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0), value=False)[:, :seqlen]
    first = torch.where(same, 0, tokens).cummax(1).values if seqlen else tokens
    numbers = torch.arange(per_row, device=x.device, dtype=ids.dtype).expand(batch, -1).contiguous()
    starts, stops = (torch.searchsorted(ids, numbers, right=right).flatten() for right in (False, True))
    rows = ids + torch.arange(batch, device=x.device)[:, None] * per_row
    rows = rows.clamp(0, max((n_rows or 0) - 1, 0))  # nothing has looked at values on a GPU, and rows are an index
    return Packing(tokens - first, rows, starts, stops, n_rows)


def _by_kernel(node: n.Documents, documents: Mask, batch: int, seqlen: int, per_row: int) -> packing_ops.Places:
    if node.cu_seqlens is not None:
        boundaries = resolve(node.cu_seqlens, documents.operands, n.BOUNDARIES, seqlen)
        return packing_ops.places(boundaries, batch, seqlen, per_row)
    assert node.segment_ids is not None  # verify() promises one of the two
    return packing_ops.places(resolve(node.segment_ids, documents.operands, n.IDS, seqlen), batch, seqlen, per_row)


def documents_node(documents: Mask, x: Tensor) -> n.Documents:
    """The node of documents(), whose operands fit x in all but their values.

    Raises:
        MaskError, DtypeError, ShapeError, DeviceError: what documents() or its operands should be.
    """
    node = documents.tree if isinstance(documents, Mask) else None
    if not isinstance(node, n.Documents):
        got = type(documents).__name__ if node is None else node
        raise MaskError(f"documents must be made by masks.documents(cu_seqlens) or masks.documents(segment_ids=…), got {got}")
    batch, seqlen = x.shape[:2]
    for name, ids in documents.operands.items():
        if ids.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name} must be int32 or int64, got {ids.dtype}; convert it")
        if ids.device != x.device:
            raise DeviceError(f"{name} is on {ids.device}, but x is on {x.device}; move it to x's device")
        if node.cu_seqlens is not None:
            if ids.ndim != 1 or ids.shape[0] < 1:
                raise ShapeError(f"{name} must be (n_segments + 1,), got {tuple(ids.shape)}")
            if batch != 1:
                raise ShapeError(
                    f"documents(cu_seqlens) packs documents into one row, so batch must be 1, got {batch}; "
                    "use segment_ids for a batch of packed rows"
                )
        elif tuple(ids.shape) not in ((batch, seqlen), (1, seqlen)):
            raise ShapeError(f"{name} must be (batch, seqlen) = ({batch}, {seqlen}) or (1, {seqlen}), got {tuple(ids.shape)}")
    return node
