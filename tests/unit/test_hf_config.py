"""Hugging Face's ``config.json`` and ours: both ways, and every other kind of model refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kempnerforge.config.schema import ModelConfig
from kempnerforge.errors import ConfigError
from kempnerforge.model.hf import from_hf_config, redundant_names, tensor_map, to_hf_config
from kempnerforge.model.llama import Llama

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gqa": {"n_kv_heads": 2},
    "tied": {"tie_embeddings": True},
    "odd sizes": {"head_dim": 6, "ffn_hidden_dim": 20, "n_kv_heads": 1, "norm_eps": 1e-6, "init_std": 0.1},
    "llama 3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61} | changes)


def theirs(**changes: Any) -> dict[str, Any]:
    return to_hf_config(config(), dtype="float32", eos_token_id=None) | changes


@pytest.mark.parametrize("case", CONFIGS)
def test_hf_tensor_map_names_every_weight_with_shape(case: str) -> None:
    with torch.device("meta"):
        model = Llama(config(**CONFIGS[case]))
    mapped = tensor_map(model.config)
    assert {one.name: one.shape for one in mapped} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert len({one.hf_name for one in mapped}) == len(mapped)


@pytest.mark.parametrize("case", CONFIGS)
def test_hf_config_round_trip_equal(case: str) -> None:
    before = config(**CONFIGS[case])
    after = from_hf_config(to_hf_config(before, dtype="float32", eos_token_id=1), where="x")
    resolved = {
        "n_kv_heads": before.kv_heads,
        "head_dim": before.resolved_head_dim,
        "ffn_hidden_dim": before.ffn_dim,
    }
    assert after == before.model_copy(update=resolved)


def test_hf_config_defaults_match_transformers() -> None:
    least = {
        key: theirs()[key]
        for key in (
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        )
    }
    from transformers import LlamaConfig

    known, found = LlamaConfig(**least), from_hf_config(least, where="x")
    assert found.norm_eps == known.rms_norm_eps
    assert found.max_seq_len == known.max_position_embeddings
    assert found.rope_theta == known.rope_parameters["rope_theta"]
    assert found.kv_heads == known.num_key_value_heads
    assert found.resolved_head_dim == known.head_dim
    assert found.tie_embeddings == known.tie_word_embeddings
    assert found.init_std == known.initializer_range


def test_hf_config_rope_both_spellings_read() -> None:
    want = config(rope_theta=500000.0, rope_scaling=LLAMA3)
    older = theirs(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    newer = {key: value for key, value in older.items() if key not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    for body in (older, newer):
        found = from_hf_config(body, where="x")
        assert (found.rope_theta, found.rope_scaling) == (want.rope_theta, want.rope_scaling)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type: is 'qwen2'; only 'llama' can be imported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias: is True; only False"),
        ({"mlp_bias": True}, "mlp_bias: is True"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'; only 'silu'"),
        ({"sliding_window": 4096}, "sliding_window: is 4096; this cannot be imported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: is {...}"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type: is 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor"),
        ({"rope_scaling": 3}, "rope_scaling: 3 is not a table"),
        ({"hidden_size": "32"}, "hidden_size: '32'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_key_value_heads": 3}, "n_kv_heads: 3 does not divide n_heads 4"),
    ],
)
def test_hf_config_unsupported_setting_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_hf_config(theirs(**changes), where="some/config.json")
    assert message in str(caught.value)
    assert "some/config.json" in str(caught.value)
    assert caught.value.exit_status == 2


def test_hf_config_many_faults_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="3 faults"):
        from_hf_config(theirs(attention_bias=True, hidden_act="gelu", sliding_window=1), where="x")


def test_hf_config_shape_transformers_refuses_refused() -> None:
    with pytest.raises(ConfigError, match="30 does not divide by n_heads 4"):
        to_hf_config(config(dim=30, head_dim=8), dtype="float32", eos_token_id=None)


def test_hf_redundant_names_output_layer_only_if_tied() -> None:
    assert "lm_head.weight" not in redundant_names(config())
    assert redundant_names(config(tie_embeddings=True))["lm_head.weight"] == "model.embed_tokens.weight"
