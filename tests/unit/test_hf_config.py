"""Hugging Face's ``config.json`` and ours: both ways, and every other kind of model refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from kempnerforge.config.schema import ModelConfig
from kempnerforge.errors import ConfigError
from kempnerforge.model.hf import from_hf_config, redundant_names, tensor_map, to_hf_config
from kempnerforge.model.layers import rotary_frequencies
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
    assert known.rope_parameters is not None
    assert found.rope_theta == known.rope_parameters.get("rope_theta")
    assert found.kv_heads == known.num_key_value_heads
    assert found.resolved_head_dim == known.head_dim
    assert found.tie_embeddings == known.tie_word_embeddings
    assert found.init_std == known.initializer_range


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WITH_LENGTH = {**SCALED, "original_max_position_embeddings": 32}
ROPES: dict[str, tuple[dict[str, Any] | None, ...]] = {
    "rope_parameters": (
        None,
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_theta": 7e5, **WITH_LENGTH},
        SCALED,
    ),
    "rope_scaling": (
        None,
        {},
        {"type": "default"},
        {**WITH_LENGTH, "factor": 4.0},
        {**SCALED, "rope_theta": 3e5},
    ),
}


@pytest.mark.parametrize("outside", [{}, {"rope_theta": 1e6}, {"original_max_position_embeddings": 16}])
def test_hf_config_rope_spellings_read_as_by_transformers(outside: dict[str, Any]) -> None:
    """The new spelling, the old one, and both, of which transformers takes one as a whole."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    written = theirs(max_position_embeddings=64)
    base = {
        key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")
    } | outside
    for tables in itertools.product(*ROPES.values()):
        given = {key: table for key, table in zip(ROPES, tables, strict=True) if table is not None}
        body = json.dumps(base | given)
        known = LlamaRotaryEmbedding(LlamaConfig(**json.loads(body))).inv_freq
        found = rotary_frequencies(from_hf_config(json.loads(body), where="x"))
        torch.testing.assert_close(found, known.double(), rtol=1e-6, atol=0, msg=body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type: is 'qwen2'; only 'llama' and 'mistral' can be imported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias: is True; only False"),
        ({"mlp_bias": True}, "mlp_bias: is True"),
        ({"hidden_act": "gelu"}, "hidden_act: is 'gelu'; only 'silu'"),
        ({"sliding_window": 2047}, "sliding_window: is 2047; it must be null, or at least"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: are not all 'full_attention'"),
        (
            {"rope_scaling": {"full_attention": {"rope_type": "llama3"}}},
            "rope_scaling: has a table of its own",
        ),
        ({"model_type": "mistral"}, "architectures: are ['LlamaForCausalLM']; only MistralForCausalLM"),
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
