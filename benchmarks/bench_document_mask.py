"""Time of a training step with a document mask, against the causal path.

    python benchmarks/bench_document_mask.py

Both compute the loss of the same tokens and its gradients, with the built-in model in one process.
A sequence has 1, 4 or 16 documents of equal lengths. A third arm has the mask as
``scaled_dot_product_attention`` takes it: a boolean matrix of all pairs of tokens. With it the loss must
agree to 1e-4 (fp32) or 1e-2 (bf16). Otherwise the benchmark fails.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from bench import command, machine, pairs
from torch import Tensor

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model import layers
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama

SIZES = {
    "tiny": {"dim": 32, "layers": 1, "heads": 4, "tokens": 128, "device": "cpu", "pairs": 2},
    "cpu": {"dim": 512, "layers": 4, "heads": 8, "tokens": 4096, "device": "cpu", "pairs": 5},
    "gpu": {"dim": 2048, "layers": 8, "heads": 16, "tokens": 16384, "device": "cuda", "pairs": 10},
}
SEQUENCES = (8, 2, 1)
"""Sequences of a step, which divide its tokens."""
DOCUMENTS = (1, 4, 16)
"""Documents in a sequence."""
VOCABULARY = 257


def make(arguments: argparse.Namespace) -> Llama:
    """Return a model with initial weights; bf16 on CUDA, else fp32."""
    config = ModelConfig(
        dim=arguments.dim,
        n_layers=arguments.layers,
        n_heads=arguments.heads,
        vocab_size=VOCABULARY,
        max_seq_len=arguments.tokens,
    )
    model = Llama(config)
    init_weights_(model, seed=0, init_std=0.02, n_layers=arguments.layers)
    if arguments.device == "cuda":
        tables = layers.RotaryEmbedding(config)  # remain fp32
        model.bfloat16().rope = tables
    return model.to(arguments.device)


def step(model: Llama, tokens: Tensor, document_ids: Tensor | None) -> float:
    """Compute a loss and its gradients. Return the loss when the device has finished."""
    logits = model(tokens) if document_ids is None else model(tokens, document_ids=document_ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    model.zero_grad()
    return loss.item()


def matrix_step(model: Llama, tokens: Tensor, document_ids: Tensor) -> float:
    """Do the same with a mask of all pairs of tokens."""
    allowed = (document_ids[:, :, None] == document_ids[:, None, :]).tril()[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor, _mask: object) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.size(1) != k.size(1))

    with mock.patch.object(layers, "document_attention", attend):
        return step(model, tokens, document_ids)


def timed(work: Callable[[], float], _pair: int) -> pairs.Measured:
    """Return the seconds of a step and its loss."""
    started = time.perf_counter()
    loss = work()
    return {"wall_s": time.perf_counter() - started, "loss": loss}


def measure(arguments: argparse.Namespace, model: Llama, seq_len: int) -> list[pairs.Comparison]:
    """Compare all arms at one sequence length. Raises RuntimeError if losses differ."""
    generator = torch.Generator().manual_seed(0)
    shape = arguments.tokens // seq_len, seq_len
    tokens = torch.randint(VOCABULARY, shape, generator=generator).to(arguments.device)
    arms: dict[str, Callable[[], float]] = {"causal": partial(step, model, tokens, None)}
    for count in DOCUMENTS:
        ids_T = torch.arange(seq_len, dtype=torch.int32) // (seq_len // count)
        ids = ids_T.expand(shape).contiguous().to(arguments.device)
        arms[f"{count}"] = partial(step, model, tokens, ids)
        arms[f"{count}, matrix"] = partial(matrix_step, model, tokens, ids)
    found = pairs.alternate({name: partial(timed, work) for name, work in arms.items()}, arguments.pairs)
    allowed = 1e-2 if arguments.device == "cuda" else 1e-4
    for count in DOCUMENTS:
        losses = [found[name][0]["loss"] for name in (f"{count}", f"{count}, matrix")]
        if abs(losses[0] - losses[1]) > allowed:
            raise RuntimeError(f"the losses differ: {losses}")
    causal = pairs.column(found.pop("causal"), "wall_s")
    return [
        pairs.compare(f"{seq_len} tokens, documents: {name}", pairs.column(rows, "wall_s"), causal)
        for name, rows in found.items()
    ]


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    facts = machine.facts(arguments.dir or Path.cwd())
    print(
        f"{arguments.layers} layers of width {arguments.dim}, {arguments.tokens} tokens a step, "
        f"{arguments.pairs} pairs; {machine.describe(facts)}"
    )
    model = make(arguments)
    rows = [row for count in SEQUENCES for row in measure(arguments, model, arguments.tokens // count)]
    pairs.show(rows, reference="causal", others={})
    if arguments.json:
        pairs.write_json(arguments.json, rows, machine=facts)


if __name__ == "__main__":
    main()
