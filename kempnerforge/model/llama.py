"""A Llama-style decoder (arXiv:2302.13971, arXiv:2407.21783) with the module names of Meta and torchtitan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kempnerforge.config.pipeline_stages import divide_layers
from kempnerforge.model import llama_tensor_parallel
from kempnerforge.model.document_attention import document_mask, positions
from kempnerforge.model.init import init_weights_
from kempnerforge.model.layers import RotaryEmbedding, TransformerBlock

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

    from kempnerforge.config.pipeline_stages import Stage
    from kempnerforge.config.schema import ModelConfig


class Llama(nn.Module):
    """A decoder from token ids to logits, or one pipeline stage of it.

    Build it under ``torch.device("meta")``, shard it, then allocate and initialize it with
    ``kempnerforge.parallel.shard``. With ``tie_embeddings`` there is no ``output``
    module: the shared matrix exists once, as ``tok_embeddings.weight``. ``keep_stage`` reduces it
    to a stage.
    """

    cast_forward_inputs = False
    """Inputs need no cast under mixed precision: the embedding returns bf16, and the rotary tables must
    remain fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.sequence_shards = 1
        """Number of ranks over which tensor parallelism shards the positions between blocks."""
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(config.vocab_size, config.dim)
        self.rope = RotaryEmbedding(config)
        # A dict instead of a list: the layers of a stage keep their numbers.
        self.layers = nn.ModuleDict({str(i): TransformerBlock(config) for i in range(config.n_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def keep_stage(self, stage: Stage) -> None:
        """Remove the modules of other pipeline stages. The remaining ones keep their names."""
        for name in list(self.layers):
            if int(name) not in stage.layers:
                del self.layers[name]
        if not stage.has_embedding:
            self.tok_embeddings = None
        if not stage.has_head:
            self.norm = self.output = None

    def forward(
        self,
        x: Tensor,
        head: Callable[[Tensor, Tensor], Any] | None = None,
        document_ids: Tensor | None = None,
    ) -> Any:
        """int64 [B, T] -> logits [B, T, V].

        With ``document_ids``, integers [B, T] that increase within a row, attention stays within
        documents, and positions begin at 0 in each.

        With ``head``, the result is that of ``head(hidden, weight)`` instead: it gets the input of
        the output layer, [B, T, D], and its weight, [V, D].

        The input of a stage without the embedding and the output of a stage without the output
        layer are [B, T, D]. Under tensor parallelism they have only this rank's T /
        ``sequence_shards`` positions. Raises ValueError when T exceeds ``max_seq_len``.
        """
        seq_len = x.size(1) if self.tok_embeddings is not None else x.size(1) * self.sequence_shards
        if seq_len > self.config.max_seq_len:
            raise ValueError(f"{seq_len} tokens; model.max_seq_len is {self.config.max_seq_len}")
        mask = positions_BT = None
        if document_ids is not None:
            mask, positions_BT = document_mask(document_ids), positions(document_ids)
        cos_TP, sin_TP = self.rope(seq_len, positions_BT)
        x_BTD = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        for block in self.layers.values():
            x_BTD = block(x_BTD, cos_TP, sin_TP, mask=mask)
        if self.norm is None:
            return x_BTD
        x_BTD = self.norm(x_BTD)
        if self.output is not None:
            return self.output(x_BTD) if head is None else head(x_BTD, self.output.weight)
        assert self.tok_embeddings is not None
        return (head or F.linear)(x_BTD, self.tok_embeddings.weight)

    def fsdp_units(self) -> list[nn.Module]:
        """Return the decoder layers, which are sharded one by one."""
        return list(self.layers.values())

    def tp_plan(self) -> dict[str, ParallelStyle]:
        """Return how tensor parallelism shards each module."""
        return llama_tensor_parallel.plan(self)

    def after_tensor_parallel(self, mesh: DeviceMesh) -> None:
        """Set up what ``tp_plan`` cannot express."""
        llama_tensor_parallel.finish(self, mesh)

    def pipeline_stages(self, count: int, sizes: Sequence[int] | None = None) -> list[nn.Module]:
        """Return the model in ``count`` stages, on the meta device.

        ``sizes`` is the number of layers of each. None divides them by ``layer_costs``.
        """
        stages = divide_layers(self.config, count, sizes)
        with torch.device("meta"):
            parts = [Llama(self.config) for _ in stages]
        for part, stage in zip(parts, stages, strict=True):
            part.keep_stage(stage)
        return [*parts]

    def stage_output_shape(self, batch_size: int, seq_len: int, tp: int) -> tuple[int, ...]:
        """Return the shape of what this stage returns for ``batch_size`` sequences on ``tp`` ranks."""
        if self.norm is not None:
            return batch_size, seq_len, self.config.vocab_size
        return batch_size, seq_len // tp, self.config.dim

    def init_shards_(self, seed: int) -> None:
        """Initialize the shards that this rank holds, with the same bits on every layout."""
        init_weights_(self, seed=seed, init_std=self.config.init_std, n_layers=self.config.n_layers)

    def flops_per_token(self, seq_len: int) -> int:
        """Return the model FLOPs per training token, forward and backward, without recomputation.

        This is 6N + 12LHQT of PaLM, appendix B (arXiv:2204.02311), with N weights in matrix
        products, L layers, H heads of width Q, and T = ``seq_len``. N excludes an embedding that is
        only looked up.
        """
        config = self.config
        looked_up = 0 if config.tie_embeddings else config.vocab_size * config.dim
        attention = 12 * config.n_layers * config.n_heads * config.resolved_head_dim * seq_len
        return 6 * (config.num_parameters - looked_up) + attention
