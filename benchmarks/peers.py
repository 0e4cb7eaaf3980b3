"""The peers that the GPU benchmark measures beside ssdops, each imported when first asked for.

How to get them (each is optional, and a row says which one is missing):

    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm
    pip install --no-deps fla-core
    pip install einops

The two variables make a wheel of mamba_ssm without its compiled parts, of which only Mamba-1 needs any. For a machine
without a network, unpack the three wheels into one folder, here `.peers`, and put that on PYTHONPATH.
"""

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

import torch
from mamba2_work import Operands, Side, Work, ssd_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

PACKAGES = ("mamba-ssm", "fla-core", "einops", "causal-conv1d")
MAMBA_CHUNK = 256  # mamba_ssm's own default


class MissingPeerError(RuntimeError):
    """The peer is not installed here."""


def versions() -> dict[str, str]:
    """The installed version of each peer, or that it is missing."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def mamba_module(name: str) -> ModuleType:
    """A module of mamba_ssm, without running the package's `__init__`, which imports compiled parts that nothing here uses.

    The package is put into `sys.modules` as an empty module with the right search path, under which submodules import.
    """
    if "mamba_ssm" not in sys.modules:
        spec = find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            raise MissingPeerError("mamba_ssm is not installed; benchmarks/peers.py says how")
        bare = ModuleType("mamba_ssm")
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec
        sys.modules["mamba_ssm"] = bare
    return import_module(f"mamba_ssm.{name}")


@cache
def fla_module(name: str) -> ModuleType:
    """A module of fla."""
    if find_spec("fla") is None:
        raise MissingPeerError("fla is not installed; benchmarks/peers.py says how")
    return import_module(f"fla.{name}")


def _mamba(operands: Operands) -> Work:
    scan = mamba_module("ops.triton.ssd_combined").mamba_chunk_scan_combined
    x, dt, a, b, c = operands
    return Work((x, dt, a, b, c), lambda x, dt, a, b, c: scan(x, dt, a, b, c, chunk_size=MAMBA_CHUNK))


def _fla(operands: Operands) -> Work:
    """q and k are repeated for every head, which fla asks for; that is done beforehand and not timed."""
    simple_gla = fla_module("ops.simple_gla").chunk_simple_gla
    q, k, v, log_a = ssd_inputs(operands)
    q, k = (t.repeat_interleave(v.size(2) // t.size(2), dim=2) for t in (q, k))
    return Work((q, k, v, log_a), lambda q, k, v, log_a: simple_gla(q, k, v, log_a, scale=1.0)[0])


def _attention(backend: SDPBackend) -> Callable[[Operands], Work]:
    """Causal softmax attention with the shape's heads and headdim, for q and k too: dstate has no counterpart in it."""

    def prepare(operands: Operands) -> Work:
        batch, seqlen, nheads, headdim = operands.x.shape
        generator = torch.Generator(operands.x.device).manual_seed(2)
        options = {"dtype": operands.x.dtype, "device": operands.x.device, "generator": generator}
        leaves = tuple(torch.randn(batch, nheads, seqlen, headdim, **options) for _ in range(3))
        return Work(leaves, _causal_attention, lambda: sdpa_kernel(backend))

    return prepare


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


MAMBA = Side("mamba_ssm", _mamba)
FLA = Side("fla", _fla)
CUDNN = Side("cuDNN attention", _attention(SDPBackend.CUDNN_ATTENTION))
FLASH = Side("flash attention", _attention(SDPBackend.FLASH_ATTENTION))


def mamba_step(operands: Operands, state: Tensor) -> Callable[[], Tensor]:
    """mamba_ssm's decoding step on the first token of each row; it updates the state in place.

    Its kernel asks for D and dt_bias, and for per-head values spread over the head by strides of 0, as Mamba-2's layer
    passes them; here both are zero.
    """
    update = mamba_module("ops.triton.selective_state_update").selective_state_update
    x, dt, a, b, c = operands
    nheads, headdim, dstate = x.size(2), x.size(3), b.size(3)
    zeros = torch.zeros(nheads, device=x.device)[:, None].expand(nheads, headdim)
    dt = dt[:, 0, :, None].expand(-1, -1, headdim)
    a = a[:, None, None].expand(-1, headdim, dstate)
    x, b, c = x[:, 0], b[:, 0], c[:, 0]
    return lambda: update(state, x, dt, a, b, c, D=zeros, dt_bias=zeros)


def mamba_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, **given: object) -> Tensor | tuple[Tensor, Tensor]:
    """mamba_ssm's scan as its block calls it: bias and softplus of dt, the skip connection and, if asked, the state inside."""
    scan = mamba_module("ops.triton.ssd_combined").mamba_chunk_scan_combined
    return scan(x, dt, a, b, c, chunk_size=MAMBA_CHUNK, dt_softplus=True, **given)


def fla_conv(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """fla's causal convolution, with silu."""
    return fla_module("modules.causal_conv1d").causal_conv1d(x, taps, bias, activation="silu")[0]


def dao_conv(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """The package causal_conv1d, compiled, with channels last in memory, with silu."""
    if find_spec("causal_conv1d") is None:
        raise MissingPeerError("causal_conv1d is not installed")
    convolve = import_module("causal_conv1d").causal_conv1d_fn
    return convolve(x.mT, taps.to(x.dtype), bias.to(x.dtype), activation="silu").mT
