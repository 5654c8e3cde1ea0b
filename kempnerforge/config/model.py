"""``[model]``: which model to train, and the shape of KempnerForge's own, a Llama-style decoder."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from kempnerforge.config.section import Arguments, AtLeastOne, NonEmpty, Positive, Section

FFN_MULTIPLE_OF = 256
LLAMA = "llama"
COMMON_KEYS = ("name", "args", "freeze")
"""Keys that a model of the user's may have."""


class RopeScalingConfig(Section):
    """Llama 3.1's scaling of rotary frequencies for longer contexts (``rope_type`` "llama3")."""

    factor: Annotated[float, Field(ge=1)]
    """Factor by which the context grows (Llama 3.1: 8)."""

    low_freq_factor: Positive
    """Wavelengths above original_max_position_embeddings / low_freq_factor are scaled by the full
    factor (Llama 3.1: 1)."""

    high_freq_factor: Positive
    """Wavelengths below original_max_position_embeddings / high_freq_factor are not scaled
    (Llama 3.1: 4)."""

    original_max_position_embeddings: AtLeastOne
    """Context length in tokens before scaling (Llama 3.1: 8192)."""


class ModelConfig(Section):
    """The model: KempnerForge's Llama-style decoder, or one of your own.

    All keys but ``name``, ``args`` and ``freeze`` are of "llama".
    """

    name: NonEmpty = LLAMA
    """"llama", or a model of your own: "package.module:attribute", or a name that an installed package
    registers. See docs/guide/own-model.md."""

    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of a model of your own."""

    freeze: list[NonEmpty] = Field(default_factory=list)
    """Regular expressions, searched in the names of parameters, such as ["embeddings"]. Parameters
    that match one are not trained: they have no gradient and no optimizer state, and saves link their
    files instead of writing them again. See docs/guide/checkpoints.md."""

    dim: AtLeastOne = 256
    """Width of the residual stream."""

    n_layers: AtLeastOne = 4
    """Number of decoder layers."""

    n_heads: AtLeastOne = 4
    """Number of query heads."""

    n_kv_heads: AtLeastOne | None = None
    """Number of key and value heads (grouped-query attention). None means n_heads."""

    head_dim: AtLeastOne | None = None
    """Width of one head, an even number. None means dim / n_heads."""

    ffn_hidden_dim: AtLeastOne | None = None
    """Width of the feed-forward layer. None means Llama's rule: 8/3 x dim, rounded up to a multiple
    of 256."""

    vocab_size: AtLeastOne = 257
    """Rows of the embedding, at least the size of the tokenizer's vocabulary (257 for bytes)."""

    max_seq_len: AtLeastOne = 2048
    """Maximum sequence length in tokens."""

    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies (500000 for Llama 3)."""

    rope_scaling: RopeScalingConfig | None = None
    """Llama 3.1's scaling of the rotary frequencies. All four keys are required. None means no
    scaling."""

    norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""

    tie_embeddings: bool = False
    """Use the weights of the embedding for the output layer too."""

    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""

    @model_serializer(mode="wrap")
    def _only_what_applies(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table = handler(self)
        if self.is_llama:
            return {key: value for key, value in table.items() if key != "args"}
        return {key: table[key] for key in COMMON_KEYS if key in table}

    @property
    def is_llama(self) -> bool:
        """Whether it is KempnerForge's own model, which the keys of this section describe."""
        return self.name == LLAMA

    def freezes(self, name: str) -> bool:
        """Return whether ``freeze`` matches the name of a parameter. Its expressions must be valid."""
        return any(re.search(expression, name) for expression in self.freeze)

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids that the model takes; None if a model of the user's does not say.

        It says so by an argument ``vocab_size``.
        """
        if self.is_llama:
            return self.vocab_size
        size = self.args.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def resolved_head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer. Default: Llama's rule (facebookresearch/llama, model.py)."""
        if self.ffn_hidden_dim is not None:
            return self.ffn_hidden_dim
        two_thirds = 2 * (4 * self.dim) // 3
        return -(-two_thirds // FFN_MULTIPLE_OF) * FFN_MULTIPLE_OF

    @property
    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of one decoder layer, by name within it, in the model's order."""
        queries, keys = self.n_heads * self.resolved_head_dim, self.kv_heads * self.resolved_head_dim
        return {
            "attention_norm.weight": (self.dim,),
            "attention.wq.weight": (queries, self.dim),
            "attention.wk.weight": (keys, self.dim),
            "attention.wv.weight": (keys, self.dim),
            "attention.wo.weight": (self.dim, queries),
            "ffn_norm.weight": (self.dim,),
            "feed_forward.w1.weight": (self.ffn_dim, self.dim),
            "feed_forward.w2.weight": (self.dim, self.ffn_dim),
            "feed_forward.w3.weight": (self.ffn_dim, self.dim),
        }

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters; a tied output layer is counted once."""
        layers = self.n_layers * sum(map(math.prod, self.layer_shapes.values()))
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return layers + self.dim + embeddings
