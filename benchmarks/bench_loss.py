"""Peak memory and time of a loss: ``chunked_cross_entropy`` against ``cross_entropy``.

    python benchmarks/bench_loss.py

Both compute the loss of the same hidden states and its gradients for hidden states and output
weight, in fp32, without a model. Peak memory is that of a process that does nothing else, beyond
its memory before the loss: logits, gradients and temporaries. Every figure has a process of its own.
Time is measured in one process, in alternation, at a vocabulary of ``--vocabulary``.

The losses of both must agree to 1e-6. Otherwise the benchmark fails.
"""

from __future__ import annotations

import multiprocessing
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from bench import command, machine, pairs
from torch import Tensor

from kempnerforge.train.losses.chunked_cross_entropy import chunked_cross_entropy
from kempnerforge.train.losses.cross_entropy import cross_entropy

SIZES = {
    "tiny": {
        "vocabulary": 600,
        "tokens": 64,
        "dim": 8,
        "largest": 900,
        "most_tokens": 128,
        "pairs": 2,
    },
    "cpu": {
        "vocabulary": 32000,
        "tokens": 2048,
        "dim": 512,
        "largest": 128256,
        "most_tokens": 8192,
    },
}
GOAL = 1.1
NAMES = ("chunked_cross_entropy", "cross_entropy")


def inputs(vocabulary: int, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, an output weight, and targets."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, dim, generator=generator).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, dim, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (1, tokens), generator=generator)


def run(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
    """Compute a loss and its gradients. Return the mean loss."""
    if name == "cross_entropy":
        loss = cross_entropy(F.linear(hidden, weight), targets)
    else:
        loss, _ = chunked_cross_entropy(hidden, targets, weight)
    mean = loss / targets.numel()
    mean.backward()
    hidden.grad = weight.grad = None
    return mean.item()


def status_bytes(field: str) -> int:
    """Return a size from ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def measure_here(name: str, vocabulary: int, tokens: int, dim: int) -> dict[str, float]:
    """Return the loss, and the bytes by which this process grew at its peak."""
    given = inputs(vocabulary, tokens, dim)
    run(name, *inputs(64, 8, 8))  # loads the libraries that both need
    before = status_bytes("VmRSS")
    loss = run(name, *given)
    return {"loss": loss, "peak_bytes": status_bytes("VmHWM") - before}


def peak(*arguments: str | int) -> dict[str, float]:
    """Measure in a process of its own, forked before this one has computed anything."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure_here, arguments)


def timed(name: str, given: tuple[Tensor, Tensor, Tensor], _pair: int) -> pairs.Measured:
    """Return the seconds of a loss with its gradients."""
    started = time.perf_counter()
    loss = run(name, *given)
    return {"wall_s": time.perf_counter() - started, "loss": loss}


def peaks(vocabularies: list[int], counts: list[int], dim: int) -> list[dict[str, float]]:
    """Measure and print the peak memory of both losses, by vocabulary and tokens."""
    rows = []
    print(f"{'vocabulary':>10} {'tokens':>7} {'cross_entropy':>16} {'chunked':>10}   ratio")
    for vocabulary in vocabularies:
        for tokens in counts:
            found = {name: peak(name, vocabulary, tokens, dim) for name in NAMES}
            check([found[name]["loss"] for name in NAMES])
            chunked, plain = (found[name]["peak_bytes"] for name in NAMES)
            rows.append({"vocabulary": vocabulary, "tokens": tokens, "chunked": chunked, "plain": plain})
            shown = f"{plain / 1e6:>13,.0f} MB {chunked / 1e6:>7,.0f} MB   {chunked / plain:.3f}"
            print(f"{vocabulary:>10} {tokens:>7} {shown}", flush=True)
    return rows


def check(losses: list[float]) -> None:
    """Raise an error if losses differ."""
    if abs(losses[0] - losses[1]) > 1e-6 * abs(losses[1]):
        raise RuntimeError(f"the losses differ: {losses}")


def main() -> None:
    """Measure and print."""
    arguments = command.parse(__doc__, SIZES)
    facts = machine.facts(arguments.dir or Path.cwd())
    print(f"width {arguments.dim}, fp32; {machine.describe(facts)}")
    counts = [arguments.most_tokens // 4, arguments.most_tokens // 2, arguments.most_tokens]
    memory = peaks([arguments.vocabulary, arguments.largest], counts, arguments.dim)
    given = inputs(arguments.vocabulary, arguments.tokens, arguments.dim)
    found = pairs.alternate({name: partial(timed, name, given) for name in NAMES}, arguments.pairs)
    for ours, plain in zip(*found.values(), strict=True):
        check([ours["loss"], plain["loss"]])
    columns = [pairs.column(rows, "wall_s") for rows in found.values()]
    row = pairs.compare("wall_s", *columns, goal=GOAL)
    print(f"{arguments.tokens} tokens, vocabulary {arguments.vocabulary}, {arguments.pairs} pairs")
    pairs.show([row], reference="cross_entropy", others={})
    if arguments.json:
        pairs.write_json(arguments.json, [row], machine=facts, measured=found, memory=memory)


if __name__ == "__main__":
    main()
