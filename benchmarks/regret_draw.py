"""Random workloads for `regret.py`: the same for a seed, a count and a kind of device."""

import random

from ssdops.autotune.workload import Workload

TERMS = ("decay(log_a)",) * 5 + (
    "causal()", "decay(log_a).T", "decay(log_a).scale(rows=rows, cols=cols)", "channel_decay(channel)",
    "decay(log_a) * documents(documents)", "window(left=64, right=0)", "diagonal(value)",
)  # fmt: skip
PASSES = ("forward", "backward")
MOST_STATES = {"cpu": 3.2e9, "cuda": 6e10}
"""Elements of states over all tokens: so many of either device take it seconds at most by its slower backends."""
MOST_ELEMENTS = {"cpu": 2**40, "cuda": 2**27}
"""Elements of v: gradients and what backends keep are to fit as well."""


def draw(seed: int, count: int, device: str) -> list[Workload]:
    """Workloads of like chances."""
    random_ = random.Random(seed)
    out: list[Workload] = []
    while len(out) < count:
        ngroups, per_group = random_.choice((1, 1, 1, 2, 4)), random_.choice((1, 2, 4, 8, 16, 24))
        heads = ngroups * per_group
        term = random_.choice(TERMS)
        work = Workload(
            term, random_.choice(PASSES), "float32" if device == "cpu" else random_.choice(("bfloat16", "float32")),
            "float32", 1 if "documents" in term else random_.choice((1, 1, 2, 4, 8)), round(2 ** random_.uniform(3, 14)), heads,
            random_.choice((16, 32, 64, 64, 128)), random_.choice((16, 32, 64, 128, 128)), ngroups, ngroups, heads,
            random_.choice((2, 5, 16)) if "documents" in term else 0,
        )  # fmt: skip
        if _fits(work, device):
            out.append(work)
    return out


def _fits(work: Workload, device: str) -> bool:
    elements = work.batch * work.seqlen * work.nheads * work.headdim
    states = elements * work.dstate * (16 if "channel" in work.term else 1)
    quadratic = "window" in work.term and work.seqlen > 4096
    return states <= MOST_STATES[device] and elements <= MOST_ELEMENTS[device] and not quadratic
