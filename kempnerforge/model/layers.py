"""The modules of a Llama-style decoder.

Shape suffixes: B sequences, T tokens, D model width, H query heads, K key and value heads, E head
width, P rotary pairs (E / 2), F feed-forward width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.model.document_attention import DocumentMask, document_attention

if TYPE_CHECKING:
    from kempnerforge.config.schema import ModelConfig


class RotaryEmbedding(nn.Module):
    """Tables of the rotary position embedding (RoFormer, arXiv:2104.09864).

    The tables are fp32 and computed in fp64 on the CPU, so that every device has the same bits and
    position 100,000 is as exact as position 1. Checkpoints do not contain them: call
    ``reset_buffers`` after ``to_empty``.
    """

    cos_TP: Tensor
    sin_TP: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_seq_len, config.resolved_head_dim // 2)
        self.register_buffer("cos_TP", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("sin_TP", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Recompute the tables in place. Does nothing on the meta device."""
        if self.cos_TP.is_meta:
            return
        positions_T = torch.arange(self.config.max_seq_len, dtype=torch.float64, device="cpu")
        angles_TP = torch.outer(positions_T, rotary_frequencies(self.config))
        self.cos_TP.copy_(angles_TP.cos())
        self.sin_TP.copy_(angles_TP.sin())

    def forward(self, seq_len: int, positions_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of the first ``seq_len`` positions, [T, P] each.

        With ``positions_BT``, int64, return those of these positions, [B, T, P] each.
        """
        if positions_BT is not None:
            return self.cos_TP[positions_BT], self.sin_TP[positions_BT]
        return self.cos_TP[:seq_len], self.sin_TP[:seq_len]


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return the radians per position of every pair of channels, fp64 [P].

    ``rope_scaling`` scales them as Llama 3.1 does (``apply_scaling`` in meta-llama/llama-models,
    ``rope_type = "llama3"`` elsewhere): frequencies of long wavelengths are divided by ``factor``,
    those of short ones do not change, and those between are interpolated.
    """
    head_dim = config.resolved_head_dim
    pairs_P = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    freqs_P = config.rope_theta ** (-pairs_P / head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freqs_P
    turns_P = scaling.original_max_position_embeddings * freqs_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_P) * freqs_P / scaling.factor + smooth_P * freqs_P


def rotate(x_BTHE: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels (2i, 2i + 1) by the angle of its position, in fp32.

    Pairs are neighbours as in Meta's weights. Hugging Face pairs channel i with i + E / 2. Rows with
    positions of their own have tables [B, T, P].
    """
    even_BTHP, odd_BTHP = x_BTHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos_T1P, sin_T1P = cos_TP.unsqueeze(-2), sin_TP.unsqueeze(-2)
    turned = (even_BTHP * cos_T1P - odd_BTHP * sin_T1P, even_BTHP * sin_T1P + odd_BTHP * cos_T1P)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_BTHE.dtype)


class Attention(nn.Module):
    """Causal self-attention. Groups of query heads share a key and value head (GQA, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.resolved_head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * self.head_dim, config.dim, bias=False)

    def forward(
        self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, *, mask: DocumentMask | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]. With ``mask``, attention stays within documents."""
        q_BTHE = rotate(self.wq(x_BTD).unflatten(-1, (-1, self.head_dim)), cos_TP, sin_TP)
        k_BTKE = rotate(self.wk(x_BTD).unflatten(-1, (-1, self.head_dim)), cos_TP, sin_TP)
        v_BTKE = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BHTE, k_BKTE, v_BKTE = q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
        if mask is not None:
            mixed_BHTE = document_attention(q_BHTE, k_BKTE, v_BKTE, mask)
        else:
            mixed_BHTE = F.scaled_dot_product_attention(
                q_BHTE,
                k_BKTE,
                v_BKTE,
                is_causal=True,
                # Not every kernel supports it, so it is set only where heads are shared.
                enable_gqa=q_BTHE.size(2) != k_BTKE.size(2),
            )
        return self.wo(mixed_BHTE.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): a gated feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class TransformerBlock(nn.Module):
    """One decoder layer: attention and feed-forward, each with a norm before it and a residual connection."""

    uses_random_numbers = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x_BTD: Tensor, cos_TP: Tensor, sin_TP: Tensor, *, mask: DocumentMask | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]. With ``mask``, attention stays within documents."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TP, sin_TP, mask=mask)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))
