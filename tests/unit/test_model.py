"""The decoder against an independent implementation, its counts, its names, its recomputation."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.init import init_weights_
from kempnerforge.model.layers import RotaryEmbedding, rotary_frequencies
from kempnerforge.model.llama import Llama
from kempnerforge.model.recompute import recompute_activations

TINY: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61, "max_seq_len": 24}
LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS = {
    "plain": {},
    "gqa": {"n_kv_heads": 2},
    "mqa, odd sizes": {"n_kv_heads": 1, "head_dim": 6, "ffn_hidden_dim": 20},
    "tied": {"tie_embeddings": True, "n_layers": 1},
    "long context": {"rope_theta": 500000.0, "rope_scaling": LLAMA31_ROPE, "n_kv_heads": 2},
}


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(TINY | changes)


def make(config: ModelConfig, seed: int = 3) -> Llama:
    """A whole model on the CPU; a large ``init_std`` makes attention far from uniform."""
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    init_weights_(model, seed=seed, init_std=0.3, n_layers=config.n_layers)
    return model


def tokens(batch: int = 3, seq_len: int = 17, seed: int = 0) -> Tensor:
    return torch.randint(TINY["vocab_size"], (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def reference_logits(model: Llama, tokens_BT: Tensor) -> Tensor:
    """The same decoder written again in fp64: explicit products, complex rotation, repeated key heads."""
    config, weights = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    head_dim, seq_len = config.resolved_head_dim, tokens_BT.size(1)
    angles = torch.outer(torch.arange(seq_len).double(), reference_frequencies(config))
    turns = torch.polar(torch.ones_like(angles), angles)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    def heads(x: Tensor, name: str, *, rotated: bool) -> Tensor:
        x = (x @ weights[name].T).reshape(len(x), seq_len, -1, head_dim).transpose(1, 2)
        if rotated:
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
            x = torch.view_as_real(pairs * turns).reshape(x.shape)
        return x.repeat_interleave(config.n_heads // x.size(1), dim=1)

    x = weights["tok_embeddings.weight"][tokens_BT]
    for i in range(config.n_layers):
        at = f"layers.{i}."
        h = norm(x, at + "attention_norm.weight")
        q, k = (heads(h, f"{at}attention.{w}.weight", rotated=True) for w in ("wq", "wk"))
        v = heads(h, at + "attention.wv.weight", rotated=False)
        scores = q @ k.transpose(-1, -2) / math.sqrt(head_dim)
        future = torch.ones(seq_len, seq_len).triu(1).bool()
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).reshape(len(x), seq_len, -1) @ weights[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        gate = h @ weights[at + "feed_forward.w1.weight"].T
        up = h @ weights[at + "feed_forward.w3.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ weights[at + "feed_forward.w2.weight"].T
    head = weights["tok_embeddings.weight" if config.tie_embeddings else "output.weight"]
    return norm(x, "norm.weight") @ head.T


def reference_frequencies(config: ModelConfig) -> Tensor:
    """Llama 3.1's rule as its authors wrote it: frequency by frequency, by wavelength."""
    freqs = [
        config.rope_theta ** (-i / config.resolved_head_dim) for i in range(0, config.resolved_head_dim, 2)
    ]
    scaling = config.rope_scaling
    if scaling is None:
        return torch.tensor(freqs, dtype=torch.float64)
    context, stretched = scaling.original_max_position_embeddings, []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < context / scaling.high_freq_factor:
            stretched.append(freq)
        elif wavelength > context / scaling.low_freq_factor:
            stretched.append(freq / scaling.factor)
        else:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (context / wavelength - scaling.low_freq_factor) / span
            stretched.append((1 - smooth) * freq / scaling.factor + smooth * freq)
    return torch.tensor(stretched, dtype=torch.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_logits_match_reference(variant: str) -> None:
    model = make(tiny(**VARIANTS[variant]))
    expected = reference_logits(model, tokens())
    assert expected.std() > 0.3  # the comparison is not between zeros
    torch.testing.assert_close(model(tokens()).double(), expected, rtol=1e-4, atol=1e-4)


def test_model_attention_is_causal() -> None:
    model, before, after = make(tiny(n_kv_heads=2)), tokens(), tokens()
    after[:, 9:] = (after[:, 9:] + 1) % TINY["vocab_size"]
    torch.testing.assert_close(model(before)[:, :9], model(after)[:, :9], rtol=0, atol=0)
    assert not torch.equal(model(before)[:, 9:], model(after)[:, 9:])


@pytest.mark.parametrize("scaling", [None, LLAMA31_ROPE], ids=["plain", "stretched"])
def test_rope_tables_long_positions_match_formula(scaling: dict[str, Any] | None) -> None:
    config = tiny(head_dim=128, rope_theta=500000.0, rope_scaling=scaling, max_seq_len=40000)
    freqs = reference_frequencies(config)
    torch.testing.assert_close(rotary_frequencies(config), freqs, rtol=1e-14, atol=0)
    cos_TP, sin_TP = RotaryEmbedding(config)(40000)
    assert cos_TP.dtype == torch.float32
    for position in (0, 1, 8191, 39999):
        torch.testing.assert_close(cos_TP[position].double(), (position * freqs).cos(), rtol=0, atol=1e-7)
        torch.testing.assert_close(sin_TP[position].double(), (position * freqs).sin(), rtol=0, atol=1e-7)


def test_rope_scaling_has_three_regions() -> None:
    config = tiny(head_dim=128, rope_theta=500000.0, rope_scaling=LLAMA31_ROPE)
    ratios = rotary_frequencies(config) / rotary_frequencies(config.model_copy(update={"rope_scaling": None}))
    assert ratios.max() == 1
    assert ratios.min() == pytest.approx(1 / 8)
    assert ((ratios > 0.13) & (ratios < 0.99)).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_model_config_parameter_count_matches_model(variant: str) -> None:
    config = tiny(**VARIANTS[variant])
    with torch.device("meta"):
        model = Llama(config)
    assert sum(param.numel() for param in model.parameters()) == config.num_parameters


def test_model_flops_per_token_match_palm() -> None:
    with torch.device("meta"):
        model, tied = Llama(tiny()), Llama(tiny(tie_embeddings=True))
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 256) + 5 * 32 + 61 * 32  # layers, norms, output
    attention = 12 * 2 * 4 * 8 * 16
    assert model.flops_per_token(16) == tied.flops_per_token(16) == 6 * matrices + attention


