"""Names, shapes and configuration of Hugging Face's Llama, to and from ours. No torch.

The two agree in everything but the order of rows in the query and key projections. We turn neighbouring
channels (2i, 2i + 1) of a head together, as Meta's weights have it; Hugging Face turns channels i and
i + E / 2 of a head of width E. So its row i is our row 2i, and its row i + E / 2 our row 2i + 1 (``permute``
in transformers' ``convert_llama_weights_to_hf.py``). Values are not touched.
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
_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
"""What transformers takes where a config is silent, as far as it differs from our defaults."""
_ROPE_THETA = 10000.0

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "quantization_config": (),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1,),
}
"""Keys that change what is computed, and the values under which it is what our decoder computes; all of them
may be missing or null."""
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class HfTensor:
    """One weight under both names; the shape is the same in both."""

    name: str
    """Ours, such as ``layers.0.attention.wq.weight``."""
    hf_name: str
    shape: tuple[int, ...]
    row_order: tuple[int, ...] = ()
    """Within every len(row_order) rows, their row i is our row row_order[i]; empty: the same rows."""


def tensor_map(config: ModelConfig) -> list[HfTensor]:
    """All weights of a model, in the order of its layers. A tied output layer is the embedding: no entry."""
    dim, width = config.dim, config.resolved_head_dim
    rotary = (*range(0, width, 2), *range(1, width, 2))
    row_orders = {"attention.wq.weight": rotary, "attention.wk.weight": rotary}
    shapes = config.layer_shapes
    found = [HfTensor(*_EMBEDDING, (config.vocab_size, dim))]
    for layer in range(config.n_layers):
        found += [
            HfTensor(
                f"layers.{layer}.{ours}",
                f"model.layers.{layer}.{theirs}",
                shapes[ours],
                row_orders.get(ours, ()),
            )
            for ours, theirs in _LAYER.items()
        ]
    found.append(HfTensor(*_NORM, (dim,)))
    if not config.tie_embeddings:
        found.append(HfTensor(*_OUTPUT, (config.vocab_size, dim)))
    return found


def redundant_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face names that a folder may have beside ``tensor_map`` -> the name whose bytes they repeat.

    The output layer of a tied model; an empty string for rotary frequencies, which the config determines.
    """
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": "" for layer in range(config.n_layers)}
    tables["model.rotary_emb.inv_freq"] = ""
    return {**tables, _OUTPUT[1]: _EMBEDDING[1]} if config.tie_embeddings else tables


def to_hf_config(config: ModelConfig, *, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """The content of ``config.json`` for ``LlamaForCausalLM``. ``dtype``: a name of torch, as ``bfloat16``.

    Written in the older spelling (``rope_theta``, ``rope_scaling``, ``torch_dtype``), which old and new
    transformers read. Raises ConfigError for a shape that transformers refuses.
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
        # It takes no more, and uses it only for weights that are missing.
        "initializer_range": min(config.init_std, 1.0),
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def from_hf_config(hf: Mapping[str, Any], *, where: str) -> ModelConfig:
    """The model that a ``config.json`` describes. ``where`` is its path, for errors.

    Raises ConfigError with everything for which it is not a Llama that our decoder computes.
    """
    faults = _foreign(hf)
    given = {key: value for key, value in hf.items() if value is not None}
    faults += [ConfigIssue(key, "is missing") for key in _REQUIRED if key not in given]
    rope, rope_faults = _rope(given)
    faults += rope_faults
    known = {**_DEFAULTS, **given}
    tree = {ours: known[theirs] for ours, theirs in _KEYS.items() if theirs in known} | rope
    model: ModelConfig | None = None
    try:
        model = ModelConfig.model_validate(tree)
        faults += check_rules({"model": model})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            ours, *inner = map(str, item["loc"])
            problem = f"{item['input']!r}: {item['msg']}"
            faults.append(ConfigIssue(".".join([_KEYS.get(ours, ours), *inner]), problem))
    if model is None or faults:
        raise ConfigError(faults, where=where)
    return model


def _foreign(hf: Mapping[str, Any]) -> list[ConfigIssue]:
    """What makes it another architecture."""
    faults = []
    if hf.get("model_type") != "llama":
        faults.append(
            ConfigIssue("model_type", f"is {hf.get('model_type')!r}", "only 'llama' can be imported")
        )
    named = hf.get("architectures")
    if named and "LlamaForCausalLM" not in named:
        faults.append(ConfigIssue("architectures", f"are {named!r}", "only LlamaForCausalLM can be imported"))
    for key, allowed in _ALLOWED.items():
        value = hf.get(key)
        if value is not None and value not in allowed:
            can_be = f"only {allowed[0]!r} can be imported" if allowed else "this cannot be imported"
            shown = "{...}" if isinstance(value, dict) else repr(value)
            faults.append(ConfigIssue(key, f"is {shown}", can_be))
    return faults


def _rope(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """``rope_theta`` and ``rope_scaling``, from the new spelling (``rope_parameters``) or the older one."""
    key = "rope_parameters" if "rope_parameters" in hf else "rope_scaling"
    table = hf.get(key, {})
    if not isinstance(table, Mapping):
        return {}, [ConfigIssue(key, f"{table!r} is not a table")]
    found = {"rope_theta": table.get("rope_theta", hf.get("rope_theta", _ROPE_THETA))}
    if table.get("partial_rotary_factor", 1) != 1:
        problem = f"is {table['partial_rotary_factor']!r}"
        return found, [ConfigIssue(f"{key}.partial_rotary_factor", problem, "only 1 can be imported")]
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return found, []
    if kind != "llama3":
        return found, [
            ConfigIssue(f"{key}.rope_type", f"is {kind!r}", "only 'default' and 'llama3' can be imported")
        ]
    return {**found, "rope_scaling": {name: table[name] for name in _LLAMA3 if name in table}}, []
