"""A GPT-2-style decoder (Radford et al. 2019): learned positions, LayerNorm, GELU, dropout, tied output.

Train it from this folder's parent: ``kempnerforge train examples/gpt2.toml``
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. ``mask_B1TT`` tells which tokens attend to which; None means all before."""
        q, k, v = self.qkv(self.norm1(x_BTD)).unflatten(-1, (3, self.heads, -1)).movedim(-2, 1).unbind(-2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TT, is_causal=mask_B1TT is None)
        x_BTD = x_BTD + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x_BTD + self.dropout(self.down(F.gelu(self.up(self.norm2(x_BTD)), approximate="tanh")))


class GPT2(nn.Module):
    """A decoder from token ids to logits."""

    def __init__(
        self, vocab_size: int, width: int, layers: int, heads: int, max_seq_len: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(max_seq_len, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.output.weight = self.tokens.weight
        self.apply(self._init)
        for block in self.blocks:
            nn.init.normal_(block.out.weight, std=0.02 / math.sqrt(2 * layers))
            nn.init.normal_(block.down.weight, std=0.02 / math.sqrt(2 * layers))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """int64 [B, T] -> logits [B, T, V]. With ``document_ids`` [B, T], documents do not see each other."""
        positions, mask_B1TT = torch.arange(tokens_BT.size(1), device=tokens_BT.device), None
        if document_ids is not None:
            same_BTT = (document_ids[:, :, None] == document_ids[:, None, :]).tril()
            positions, mask_B1TT = same_BTT.sum(-1) - 1, same_BTT[:, None]
        x_BTD = self.dropout(self.tokens(tokens_BT) + self.positions(positions))
        for block in self.blocks:
            x_BTD = block(x_BTD, mask_B1TT)
        return self.output(self.norm(x_BTD))
