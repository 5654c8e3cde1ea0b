"""A vision transformer (Dosovitskiy et al. 2021) with its own loss, and a dataset of synthetic images.

Train it from this folder's parent: ``kempnerforge train examples/vit.toml``
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stripes:
    """Images of stripes, [3, size, size], whose class is their direction.

    Everything random about an image is derived from its index, so that a resumed run sees the same.
    """

    def __init__(
        self, count: int, size: int = 32, classes: int = 8, noise: float = 1.0, seed: int = 0
    ) -> None:
        self.count, self.size, self.classes, self.noise, self.seed = count, size, classes, noise, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        random = np.random.default_rng([self.seed, index])
        label = int(random.integers(self.classes))
        angle = np.pi * label / self.classes
        y, x = np.mgrid[: self.size, : self.size]
        waves = np.sin(0.6 * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 2 * np.pi))
        image = waves + self.noise * random.standard_normal((3, self.size, self.size))
        return {"images": image.astype(np.float32), "labels": label}


class Block(nn.Module):
    """Attention over all patches and a feed-forward layer, each with a norm and a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BPD: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, D]."""
        q, k, v = self.qkv(self.norm1(x_BPD)).unflatten(-1, (3, self.heads, -1)).movedim(-2, 1).unbind(-2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x_BPD = x_BPD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BPD + self.down(F.gelu(self.up(self.norm2(x_BPD))))


class ViT(nn.Module):
    """A classifier of images. P patches of ``patch`` x ``patch`` pixels, classes from their mean."""

    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.num_patches = (size // patch) ** 2
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(self.num_patches, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 3, size, size] -> scores [B, classes]."""
        # The values of a batch keep their dtype. Under bf16 the weights are bf16 here.
        x_BPD = self.patches(images.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        x_BPD = x_BPD + self.positions
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return self.head(self.norm(x_BPD).mean(dim=1))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Return the cross-entropy, summed over the images, and their number."""
        scores = self(batch["images"])
        return F.cross_entropy(scores.float(), batch["labels"], reduction="sum"), len(scores)

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs per image, forward and backward: the item here. ``seq_len`` has no meaning."""
        weights = sum(param.numel() for block in self.blocks for param in block.parameters())
        attention = 2 * len(self.blocks) * self.num_patches * self.positions.size(1)
        return 6.0 * self.num_patches * (weights + self.patches.weight.numel() + attention)
