"""Models of a user, for tests. A test copies this file into the folder from which it trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, VOCABULARY = 16, 2, 259


class Scale(nn.Module):
    """A module with its own ``reset_parameters``, which its constructor does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.empty(WIDTH))

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.factor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Layer(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.scale = Scale()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(-2, 1).unbind(-2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dropout(self.scale(self.out(mixed.transpose(1, 2).flatten(2))))


class Plain(nn.Module):
    """A decoder without any optional method.

    The constructor makes a parameter and a buffer of its own, and changes weights of its layers.
    """

    slope: Tensor

    def __init__(self, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(64, WIDTH) * 0.1)
        self.register_buffer("slope", torch.linspace(0.5, 1.0, WIDTH) + torch.rand(1), persistent=False)
        self.layers = nn.ModuleList(Layer(dropout) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.tokens(tokens) + self.positions[: tokens.size(1)]) * self.slope
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class PartlyFrozen(Plain):
    """A decoder that freezes its embedding and its first layer by itself."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        self.tokens.requires_grad_(False)
        self.layers[0].requires_grad_(False)


class Tied(Plain):
    """A decoder whose output layer shares the embedding, with its own ``init_weights``."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__(layers)
        self.head.weight = self.tokens.weight

    def init_weights(self) -> None:
        for param in self.parameters():
            nn.init.normal_(param, std=0.2)


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) + self.down(torch.tanh(self.up(x)))


class Planned(nn.Module):
    """A model, or a pipeline stage of one, that brings all plans."""

    def __init__(self, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.tokens: nn.Embedding | None = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleDict({str(number): Block(dropout) for number in range(layers)})
        self.head: nn.Linear | None = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) if self.tokens is not None else x
        for block in self.blocks.values():
            x = block(x)
        return self.head(x) if self.head is not None else x

    def fsdp_units(self) -> list[nn.Module]:
        return list(self.blocks.values())

    def tp_plan(self) -> dict[str, object]:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        plan: dict[str, object] = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
        return plan

    def pipeline_stages(self, count: int) -> list[nn.Module]:
        names = list(self.blocks)
        size = len(names) // count
        stages = []
        for number in range(count):
            stage = Planned(len(names), self.dropout)
            for name in names:
                if int(name) // size != number:
                    del stage.blocks[name]
            if number > 0:
                stage.tokens = None
            if number < count - 1:
                stage.head = None
            stages.append(stage)
        return stages

    def stage_output_shape(self, batch_size: int, seq_len: int, tp: int) -> tuple[int, ...]:
        return batch_size, seq_len, WIDTH if self.head is None else VOCABULARY

    def flops_per_token(self, seq_len: int) -> int:
        return 6 * sum(param.numel() for param in self.parameters())


class Careless(nn.Module):
    """A model that leaves a parameter uninitialized."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(VOCABULARY, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


class Broken(nn.Module):
    """A model whose constructor raises an error."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        raise ValueError(f"width {width} is odd")


class Flat(nn.Module):
    """A model that returns no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens).sum()
