"""The Mamba-2 block: one projection in, a convolution, the scan, a gated norm, one projection out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import masks
from ..api import ssd, ssd_step
from ..distributed import ssd as distributed_ssd
from ..distributed.agree import Team, team_of
from ..errors import UnsupportedError
from ..masks import Mask
from .cache import Mamba2Cache, cache_rows, check_cache
from .checks import check_input, check_ranges, check_sizes
from .conv import causal_conv1d
from .norm import GatedRMSNorm
from .projections import Projections
from .skip import gated_skip
from .slices import agree_on_input, conv_on_slice


class Mamba2(Projections):
    """The Mamba-2 block, `(batch, seqlen, d_model)` → the same shape.

        z, xBC, dt = split(W_in u)                  x, B, C = split(silu(conv(xBC)))
        dt = clamp(softplus(dt + dt_bias))          S_t = exp(dt_t · A) S_{t−1} + dt_t · x_t B_tᵀ,   A = −exp(A_log)
        y_t = S_t C_t + D · x_t                     out = W_out norm(y · silu(z))

    Parameters are named and shaped as those of mamba_ssm's `Mamba2` and transformers' `Mamba2Mixer`, so that their
    checkpoints load with `load_state_dict`: `in_proj.weight`, `conv1d.weight` (channels, 1, d_conv), `conv1d.bias`, `dt_bias`,
    `A_log`, `D`, `norm.weight`, `out_proj.weight`; channels = d_inner + 2 · ngroups · d_state, in the order x, B, C.

    Built on the meta device it holds no memory: `to_empty(device=…)`, then load a checkpoint, or call `reset_parameters` of
    every module of `modules()` that has it.

    Args:
        d_model: the size of a token.
        d_state: the state's size per channel of x.
        d_conv: the width of the convolution.
        expand: d_inner = expand · d_model channels in x and z.
        headdim: channels per head; nheads = d_inner / headdim.
        ngroups: groups of heads that share B and C.
        A_init_range: −A is drawn uniformly from it.
        D_has_hdim: D is one number per channel `(d_inner,)`, not per head `(nheads,)`.
        rmsnorm: have the norm; without it y is only gated.
        norm_before_gate: gate what is normalised, rather than normalise what is gated.
        norm_groups: groups of channels normalised apart; None is ngroups, as in mamba_ssm and in transformers' `Mamba2Mixer`
            from release 5.23 on. Mixers of earlier releases have 1.
        norm_eps: the norm's epsilon.
        dt_min, dt_max, dt_init_floor: softplus(dt_bias) is log-uniform in [dt_min, dt_max], and at least the floor.
        dt_limit: dt is clamped to it.
        bias: have biases in the projections.
        conv_bias: have one in the convolution.
        backend: of `ssdops.ssd`.
        device, dtype: of the parameters.

    Raises:
        ShapeError: sizes that do not divide.
        ValueRangeError: ranges that are none.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 7.1 and figure 6 (the parallel block).

    >>> import torch
    >>> from ssdops.nn import Mamba2
    >>> block, u = Mamba2(32, d_state=16, headdim=8), torch.randn(2, 20, 32)
    >>> y, cache = block(u[:, :12], return_cache=True)
    >>> y_next, cache = block.step(u[:, 12], cache)
    >>> torch.allclose(y_next, block(u)[:, 12], atol=1e-5)
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, int(expand * d_model)
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_inner // max(headdim, 1)
        self.A_init_range, self.dt_init = A_init_range, (dt_min, dt_max, dt_init_floor)
        self.dt_limit, self.D_has_hdim, self.backend = dt_limit, D_has_hdim, backend
        self.common_channels: Callable[[Tensor], Tensor] | None = None  # what sums gradients of those that ranks have in common
        check_sizes(self)
        check_ranges(A_init_range, (dt_min, dt_max), dt_limit)
        self._make_projections(d_conv - 1, bias, conv_bias, {"device": device, "dtype": dtype})
        self.D = nn.Parameter(torch.empty(self.d_inner if D_has_hdim else self.nheads, device=device, dtype=dtype))
        groups = ngroups if norm_groups is None else norm_groups
        norm = partial(GatedRMSNorm, self.d_inner, norm_eps, groups=groups, norm_before_gate=norm_before_gate)
        self.norm = norm(device=device, dtype=dtype) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw dt_bias and A_log anew and set D to ones: the parameters that stand in no module inside."""
        self._draw_dt_bias()
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        self.A_log.copy_(torch.empty_like(self.A_log, dtype=wide).uniform_(*self.A_init_range).log())
        self.D.fill_(1.0)

    @overload
    def forward(
        self, u: Tensor, cache: Mamba2Cache | None = ..., *, cu_seqlens: Tensor | None = ..., segment_ids: Tensor | None = ...,
        n_segments: int | None = ..., return_cache: Literal[False] = ..., group: dist.ProcessGroup | None = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, u: Tensor, cache: Mamba2Cache | None = ..., *, cu_seqlens: Tensor | None = ..., segment_ids: Tensor | None = ...,
        n_segments: int | None = ..., return_cache: Literal[True], group: dist.ProcessGroup | None = ...,
    ) -> tuple[Tensor, Mamba2Cache]: ...  # fmt: skip
    def forward(
        self,
        u: Tensor,
        cache: Mamba2Cache | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        segment_ids: Tensor | None = None,
        n_segments: int | None = None,
        return_cache: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Tensor | tuple[Tensor, Mamba2Cache]:
        """The block over whole sequences, or the next part of them.

        Packed, a cache has a row per document: prompts of many lengths are read in one call, and stepped as a batch; and new
        prompts (rows of zeros, `initial_cache`) go in one call with sequences that go on by a token.

        Args:
            u: `(batch, seqlen, d_model)`.
            cache: what an earlier call on the same sequences left; None is their beginning.
            cu_seqlens, segment_ids, n_segments: packed documents, as `masks.documents` takes them.
            return_cache: also return the cache after the last token.
            group: u is this rank's slice of tokens that are split over the ranks of a process group, as `distributed.ssd` takes
                them: the convolution and the scan reach over the slices' ends. Parameters are the same on all ranks, and each
                has the part of their gradients that its tokens give: sum them, as data parallel training does.

        Returns:
            `(batch, seqlen, d_model)` in the dtype of u, or autocast's; with `return_cache`, (y, cache).

        Raises:
            ShapeError: u, or a cache of another block or of another number of rows.
            MaskError, DtypeError, DeviceError, ValueRangeError: an argument that does not fit.
            RankError: with a group, ranks that do not make one call together.
            UnsupportedError: a cache with a group.
        """
        if group is not None and (team := team_of(group)) is not None:
            return self._on_slice(team, u, cache, cu_seqlens, segment_ids, n_segments, return_cache)
        check_input(u, ("batch", "seqlen", self.d_model), self.in_proj.weight)
        documents = None
        if cu_seqlens is not None or segment_ids is not None or n_segments is not None:
            documents = masks.documents(cu_seqlens, segment_ids=segment_ids, n_segments=n_segments)
        rows = cache_rows(u, documents) if cache is not None or return_cache else (0, "")
        if cache is not None:
            check_cache(cache, self._cache_sizes, rows, u.device)
        z, xBC, dt = self._project(u)
        entering = (None, None) if cache is None else (cache.window, cache.state)
        convolve = partial(causal_conv1d, activation="silu", window=entering[0], documents=documents)
        convolved = convolve(xBC, *self._taps(), return_window=return_cache)
        xBC, window = convolved if isinstance(convolved, tuple) else (convolved, None)
        C, B, x, mask = self._operands(xBC, dt)
        mask = mask if documents is None else mask * documents
        scanned = ssd(C, B, x, mask, initial_state=entering[1], return_state=return_cache, backend=self.backend)
        y, state = (scanned[0], scanned[1]) if isinstance(scanned, tuple) else (scanned, None)
        out = self._finish(y, x, z)
        if not return_cache:
            return out
        assert window is not None and isinstance(state, Tensor)  # a scan has one state
        return out, Mamba2Cache(window, state)

    def _on_slice(
        self, team: Team, u: Tensor, cache: Mamba2Cache | None, cu_seqlens: Tensor | None, segment_ids: Tensor | None,
        n_segments: int | None, return_cache: bool,
    ) -> Tensor:  # fmt: skip
        """The block over this rank's slice: the convolution reads the last tokens of the slices before."""
        if cache is not None or return_cache:
            raise UnsupportedError("a cache is of whole sequences, and this one is split over ranks; leave group out, or it")
        packed = cu_seqlens is not None or segment_ids is not None or n_segments is not None
        documents = masks.documents(cu_seqlens, segment_ids=segment_ids, n_segments=n_segments) if packed else None
        lengths = agree_on_input(team, u, self.in_proj.weight, self.d_model)
        z, xBC, dt = self._project(u)
        weight, bias = self._taps()
        convolve = partial(causal_conv1d, weight=weight, bias=bias, activation="silu")
        xBC = conv_on_slice(convolve, xBC, self.d_conv - 1, documents, team, lengths)
        C, B, x, mask = self._operands(xBC, dt)
        mask = mask if documents is None else mask * documents
        return self._finish(distributed_ssd(C, B, x, mask, group=team.group, backend=self.backend), x, z)

    def step(self, u: Tensor, cache: Mamba2Cache) -> tuple[Tensor, Mamba2Cache]:
        """The block on one token of each sequence, after what the cache has of them.

        Args:
            u: `(batch, d_model)`.
            cache: of `batch` rows, from `forward`, from another step, or `initial_cache(batch)`. It is not written to.

        Returns:
            `(batch, d_model)` in the dtype of u, or autocast's, and the cache after the token.

        Raises:
            ShapeError, DtypeError, DeviceError: u, or a cache of another block or batch.
        """
        check_input(u, ("batch", self.d_model), self.in_proj.weight)
        check_cache(cache, self._cache_sizes, cache_rows(u, None), u.device)
        z, xBC, dt = self._project(u)
        taps, bias = self._taps()
        xBC, window = causal_conv1d(xBC[:, None], taps, bias, activation="silu", window=cache.window, return_window=True)
        C, B, x, mask = self._operands(xBC[:, 0], dt)
        y, state = ssd_step(C, B, x, mask, cache.state, backend=self.backend)
        assert isinstance(state, Tensor)  # a scan has one state
        return self._finish(y, x, z), Mamba2Cache(window, state)

    def initial_cache(self, rows: int) -> Mamba2Cache:
        """The cache of `rows` sequences of no tokens: zeros, on the device of the parameters.

        >>> from ssdops.nn import Mamba2
        >>> Mamba2(32, d_state=16, headdim=8).initial_cache(3).state.shape
        torch.Size([3, 8, 8, 16])
        """
        weight = self.in_proj.weight
        window, state = ((rows, *sizes) for sizes in self._cache_sizes)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return Mamba2Cache(weight.new_zeros(window), weight.new_zeros(state, dtype=dtype))

    @property
    def _cache_sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a cache's window and state, without their rows."""
        return (self.conv1d.weight.shape[0], self.d_conv - 1), (self.nheads, self.headdim, self.d_state)

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weights (channels, d_conv) and bias."""
        weight, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        if self.common_channels is None:
            return weight, bias
        return self.common_channels(weight), None if bias is None else self.common_channels(bias)

    def _operands(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Mask]:
        """What the scan takes: C, B and x by heads, and the mask. dt weighs the columns, in its own precision."""
        x, (B, C) = self._parts(xBC)
        steps, logs = self._rates(dt)
        return C, B, x, masks.decay(logs).scale(cols=steps)

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """The skip connection, the gated norm and the output projection."""
        if self.norm is not None:
            return self.out_proj(self.norm(y.flatten(-2), z, (self.D, x.flatten(-2))).to(z.dtype))
        D = self.D.unflatten(0, (self.nheads, -1))  # [nheads, headdim] or [nheads, 1]
        return self.out_proj(gated_skip(y, x, D, z.unflatten(-1, x.shape[-2:])).flatten(-2))
