"""transformers' own models, with random weights, on a real text: what they give with and without ssdops is the same."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from ssdops.compat.transformers import enabled
from ssdops.nn import Mamba2

transformers = pytest.importorskip("transformers")

BATCH, SEQLEN, VOCAB, NEW = 2, 45, 128, 12
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
LAYERS = ["linear_attention", "full_attention", "linear_attention"]
IBM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_chunk_size": 16} | ATTENTION
CONFIGS = {
    "Mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16, "num_hidden_layers": 2},
    "Bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]} | IBM,
    "Zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 16,
               "n_mamba_heads": 4, "mamba_ngroups": 2, "chunk_size": 16} | ATTENTION,
    "FalconH1": {"num_hidden_layers": 2, "mamba_d_ssm": 64} | IBM,
    "GraniteMoeHybrid": {"num_hidden_layers": 3, "layer_types": LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 32} | IBM,
    "NemotronH": {"layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "mlp"], "head_dim": 8,
                  "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 16,
                  "n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32} | ATTENTION,
}  # fmt: skip


def build(name: str, **changes):
    """A small model of that architecture whose weights are random in everything that is learnt."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON | CONFIGS[name] | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.uniform_(-1.0, 1.0)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def text(rows: int, seqlen: int) -> torch.Tensor:
    """The bytes of a real text from its beginning on, `(rows, seqlen)`; all below 128."""
    data = resources.files("ssdops.data").joinpath("opticks.txt").read_bytes()
    ids = torch.tensor(list(data[4000 : 4000 + rows * seqlen])).view(rows, seqlen)
    return ids.clamp(2, VOCAB - 1)  # the first two are special


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-4 of the greatest value: what is asked of logits, in float32."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_logits(model):
    ids = text(BATCH, SEQLEN)
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
        with enabled():
            close(model(ids, use_cache=False).logits, theirs)


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **options)


def test_greedy_generation(model):
    """By cached steps, as transformers generates by itself; and step by step what recomputing everything gives."""
    ids = text(BATCH, SEQLEN)
    theirs = generate(model, ids)
    with enabled(), torch.no_grad():
        ours = generate(model, ids)
        whole = model(ours.sequences, use_cache=False).logits[:, SEQLEN - 1 : -1]
    assert torch.equal(ours.sequences, theirs.sequences)
    cached = torch.stack(ours.logits, 1)
    close(cached, torch.stack(theirs.logits, 1))
    close(cached, whole)


def test_prefill_in_parts(model):
    """A cache that goes on with several tokens, then with one, gives what the whole gives."""
    ids, parts, logits, past = text(BATCH, SEQLEN), [21, SEQLEN - 22, 1], [], {}
    # Bamba's own count of the tokens before is off when more than one goes on, with ssdops and without; so they are numbered.
    numbers = torch.arange(SEQLEN)[None].split(parts, 1) if model.config.model_type == "bamba" else [None] * len(parts)
    with enabled(), torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for part, position_ids in zip(ids.split(parts, 1), numbers, strict=True):
            given = {} if position_ids is None else {"position_ids": position_ids}
            output = model(part, **past, use_cache=True, **given)
            name = next(name for name in ("cache", "past_key_values", "cache_params") if name in output)
            past = {name: output[name]}
            logits.append(output.logits)
    close(torch.cat(logits, 1), whole)


def test_left_padded_generation(model):
    """A prompt beside a longer one goes on as it does alone."""
    ids, pad = text(BATCH, SEQLEN), 13
    attended = torch.ones_like(ids)
    ids[0, :pad], attended[0, :pad] = 0, 0
    with enabled():
        alone = generate(model, ids[:1, pad:])
        together = generate(model, ids, attention_mask=attended)
    assert torch.equal(together.sequences[0, pad:], alone.sequences[0])
    close(torch.stack(together.logits, 1)[:1], torch.stack(alone.logits, 1))


def packed(lengths: list[int]) -> dict[str, torch.Tensor]:
    """What transformers' DataCollatorWithFlattening gives beside the tokens."""
    ids = torch.cat([torch.full((length,), at) for at, length in enumerate(lengths)])[None].int()
    return {"seq_idx": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_equal_separate_ones(model, training):
    """In training mode the mixers look for a function of a whole block first."""
    lengths, ids = [17, 1, 27], text(1, SEQLEN)
    if model.config.model_type == "granitemoehybrid":  # its attention, of transformers' own, is not told of documents
        model = build("GraniteMoeHybrid", layer_types=["linear_attention"] * 3)
    body = model.base_model  # Mamba2ForCausalLM does not hand seq_idx on
    with enabled(), torch.no_grad():
        separate = [body(part, use_cache=False)[0] for part in ids.split(lengths, 1)]
        together = body.train(training)(ids, **packed(lengths), use_cache=False)[0]
    model.eval()
    close(together, torch.cat(separate, 1))


def test_training(model):
    """Loss and the gradient of every parameter."""
    ids = text(BATCH, SEQLEN)

    def learn():
        model.zero_grad()
        loss = model.train()(ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.eval()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    loss, theirs = learn()
    with enabled():
        our_loss, ours = learn()
    close(our_loss, loss)
    assert ours.keys() == theirs.keys() and any(name.endswith("A_log") for name in ours)
    scale = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():  # a bias that softmax does not see has no gradient but rounding
        assert (ours[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-2 * scale), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ngroups", [1, 2])
def test_a_mixer_loads_into_the_block(ngroups, bias):
    """Its weights under their names, and the outputs that it gives; its norm is by groups from 5.23 on."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    config = transformers.Mamba2Config(**COMMON | CONFIGS["Mamba2"] | {"n_groups": ngroups, "use_bias": bias})
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    grouped = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
    block = Mamba2(32, d_state=16, headdim=16, ngroups=ngroups, norm_groups=None if grouped else 1, bias=bias)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        block.load_state_dict(mixer.state_dict(), strict=True)
        u = torch.randn(BATCH, SEQLEN, 32)
        ours, theirs = block(u), mixer(u)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
