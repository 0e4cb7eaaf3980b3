"""transformers' Mamba-2 models with their SSD computed here: `enable()`, `disable()`, `enabled()`.

Mamba2, Bamba, Zamba2, Falcon-H1, Granite 4 (`granitemoehybrid`) and Nemotron-H stay as they are, with their weights, caches,
`generate` and `Trainer`. What changes is what a few functions of their files do, those for which transformers looks for
mamba_ssm and causal_conv1d; `disable()` puts back the ones that were there.
"""

from .switch import disable, enable, enabled

__all__ = ["disable", "enable", "enabled"]
