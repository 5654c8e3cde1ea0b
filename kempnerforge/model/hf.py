"""Names, shapes and configuration of Hugging Face's Llama, converted to and from ours.

A Mistral without a sliding window is the same computation under the same names, and can be imported.

The two differ only in the order of rows in the query and key projections. We rotate the
neighbouring channels (2i, 2i + 1) of a head together, as Meta's weights do. Hugging Face rotates
the channels i and i + E / 2 of a head of width E. So its row i is our row 2i, and its row i + E / 2
is our row 2i + 1 (``permute`` in transformers' ``convert_llama_weights_to_hf.py``). Values do not
change. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kempnerforge.config.rules import check_rules
from kempnerforge.config.schema import ModelConfig
from kempnerforge.errors import ConfigError, ConfigIssue

_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}
_EMBEDDING = ("tok_embeddings.weight", "model.embed_tokens.weight")
_NORM = ("norm.weight", "model.norm.weight")
_OUTPUT = ("output.weight", "lm_head.weight")

_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
"""Defaults of transformers that differ from ours, for keys that are missing."""
_ROPE_THETA = 10000.0
_BOS, _EOS = 1, 2
"""Defaults of transformers, for both architectures."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
}
"""Keys that change the computation, and the values for which our decoder computes the same. All of
them may be missing or null."""
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class HfTensor:
    """One weight under both names; the shape is the same in both."""

    name: str
    """Ours, such as ``layers.0.attention.wq.weight``."""
    hf_name: str
    shape: tuple[int, ...]
    row_order: tuple[int, ...] = ()
    """In each block of len(row_order) rows, their row i is our row row_order[i]. Empty: the same order."""


def tensor_map(config: ModelConfig) -> list[HfTensor]:
    """Return all weights of a model, in the order of its layers.

    A tied output layer has no entry, because it is the embedding.
    """
    dim, width = config.dim, config.resolved_head_dim
    rotary = (*range(0, width, 2), *range(1, width, 2))
    row_orders = {"attention.wq.weight": rotary, "attention.wk.weight": rotary}
    shapes = config.layer_shapes
    tensors = [HfTensor(*_EMBEDDING, (config.vocab_size, dim))]
    for layer in range(config.n_layers):
        tensors += [
            HfTensor(
                f"layers.{layer}.{ours}",
                f"model.layers.{layer}.{theirs}",
                shapes[ours],
                row_orders.get(ours, ()),
            )
            for ours, theirs in _LAYER.items()
        ]
    tensors.append(HfTensor(*_NORM, (dim,)))
    if not config.tie_embeddings:
        tensors.append(HfTensor(*_OUTPUT, (config.vocab_size, dim)))
    return tensors


def redundant_names(config: ModelConfig) -> dict[str, str]:
    """Return Hugging Face names that a folder may have in addition -> the name whose bytes they repeat.

    These are the output layer of a tied model, and the rotary frequencies. The latter have an empty
    string, because the config determines them.
    """
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "" for layer in range(config.n_layers)}
    tables["model.rotary_emb.inv_freq"] = ""
    return {**tables, _OUTPUT[1]: _EMBEDDING[1]} if config.tie_embeddings else tables


