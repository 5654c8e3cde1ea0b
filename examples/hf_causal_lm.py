"""Train any causal language model of Hugging Face transformers, from random weights.

``build("qwen3", hidden_size=64, ...)`` returns transformers' own model under a subclass that takes
token ids and returns logits. The names of the parameters are transformers', and so are the initial
weights, so that ``kempnerforge ckpt export --format safetensors`` writes what ``from_pretrained``
reads. Needs ``pip install "transformers>=5.10"``.

Train it from this folder's parent: ``kempnerforge train examples/hf_causal_lm.toml``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


class CausalLM(nn.Module):
    """The methods that KempnerForge calls. ``build`` puts them before those of the model's class.

    ``init_weights()`` is transformers' own.
    """

    config: Any
    _no_split_modules: set[str]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] -> logits [B, T, V]. Keeps no cache of keys and values."""
        return super().forward(input_ids=tokens_BT, use_cache=False).logits  # type: ignore[misc]

    def fsdp_units(self) -> list[nn.Module]:
        """Return the decoder layers: transformers names the classes that no device map may split."""
        units = [module for module in self.modules() if type(module).__name__ in self._no_split_modules]
        within = {inner for unit in units for inner in unit.modules() if inner is not unit}
        return [unit for unit in units if unit not in within]

    def flops_per_token(self, seq_len: int) -> float | None:
        """Return 6N + 12LHQT (PaLM, appendix B), or None for a mixture of experts, which uses a part of N."""
        config = self.config
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            return None
        embedding = self.get_input_embeddings().weight.numel()  # type: ignore[operator]
        looked_up = 0 if config.tie_word_embeddings else embedding
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * seq_len
        return 6 * (sum(param.numel() for param in self.parameters()) - looked_up) + attention


def build(model_type: str, **config: Any) -> nn.Module:
    """Return a model with random weights.

    Args:
        model_type: transformers' name of the architecture, such as "qwen3", "gemma2" or "gpt_neox".
        config: what its configuration class takes, such as ``hidden_size``.
    """
    settings = AutoConfig.for_model(model_type, **config)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    own: Any = type(model)
    model.__class__ = type(own.__name__, (CausalLM, own), {})
    return model