def test_model_state_names_tied_weight_once() -> None:
    per_layer = [
        *("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"),
        *("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ]
    expected = ["tok_embeddings", *(f"layers.{i}.{n}" for i in range(2) for n in per_layer), "norm"]
    tied, untied = make(tiny(tie_embeddings=True)), make(tiny())
    assert list(tied.state_dict()) == [f"{name}.weight" for name in expected]
    assert list(untied.state_dict()) == [f"{name}.weight" for name in (*expected, "output")]
    assert [name for name, _ in tied.named_parameters()] == list(tied.state_dict())


def test_model_build_draws_no_global_random_numbers() -> None:
    before = torch.get_rng_state()
    make(tiny())
    assert torch.equal(torch.get_rng_state(), before)


def test_model_sequence_too_long_refused() -> None:
    with pytest.raises(ValueError, match=r"25 tokens; model.max_seq_len is 24"):
        make(tiny())(tokens(seq_len=25))


def loss_and_grads(model: Llama) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = F.cross_entropy(model(tokens()).float().flatten(0, 1), tokens(seed=1).flatten())
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return loss.detach(), grads


class CountOps(TorchDispatchMode):
    """Counts the operators that run under it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def set_remat(model: Llama, remat: Any) -> None:
    for block in model.layers.values():
        recompute_activations(block, remat)


@pytest.mark.parametrize("remat", ["selective", "full"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_remat_loss_and_gradients_unchanged(remat: Any, kv_heads: int) -> None:
    model = make(tiny(n_kv_heads=kv_heads))
    names = list(model.state_dict())
    loss, grads = loss_and_grads(model)
    set_remat(model, remat)
    again, grads_again = loss_and_grads(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("remat", "products", "attentions", "activations"),
    # Per layer: 7 products, of which the last is not needed again; 1 attention, 1 silu.
    [("none", 0, 0, 0), ("selective", 0, 0, 1), ("full", 6, 1, 1)],
)
def test_remat_mode_recomputes_expected_operators(
    remat: str, products: int, attentions: int, activations: int, dtype: torch.dtype
) -> None:
    model = make(tiny(n_kv_heads=2)).to(dtype)
    set_remat(model, remat)
    loss = F.cross_entropy(model(tokens()).float().flatten(0, 1), tokens(seed=1).flatten())
    with CountOps() as backward:
        loss.backward()
    layers, matrices = 2, 2 * 7 + 1
    assert backward.counts["mm"] == 2 * matrices + layers * products
    assert backward.counts["_scaled_dot_product_flash_attention_for_cpu"] == layers * attentions
    assert backward.counts["silu"] == layers * activations


def test_remat_without_grad_recomputes_nothing() -> None:
    model = make(tiny())
    set_remat(model, "full")
    with torch.no_grad(), CountOps() as forward:
        assert not model(tokens()).requires_grad
    assert forward.counts["mm"] == 2 * 7 + 1
