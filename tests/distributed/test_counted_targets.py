"""Targets that do not count, and the loss of each source: equal to plain torch in every layout."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.ranks import RanksFailed, run_ranks
from support.tiny_model import CPU, TP_MODEL, FakeBatch, batch_of_rank, local_step, sharded_model, whole
from torch import Tensor

from kempnerforge.config.schema import JobConfig
from kempnerforge.data.rows import IGNORED
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.train.model_setup import build_model
from kempnerforge.train.step import LocalStep, UpdateResult

VOCABULARY, ROWS, SEQ_LEN = 257, 8, 12
Z = 0.01
SOURCES = [2, 0, 0, 0, 2, 2, 0, 2]
"""Those of the rows of a global batch. Source 1 has none."""
NUM_SOURCES = 3
Tree = dict[str, Any]
Found = tuple[dict[str, Any], dict[str, Tensor]]


def focal(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """A user's loss that leaves out ignored targets."""
    is_counted = targets_BT != IGNORED
    log_p = F.log_softmax(logits_BTV.float(), dim=-1)
    log_p = log_p.gather(-1, targets_BT.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(is_counted, -(log_p.exp() - 1).square() * log_p, 0).sum()


LOSSES: dict[str, Tree] = {
    "plain": {},
    "z": {"z_loss": Z},
    "chunked": {"loss": "chunked_cross_entropy", "loss_args": {"chunk_tokens": 5}, "z_loss": Z},
    "recomputed": {
        "loss": "chunked_cross_entropy",
        "loss_args": {"chunk_tokens": 5, "recompute": True},
        "z_loss": Z,
    },
    "own": {"loss": f"{__name__}:focal"},
}


def tokens_and_targets(pattern: str) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of a global batch, [ROWS, SEQ_LEN], of which some or most are ignored."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (ROWS, SEQ_LEN + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    if pattern == "some":  # a different number in each row, and none in one micro-batch
        targets[torch.rand(targets.shape, generator=generator) < 0.4] = IGNORED
        targets[1] = IGNORED
    elif pattern == "half":  # nothing counts on the first half of the data-parallel ranks
        targets[: ROWS // 2] = IGNORED
        targets[5, 3:] = IGNORED
    elif pattern == "second":  # all count on the first half
        targets[ROWS // 2 :, ::2] = IGNORED
    return inputs, targets


def job_of(distributed: Tree, train: Tree) -> JobConfig:
    tree = {
        "data": {"text": "python-stdlib"},
        "model": TP_MODEL.model_dump() | {"vocab_size": VOCABULARY, "n_layers": 4},
        "distributed": distributed,
        "train": {"seq_len": SEQ_LEN, "mixed_precision": "fp32", "global_batch_size": ROWS, **train},
    }
    return JobConfig.model_validate(tree)


def batch_for(job: JobConfig, inputs: Tensor, targets: Tensor) -> FakeBatch:
    geometry = job.geometry(dist.get_world_size())
    own = geometry.dp_rank(dist.get_rank())
    parts = [
        values.chunk(geometry.dp)[own].unflatten(0, (geometry.accumulation_steps, -1))
        for values in (inputs, targets, torch.tensor(SOURCES))
    ]
    return FakeBatch(parts[0], parts[1], None, sources_AB=parts[2])


def one_step(distributed: Tree, train: Tree, pattern: str, num_sources: int) -> Found:
    """Numbers of a step and of a validation, and the whole gradients of this rank's parts."""
    job = job_of(distributed, train)
    geometry = job.geometry(dist.get_world_size())
    placed = build_model(job, geometry, rank=dist.get_rank(), device=CPU, init_weights=True)
    optimizer = torch.optim.SGD([param for part in placed.parts for param in part.parameters()])
    step = placed.step(optimizer, geometry, job.train, num_sources=num_sources)
    batch = batch_for(job, *tokens_and_targets(pattern))
    if pattern == "second" and dist.get_rank() == 0:  # a mixture of which this rank sees one source
        batch = dataclasses.replace(batch, num_tokens=ROWS * SEQ_LEN)
    returned = step.forward_backward(batch).item()
    named = [item for part in placed.parts for item in part.named_parameters()]
    gradients = {name: whole(param.grad) for name, param in named if param.grad is not None}
    assert len(gradients) == len(named)
    result = step.update(lr=0.0)
    assert result.loss == returned
    assert not result.skipped
    numbers = dataclasses.asdict(result) | {"eval": step.evaluate([batch]), "evaluated": step.num_evaluated}
    return numbers, gradients


def all_cases(distributed: Tree, batch_size: int) -> dict[tuple[str, str], Found]:
    """The results of every loss and pattern, on this rank."""
    return {
        (name, pattern): one_step(distributed, {"batch_size": batch_size, **loss}, pattern, NUM_SOURCES)
        for name, loss in LOSSES.items()
        for pattern in ("some", "half")
        if name != "own" or distributed.get("tp", 1) == 1
    }


def reference(name: str, pattern: str) -> Found:
    """The same in plain torch, from the logits of the targets that count alone."""
    job = job_of({}, {})
    with torch.device("meta"):
        model = Llama(job.model)
    model.to_empty(device="cpu")
    init_weights_(model, seed=job.train.seed, init_std=job.model.init_std, n_layers=job.model.n_layers)
    inputs, targets = tokens_and_targets(pattern)
    logits_RTV = model(inputs)
    counted = targets != IGNORED

    def losses(keep: Tensor) -> Tensor:
        logits, kept = logits_RTV[keep], targets[keep]
        return (
            focal(logits[None], kept[None])
            if name == "own"
            else F.cross_entropy(logits, kept, reduction="sum")
        )

    number = counted.sum()
    loss = losses(counted) / number
    z = Z * logits_RTV[counted].logsumexp(-1).square().sum() / number if "z_loss" in LOSSES[name] else None
    (loss if z is None else loss + z).backward()
    gradients = {key: param.grad for key, param in model.named_parameters() if param.grad is not None}
    norm = torch.cat([gradient.flatten().double() for gradient in gradients.values()]).norm().item()
    of_sources = []
    for source in range(NUM_SOURCES):
        keep = counted & (torch.tensor(SOURCES) == source)[:, None]
        of_sources.append((losses(keep) / keep.sum()).item())
    numbers = {
        "loss": loss.item(),
        "z_loss": 0.0 if z is None else z.item(),
        "grad_norm": norm,
        "num_items": int(number),
        "source_losses": of_sources,
        "eval": loss.item(),
        "evaluated": int(number),
    }
    return numbers, gradients


def assert_equal(found: Found, expected: Found, rel: float) -> None:
    (numbers, gradients), (wanted, wanted_gradients) = found, expected
    for name, value in wanted.items():
        assert numbers[name] == pytest.approx(value, rel=rel, nan_ok=True), name
    for name, gradient in gradients.items():
        exact = wanted_gradients[name]
        assert (gradient - exact).norm() <= 3 * rel * exact.norm(), name


@pytest.mark.parametrize(
    ("ranks", "distributed", "batch_size"),
    [
        pytest.param(1, {}, 8, id="one"),
        pytest.param(2, {}, 2, id="accumulation", marks=pytest.mark.smoke),
        pytest.param(2, {"tp": 2}, 4, id="tp"),
        pytest.param(2, {"pp": 2, "pp_microbatch_size": 2}, 8, id="1f1b"),
        pytest.param(4, {"pp": 2, "pp_schedule": "gpipe"}, 4, id="gpipe-dp"),
        pytest.param(2, {"pp": 2, "pp_schedule": "interleaved_1f1b"}, 8, id="interleaved"),
        pytest.param(4, {"pp": 2, "tp": 2}, 8, id="pp-tp"),
    ],
)
def test_counted_targets_equal_plain_torch_in_every_layout(
    ranks: int, distributed: Tree, batch_size: int
) -> None:
    found = run_ranks(all_cases, ranks, distributed, batch_size)
    for case in found[0]:
        expected = reference(*case)
        for cases in found:
            assert_equal(cases[case], expected, 1e-6)
            assert repr(cases[case][0]) == repr(found[0][case][0])


def test_rank_that_sees_no_ignored_target_counts_with_the_others() -> None:
    for found in run_ranks(one_step, 2, {}, {"batch_size": 4}, "second", NUM_SOURCES):
        assert_equal(found, reference("plain", "second"), 1e-6)


def _both(distributed: Tree, train: Tree) -> tuple[Found, Found]:
    """The same step on targets that all count: counted by the ranks together, and known before."""
    found = []
    for num_tokens in (None, ROWS * SEQ_LEN):
        job = job_of(distributed, train)
        geometry = job.geometry(dist.get_world_size())
        placed = build_model(job, geometry, rank=dist.get_rank(), device=CPU, init_weights=True)
        optimizer = torch.optim.SGD([param for part in placed.parts for param in part.parameters()])
        step = placed.step(optimizer, geometry, job.train)
        batch = dataclasses.replace(batch_for(job, *tokens_and_targets("all")), num_tokens=num_tokens)
        step.forward_backward(batch)
        named = [item for part in placed.parts for item in part.named_parameters()]
        gradients = {name: whole(param.grad) for name, param in named if param.grad is not None}
        found.append((dataclasses.asdict(step.update(lr=0.0)), gradients))
    return found[0], found[1]


@pytest.mark.parametrize("distributed", [{}, {"tp": 2}, {"pp": 2}], ids=["dp", "tp", "pp"])
def test_targets_that_all_count_give_the_bits_of_a_known_number(distributed: Tree) -> None:
    train = {"batch_size": 4, **LOSSES["z"]}
    for (numbers, gradients), (known, known_gradients) in run_ranks(_both, 2, distributed, train):
        assert numbers.pop("num_items") == ROWS * SEQ_LEN
        assert known.pop("num_items") is None
        assert numbers == known
        assert all(torch.equal(gradient, known_gradients[name]) for name, gradient in gradients.items())


def _batch_without_targets() -> tuple[UpdateResult, UpdateResult, UpdateResult, float]:
    """A batch where nothing counts, between two others: their results, and the loss of its validation."""
    model = sharded_model()
    step = local_step(model)
    good = dataclasses.replace(batch_of_rank(0, 2), num_tokens=None)
    empty = dataclasses.replace(good, targets_ABT=torch.full_like(good.targets_ABT, IGNORED))
    step.forward_backward(good)
    first = step.update(lr=0.1)
    before = {name: whole(param) for name, param in model.named_parameters()}
    step.forward_backward(empty)
    assert all(not param.grad.full_tensor().any() for param in model.parameters())  # type: ignore[union-attr]
    skipped = step.update(lr=0.1)
    assert all(torch.equal(whole(param), before[name]) for name, param in model.named_parameters())
    measured = step.evaluate([empty])
    assert step.num_evaluated == 0
    step.forward_backward(good)
    return first, skipped, step.update(lr=0.1), measured


def test_batch_without_counted_targets_is_skipped() -> None:
    for first, skipped, after, measured in run_ranks(_batch_without_targets, 2):
        assert (skipped.skipped, skipped.num_items) == (True, 0)
        assert math.isnan(skipped.loss)
        assert math.isnan(measured)
        assert skipped.grad_norm == 0
        assert not after.skipped
        assert after.loss < first.loss


def _without_numbers_of_sources() -> None:
    model = sharded_model()
    world = dist.group.WORLD
    assert world is not None
    optimizer = torch.optim.SGD(model.parameters())
    step = LocalStep(model, optimizer, device=CPU, group=world, grad_clip_norm=1.0, num_sources=2)
    step.forward_backward(batch_of_rank(0, 1))


def test_sources_without_numbers_of_rows_are_refused() -> None:
    with pytest.raises(RanksFailed, match="the loss of each source needs batches with sources_AB"):
        run_ranks(_without_numbers_of_sources, 1)
