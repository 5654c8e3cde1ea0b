"""Continue a prompt with the model of a checkpoint, on any number of processes.

Every token is computed from all tokens before it, without a cache of keys and values. So any model
with ``forward(tokens [B, T]) -> logits [B, T, V]`` can generate.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import JobConfig
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import MismatchError, NonFiniteError
from kempnerforge.train.environment import set_determinism
from kempnerforge.train.evaluation import load_model, optimizer_for_evaluation
from kempnerforge.train.model_setup import build_model
from kempnerforge.train.optimizer import each, is_schedule_free

_STOPPED, _NOT_FINITE = -1, -2
"""What rank 0 announces in place of a token."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_tokens: int = 200
    temperature: float = 0.8
    """Divides the logits. 0 chooses the most probable token."""
    top_p: float = 0.95
    """Choose among the most probable tokens whose probabilities add up to this (arXiv:1904.09751)."""
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """The tokens to continue, and what the tokenizer knows of the vocabulary."""

    tokens: Sequence[int]
    """At least one."""
    vocab_size: int
    """Ids from this one on have no text, and are never chosen."""
    end_tokens: Collection[int]
    """Ids that end the text."""


def generate(
    job: JobConfig,
    step_folder: Path,
    prompt: Prompt,
    sampling: Sampling,
    on_token: Callable[[int], bool],
) -> int | None:
    """Continue ``prompt`` with the model of ``step_folder``, under the layout of ``job``.

    Rank 0 calls ``on_token`` with each new token at once, except the end token. If it returns False,
    the generation ends. Return the end token, or None if the model chose none. ``job`` has no pipeline
    stages. If the text is longer than ``max_context_len``, the model sees only its end.

    Collective: all ranks. The process groups are joined at the beginning and left at the end.
    Raises CheckpointError and NonFiniteError on all ranks.
    """
    set_determinism(job.train.deterministic)
    world = DistributedContext.start(timeout_s=job.distributed.timeout_s)
    geometry = job.geometry(world.num_ranks)
    model = build_model(job, geometry, rank=world.rank, device=world.device, init_weights=False)
    optimizer = optimizer_for_evaluation(job, model, step_folder, world)
    state = TrainState(
        model=model.parts,
        groups={group.name: group.names for group in model.groups},
        optimizer=optimizer or {},
        device=world.device,
    )
    load_model(step_folder, state, world, parts=("model",), what="kempnerforge generate")
    for schedule_free in filter(is_schedule_free, each(optimizer or {})):
        schedule_free.eval()
    [part] = model.parts
    part.eval()
    try:
        return continue_prompt(
            part,
            prompt,
            sampling,
            on_token,
            control=world.control,
            device=world.device,
            # Tensor parallelism divides the positions among its ranks.
            context_len=max_context_len(job) // geometry.tp * geometry.tp,
            multiple_of=geometry.tp,
        )
    except NonFiniteError:
        raise NonFiniteError(
            f"the logits of {step_folder} are not finite: its weights are unusable"
        ) from None
    finally:
        world.close()


def max_context_len(job: JobConfig) -> int:
    """Return how many tokens the model can see. A model of the user's sees as many as in training."""
    return job.model.max_seq_len if job.model.is_llama else job.train.seq_len


@torch.no_grad()
def continue_prompt(
    model: nn.Module,
    prompt: Prompt,
    sampling: Sampling,
    on_token: Callable[[int], bool],
    *,
    control: ControlGroup,
    device: torch.device,
    context_len: int,
    multiple_of: int = 1,
) -> int | None:
    """Do what ``generate`` does, with a model that is ready. It gets the last ``context_len`` tokens.

    Collective: all ranks of ``control``. Raises NonFiniteError on all ranks.
    """
    choose, tokens, wanted = Chooser(sampling), [*prompt.tokens], True
    for _ in range(sampling.max_tokens):
        logits_V = next_logits(model, tokens[-context_len:], multiple_of=multiple_of, device=device)
        mine = choose(logits_V[: prompt.vocab_size]) if wanted else _STOPPED
        # Rank 0 decides, because devices may round differently.
        [token] = control.agree([mine if control.rank == 0 else _NOT_FINITE - 1])
        if token == _NOT_FINITE:
            raise NonFiniteError("the logits are not finite")
        if token == _STOPPED:
            return None
        if token in prompt.end_tokens:
            return token
        tokens.append(token)
        wanted = control.rank != 0 or on_token(token)
    return None


def next_logits(
    model: nn.Module, tokens: Sequence[int], *, multiple_of: int = 1, device: torch.device
) -> Tensor:
    """Return the logits of the token that follows ``tokens``, fp64 [V] on the CPU.

    The model gets a multiple of ``multiple_of`` tokens. What is added follows ``tokens``, which a
    causal model does not see. Collective: all ranks of a sharded model. Raises MismatchError for
    a model without ``forward``, and for another result than logits.
    """
    to_generate = "To generate text, forward(tokens [B, T]) must return logits [B, T, V]"
    if type(model).forward is nn.Module.forward:
        raise mark_collective(MismatchError(f"{type(model).__name__} has no forward(). {to_generate}"))
    padding = [tokens[-1]] * (-len(tokens) % multiple_of)
    logits_BTV = model(torch.tensor([[*tokens, *padding]], dtype=torch.int64, device=device))
    num_given = len(tokens) + len(padding)
    if not isinstance(logits_BTV, Tensor) or logits_BTV.shape[:-1] != (1, num_given):
        shape = tuple(logits_BTV.shape) if isinstance(logits_BTV, Tensor) else type(logits_BTV).__name__
        raise mark_collective(
            MismatchError(
                f"{type(model).__name__} returned {shape} for tokens [1, {num_given}]. {to_generate}"
            )
        )
    logits_V = logits_BTV[0, len(tokens) - 1]
    if isinstance(logits_V, DTensor):
        logits_V = logits_V.full_tensor()
    return logits_V.to("cpu", torch.float64)


class Chooser:
    """Chooses one token after another. It draws one random number for each, whatever the logits are."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator("cpu").manual_seed(sampling.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """Return the id of the next token, or ``_NOT_FINITE``. ``logits_V``: fp64 [V] on the CPU."""
        if not logits_V.isfinite().all():
            return _NOT_FINITE
        temperature, top_p = self._sampling.temperature, self._sampling.top_p
        if temperature == 0:
            return int(logits_V.argmax())
        # The largest becomes 0, so that no temperature makes it infinite.
        probabilities_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
        sorted_V, ids_V = probabilities_V.sort(descending=True, stable=True)
        sums_V = sorted_V.cumsum(0)
        # The nucleus ends with the token that reaches top_p.
        nucleus = sums_V[: int((sums_V < top_p).sum()) + 1]
        draw = torch.rand((), dtype=torch.float64, generator=self._generator) * nucleus[-1]
        place = int(torch.searchsorted(nucleus, draw, right=True))
        return int(ids_V[min(place, len(nucleus) - 1)])
