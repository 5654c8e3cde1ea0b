"""Rows in which several documents stand, a step on them in any layout, and a model that sees each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.tiny_model import CPU, TP_MODEL, FakeBatch, whole
from torch import Tensor

from kempnerforge.config.schema import JobConfig, ModelConfig
from kempnerforge.data.rows import IGNORED
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama
from kempnerforge.train.model_setup import build_model

VOCABULARY = 257
SEQ_LEN = 12
Z = 0.01
_LENGTHS = [[5, 7], [12], [1] * 12, [3, 1, 4, 4], [11, 1], [1, 11], [6, 6], [2, 2, 8]]
_PADDED = {3, 7}
"""The last document of these rows is padding."""
Tree = dict[str, Any]
Found = tuple[dict[str, float], dict[str, Tensor]]


def job_of(distributed: Tree, train: Tree) -> JobConfig:
    return JobConfig.model_validate(
        {
            "data": {"text": "python-stdlib", "document_mask": True},
            "model": TP_MODEL.model_dump() | {"vocab_size": VOCABULARY, "n_layers": 4},
            "distributed": distributed,
            "train": {
                "seq_len": SEQ_LEN,
                "mixed_precision": "fp32",
                "global_batch_size": 8,
                "z_loss": Z,
                **train,
            },
        }
    )


def global_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of the global batch, its targets and its document ids, [8, T] each."""
    tokens = torch.randint(VOCABULARY, (8, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    ids = document_ids(_LENGTHS)
    ends = F.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=False)
    targets = tokens[:, 1:].masked_fill(ends, IGNORED)
    for row in _PADDED:
        targets[row, ids[row] == ids[row, -1]] = IGNORED
    return tokens[:, :-1], targets, ids


def expected_step(config: ModelConfig, seed: int) -> Found:
    """Return the loss, the z-loss and the gradients of a model that sees one document at a time."""
    model = Llama(config)
    init_weights_(model, seed=seed, init_std=config.init_std, n_layers=config.n_layers)
    tokens, targets, _ = global_rows()
    rows = zip(tokens, _LENGTHS, strict=True)
    logits = torch.cat([model(document[None])[0] for row, cut in rows for document in row.split(cut)])
    counts = targets.flatten() != IGNORED
    loss = F.cross_entropy(logits[counts], targets.flatten()[counts])
    z_loss = Z * logits[counts].logsumexp(-1).square().mean()
    (loss + z_loss).backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    return {"loss": loss.item(), "z_loss": z_loss.item(), "eval": loss.item()}, gradients


def one_step(distributed: Tree, train: Tree) -> Found:
    """Return the same of this rank's parts of the model, and the loss of a validation."""
    job = job_of(distributed, train)
    geometry = job.geometry(dist.get_world_size())
    placed = build_model(job, geometry, rank=dist.get_rank(), device=CPU, init_weights=True)
    step = placed.step(
        torch.optim.SGD([param for part in placed.parts for param in part.parameters()]), geometry, job.train
    )
    tokens, targets, ids = (
        rows.chunk(geometry.dp)[geometry.dp_rank(dist.get_rank())].unflatten(
            0, (geometry.accumulation_steps, -1)
        )
        for rows in global_rows()
    )
    batch = FakeBatch(tokens, targets, None, ids)
    step.forward_backward(batch)
    named = [item for part in placed.parts for item in part.named_parameters()]
    gradients = {name: whole(param.grad) for name, param in named if param.grad is not None}
    assert len(gradients) == len(named)
    result = step.update(lr=0.0)
    return {"loss": result.loss, "z_loss": result.z_loss, "eval": step.evaluate([batch])}, gradients


def assert_as_alone(found: list[Found], train: Tree) -> None:
    job = job_of({}, train)
    expected, expected_gradients = expected_step(job.model, job.train.seed)
    names = set()
    for numbers, gradients in found:
        assert numbers == found[0][0]
        assert numbers == pytest.approx(expected, rel=1e-5)
        names |= gradients.keys()
        for name, gradient in gradients.items():
            wanted = expected_gradients[name]
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name
    assert names == expected_gradients.keys()


def document_ids(lengths: Sequence[Sequence[int]]) -> Tensor:
    """Return the document of each token, int32 [B, T], from the lengths of the documents of each row."""
    numbers = (torch.arange(len(row), dtype=torch.int32) for row in lengths)
    rows = [ids.repeat_interleave(torch.tensor(row)) for ids, row in zip(numbers, lengths, strict=True)]
    return torch.stack(rows)


def alone(model: Llama, tokens_BT: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of a model that gets each document in a row of its own, [B, T, V]."""
    rows = zip(tokens_BT, lengths, strict=True)
    return torch.stack([torch.cat([model(doc[None])[0] for doc in row.split([*cut])]) for row, cut in rows])


def gradients(model: Llama, logits: Tensor, targets_BT: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean cross-entropy."""
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED).backward()
    return {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}


def targets_of(tokens_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the next token of each, and IGNORED at the end of each document."""
    targets_BT = F.pad(tokens_BT[:, 1:], (0, 1), value=IGNORED)
    return torch.where(F.pad(ids_BT[:, 1:], (0, 1), value=-1) == ids_BT, targets_BT, IGNORED)
