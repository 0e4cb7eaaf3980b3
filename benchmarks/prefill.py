"""Prefill of the mamba2-130m configuration on a CPU: transformers by itself, and with its SSD computed by ssdops.

python benchmarks/prefill.py                 # needs the extra `transformers`; neither mamba_ssm nor causal_conv1d installed
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from measure import Paired, environment, paired
from report import Bound, Figure, Section, print_section, write_json
from rich.console import Console
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from ssdops.compat.transformers import enabled

PROMPT, NHEADS, HEADDIM, DSTATE = 2048, 24, 64, 128
AT_LEAST: Bound = "at least"


def whole_model(rounds: int) -> Figure:
    """One prompt through all 24 layers, with a cache, and the logits of its last token: what `generate` begins with."""
    config = Mamba2Config(
        vocab_size=50288, hidden_size=768, num_hidden_layers=24, state_size=DSTATE, num_heads=NHEADS, head_dim=HEADDIM,
        n_groups=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    tokens = torch.randint(config.vocab_size, (1, PROMPT))

    def theirs() -> torch.Tensor:
        return model(tokens, use_cache=True, logits_to_keep=1).logits

    ours = switched(theirs)
    parameters = sum(p.numel() for p in model.parameters())
    return figure(f"prefill of {PROMPT} tokens, {parameters / 1e6:.0f} M parameters", 2.0, ours, theirs, rounds)


def scan_alone(rounds: int) -> Figure:
    """The function that mixers call for a prompt: softplus of dt, the scan with its final state, the skip connection."""
    x, dt = torch.randn(1, PROMPT, NHEADS, HEADDIM), torch.randn(1, PROMPT, NHEADS)
    B, C = torch.randn(2, 1, PROMPT, 1, DSTATE)
    A, D, dt_bias = -torch.arange(1.0, NHEADS + 1), torch.ones(NHEADS), torch.full((NHEADS,), -4.6)  # steps of about 0.01

    def theirs() -> torch.Tensor:
        scan = modeling_mamba2.mamba2_chunk_scan
        return scan(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True)[0]

    return figure(f"the SSD of a layer, {PROMPT} tokens", 4.0, switched(theirs), theirs, rounds)


def switched(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call, with ssdops."""

    def ours() -> torch.Tensor:
        with enabled("mamba2"):
            return call()

    return ours


def figure(
    name: str, target: float, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], rounds: int
) -> Figure:
    """How many times as fast, and how far apart the results are."""
    expected = theirs()
    apart = ((ours() - expected).abs().max() / expected.abs().max()).item()
    if not apart <= 1e-4:
        raise RuntimeError(f"{name}: ssdops and transformers differ by {apart:.1e} of the greatest value")
    times: Paired = paired(ours, theirs, rounds)
    low, high = times.spread
    parts = {"ssdops s": times.first, "transformers s": times.second, "least": low, "most": high, "difference": apart}
    return Figure(name, times.ratio, "times as fast", AT_LEAST, target, parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both, print them, and say by the exit status whether the targets are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    machine = environment() | {"transformers": transformers.__version__}
    console = Console()
    console.print(machine)
    with torch.inference_mode():
        section = Section("Prefill on a CPU", [scan_alone(options.rounds), whole_model(options.rounds)])
    print_section(console, section)
    if options.json:
        write_json(options.json, machine, [section])
    return 0 if all(figure.ok for figure in section.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