def to_hf_config(
    config: ModelConfig,
    *,
    dtype: str,
    eos_token_id: int | list[int] | None,
    bos_token_id: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``config.json`` for ``LlamaForCausalLM``.

    ``dtype`` is a torch name such as ``bfloat16``. The older spelling (``rope_theta``,
    ``rope_scaling``, ``torch_dtype``) is used because old and new versions of transformers read it.
    Raises ConfigError for a shape that transformers rejects.
    """
    if config.dim % config.n_heads:
        problem = f"{config.dim} does not divide by n_heads {config.n_heads}"
        raise ConfigError([ConfigIssue("model.dim", problem, "transformers' Llama refuses such a model")])
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.resolved_head_dim,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": "llama3", **scaling.model_dump()} if scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        # transformers accepts at most 1.0, and uses it only for missing weights.
        "initializer_range": min(config.init_std, 1.0),
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def from_hf_config(hf: Mapping[str, Any], *, where: str) -> ModelConfig:
    """Return the model that a ``config.json`` describes. ``where`` is its path, for errors.

    Raises ConfigError with every reason why our decoder cannot compute the model.
    """
    # A key that is missing has the default, and null has the meaning of None.
    values = {**_DEFAULTS.get(str(hf.get("model_type")), {}), **hf}
    values = {key: value for key, value in values.items() if value is not None}
    issues = _architecture_issues(values)
    issues += [ConfigIssue(key, "is missing") for key in _REQUIRED if key not in values]
    rope, rope_issues = _rope(values)
    issues += rope_issues
    tree = {ours: values[theirs] for ours, theirs in _KEYS.items() if theirs in values} | rope
    model: ModelConfig | None = None
    try:
        model = ModelConfig.model_validate(tree)
        issues += check_rules({"model": model})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            ours, *inner = map(str, item["loc"])
            problem = f"{item['input']!r}: {item['msg']}"
            issues.append(ConfigIssue(".".join([_KEYS.get(ours, ours), *inner]), problem))
    if model is None or issues:
        raise ConfigError(issues, where=where)
    return model


def special_tokens(
    hf: Mapping[str, Any], generation: Mapping[str, Any] | None, *, where: str
) -> dict[str, Any]:
    """Return the special tokens and generation settings of a model, as exports of it have them.

    ``hf`` is its ``config.json``, and ``generation`` its ``generation_config.json`` if it has one,
    whose special tokens precede, as in transformers. Raises ConfigError.
    """
    settings = {key: value for key, value in (generation or {}).items() if key != "transformers_version"}
    found = {
        "eos_token_id": settings.get("eos_token_id", hf.get("eos_token_id", _EOS)),
        "bos_token_id": settings.get("bos_token_id", hf.get("bos_token_id", _BOS)),
    }
    issues = []
    for key, value in found.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if not all(token is None or (type(token) is int and token >= 0) for token in ids):
            issues.append(ConfigIssue(key, f"{value!r} is not a token id"))
    if issues:
        raise ConfigError(issues, where=where)
    return {**found, "generation": settings or {"_from_model_config": True, **found}}


def _architecture_issues(hf: Mapping[str, Any]) -> list[ConfigIssue]:
    """Return the keys that describe another architecture."""
    issues = []
    known = _ARCHITECTURES.get(str(hf.get("model_type")))
    if known is None:
        allowed = f"only {' and '.join(map(repr, _ARCHITECTURES))} can be imported"
        issues.append(ConfigIssue("model_type", f"is {hf.get('model_type')!r}", allowed))
    architectures = hf.get("architectures")
    if known and architectures and known not in architectures:
        issues.append(ConfigIssue("architectures", f"are {architectures!r}", f"only {known} can be imported"))
    window, length = hf.get("sliding_window"), hf.get("max_position_embeddings", 0)
    # A window that no sequence exceeds is none.
    if window is not None and not (isinstance(window, int) and isinstance(length, int) and window >= length):
        can_be = (
            f"it must be null, or at least max_position_embeddings {length}. With a lower "
            "max_position_embeddings in config.json, the model can be imported for shorter sequences"
        )
        issues.append(ConfigIssue("sliding_window", f"is {window!r}", can_be))
    layer_types = hf.get("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        issues.append(ConfigIssue("layer_types", "are not all 'full_attention'", "this cannot be imported"))
    for key, allowed in _ALLOWED.items():
        value = hf.get(key)
        if value is not None and value not in allowed:
            can_be = f"only {allowed[0]!r} can be imported" if allowed else "this cannot be imported"
            shown = "{...}" if isinstance(value, dict) else repr(value)
            issues.append(ConfigIssue(key, f"is {shown}", can_be))
    return issues


def _rope(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """Read ``rope_theta`` and ``rope_scaling`` in the new spelling (``rope_parameters``) or the old one.

    With both, a ``rope_scaling`` that is not empty replaces ``rope_parameters``, as in transformers.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    table = hf.get(key, {})
    if not isinstance(table, Mapping):
        return {}, [ConfigIssue(key, f"{table!r} is not a table")]
    if nested := [name for name, value in table.items() if isinstance(value, Mapping)]:
        problem = f"has a table of its own for {nested[0]!r}"
        return {}, [ConfigIssue(key, problem, "only one table for all layers can be imported")]
    rope = {"rope_theta": table.get("rope_theta", hf.get("rope_theta", _ROPE_THETA))}
    if table.get("partial_rotary_factor", 1) != 1:
        problem = f"is {table['partial_rotary_factor']!r}"
        return rope, [ConfigIssue(f"{key}.partial_rotary_factor", problem, "only 1 can be imported")]
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return rope, []
    if kind != "llama3":
        return rope, [
            ConfigIssue(f"{key}.rope_type", f"is {kind!r}", "only 'default' and 'llama3' can be imported")
        ]
    original = "original_max_position_embeddings"
    length = hf.get(original, table.get(original, hf.get("max_position_embeddings")))
    scaling = {name: table[name] for name in _LLAMA3 if name in table}
    return {**rope, "rope_scaling": {**scaling, original: length}}, []
