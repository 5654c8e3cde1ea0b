"""What is handed to ``TrainState`` comes back, or is refused by name."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.optimizers import OPTIMIZERS, Net, each, make, train_step
from support.state_steps import CPU, Counter, load, save
from support.step_maker import write_step
from torch import nn, optim

from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.model_state import ModelState
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.errors import DamagedCheckpointError, MismatchError


def linear(**options: Any) -> TrainState:
    model = nn.Linear(3, 2)
    return TrainState(model=model, optimizer=optim.SGD(model.parameters(), lr=0.1), **options)


def same(a: Any, b: Any) -> bool:
    """Equal in type, and in value to the last bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        as_stored = (a.dtype, a.device, a.requires_grad) == (b.dtype, b.device, b.requires_grad)
        return as_stored and torch.equal(a, b)
    if isinstance(a, Mapping):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


# -- optimizers ------------------------------------------------------------------------------------------


def trained(name: str, steps: int) -> tuple[nn.Module, Any, TrainState]:
    torch.manual_seed(0)
    model = Net()
    optimizer = make(name, model)
    state = TrainState(model=model, optimizer=optimizer)
    torch.manual_seed(1)
    for step in range(steps):
        train_step(model, optimizer, step)
        state.advance()
    return model, optimizer, state


@pytest.mark.parametrize("had_state", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_comes_back_bitwise(name: str, steps: int, had_state: bool, tmp_path: Path) -> None:
    model, optimizer, state = trained(name, steps)
    path = save(tmp_path, state)
    want = copy.deepcopy([one.state_dict() for one in each(optimizer)])
    losses = [train_step(model, optimizer, step) for step in range(steps, steps + 3)]
    other_model, other_optimizer, other = trained(name, 3 if had_state else 0)
    load(path, other)
    assert same(want, [one.state_dict() for one in each(other_optimizer)])
    assert losses == [train_step(other_model, other_optimizer, step) for step in range(steps, steps + 3)]
    assert all(map(torch.equal, model.parameters(), other_model.parameters()))


def test_optimizer_lists_are_named_by_position(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    both = [optim.SGD(part.parameters(), lr=0.1, momentum=0.9) for part in model]
    state = TrainState(model=model, optimizer=both)
    model(torch.ones(1, 2)).sum().backward()
    for one in both:
        one.step()
    assert "optimizers.1.state.1.weight.momentum_buffer" in state.tensors()
    path = save(tmp_path, state)
    with pytest.raises(MismatchError, match="several optimizers by name, this program one optimizer"):
        load(path, TrainState(model=model, optimizer=optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(MismatchError, match=r"\['0', '1'\], this program \['a', 'b'\]"):
        load(path, TrainState(model=model, optimizer={"a": both[0], "b": both[1]}))


def test_optimizer_group_that_is_missing_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = optim.SGD(model[0].parameters(), lr=0.1)
    state = TrainState(model=model, optimizer=optimizer)
    optimizer.add_param_group({"params": model[1].parameters(), "lr": 0.5})
    path = save(tmp_path, state)
    again = optim.SGD(model[0].parameters(), lr=0.3)
    with pytest.raises(
        MismatchError, match=r"2 groups in the checkpoint, 1 here.*1\.weight.*add_param_group"
    ):
        load(path, TrainState(model=model, optimizer=again))
    again.add_param_group({"params": model[1].parameters()})
    load(path, TrainState(model=model, optimizer=again))
    assert [group["lr"] for group in again.param_groups] == [0.1, 0.5]


def test_optimizer_other_order_or_parameters_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = save(tmp_path, TrainState(model=model, optimizer=optim.SGD([model.weight, model.bias], lr=0.1)))
    with pytest.raises(MismatchError, match="another order"):
        load(path, TrainState(model=model, optimizer=optim.SGD([model.bias, model.weight], lr=0.1)))
    with pytest.raises(MismatchError, match="only in the checkpoint bias"):
        load(path, TrainState(model=model, optimizer=optim.SGD([model.weight], lr=0.1)))


@pytest.mark.parametrize("kept", ["checkpoint", ("lr",)])
def test_hyperparameters_kept_by_key(kept: Any, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = save(
        tmp_path, TrainState(model=model, optimizer=optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    )
    optimizer = optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    load(path, TrainState(model=model, optimizer=optimizer, hyperparameters=kept))
    assert optimizer.param_groups[0]["lr"] == (0.1 if kept == "checkpoint" else 0.3)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_tensor_lr_keeps_its_identity(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = save(
        tmp_path, TrainState(model=model, optimizer=optim.AdamW(model.parameters(), lr=torch.tensor(0.1)))
    )
    lr = torch.tensor(0.3)
    optimizer = optim.AdamW(model.parameters(), lr=lr)
    load(path, TrainState(model=model, optimizer=optimizer))
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)


def test_tensor_lr_of_another_dtype_is_not_cast(tmp_path: Path) -> None:
    model, exact = nn.Linear(2, 2), torch.tensor(0.1, dtype=torch.float64)
    path = save(tmp_path, TrainState(model=model, optimizer=optim.AdamW(model.parameters(), lr=exact)))
    optimizer = optim.AdamW(model.parameters(), lr=torch.tensor(0.3))
    load(path, TrainState(model=model, optimizer=optimizer))
    assert same(optimizer.param_groups[0]["lr"], exact)


def test_fresh_optimizer_is_left_without_state() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = TrainState(model=model, optimizer=optimizer)
    before = copy.deepcopy(model.state_dict())
    state.capture()
    assert not optimizer.state
    assert same(before, model.state_dict())


@pytest.mark.parametrize(
    ("make_optimizer", "error", "match"),
    [
        (lambda model: "adam", TypeError, "not str"),
        (lambda model: {"a.b": optim.SGD(model.parameters(), lr=0.1)}, ValueError, r"'a\.b'.*without dots"),
        (lambda model: {"a": model}, TypeError, "not Linear"),
        (
            lambda model: optim.SGD([nn.Parameter(torch.ones(5))]),
            ValueError,
            r"parameter 0 of group 0.*\(5,\).*model=",
        ),
        (
            lambda model: optim.SGD([{"params": model.parameters(), "rule": random}], lr=0.1),
            TypeError,
            r"optimizer\.groups\.0\.rule is a builtins\.module",
        ),
    ],
)
def test_optimizer_refused_at_train_state(make_optimizer: Any, error: type[Exception], match: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=match):
        TrainState(model=model, optimizer=make_optimizer(model))


def test_optimizer_late_parameter_refused_at_save() -> None:
    state = linear()
    (one,) = state.optimizers.values()
    one.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    with pytest.raises(ValueError, match=r"parameter 0 of group 1.*\(7,\)"):
        state.capture()


def test_optimizer_table_of_nonsense_is_damage(tmp_path: Path) -> None:
    state = linear()
    payload = state.capture()
    arrays = {name: tensor.detach().numpy() for name, tensor in payload.tensors.items()}
    for nonsense in (3, {"groups": 7}, {"groups": [{}]}, {"groups": [{"params": 3}]}):
        objects = {**payload.objects, "optimizer": nonsense}
        path = write_step(tmp_path / str(nonsense)[:40], 0, state=arrays, objects=objects)
        with pytest.raises(DamagedCheckpointError, match="invalid content for optimizer"):
            load(path, state)


# -- models ----------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Stores one weight as two that are copies, as fused attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        whole = state.pop(f"{prefix}weight")
        state[f"{prefix}top"], state[f"{prefix}bottom"] = whole[:2].clone(), whole[2:].clone()

    @staticmethod
    def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        parts = [state.pop(f"{prefix}{half}") for half in ("top", "bottom")]
        state[f"{prefix}weight"] = torch.cat(parts)


class WithExtraState(nn.Module):
    """Keeps what is no tensor, and a tensor, beside its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.history: Any = {"amax": torch.zeros(3), "recipe": "none", "calls": 0}

    def get_extra_state(self) -> Any:
        """What ``state_dict`` has."""
        return self.history

    def set_extra_state(self, state: Any) -> None:
        """What ``load_state_dict`` gives."""
        self.history = state


def round_trip(model: nn.Module, again: nn.Module, folder: Path) -> None:
    path = save(folder, TrainState(model=model, optimizer={}))
    load(path, TrainState(model=again, optimizer={}), parts=("model",))


def test_model_hooks_that_copy_are_loaded(tmp_path: Path) -> None:
    model, again = nn.Sequential(Fused(), nn.Linear(4, 2)), nn.Sequential(Fused(), nn.Linear(4, 2))
    round_trip(model, again, tmp_path)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_model_extra_state_is_restored(tmp_path: Path) -> None:
    first, second = WithExtraState(), WithExtraState()
    first.history = {
        "amax": torch.arange(3.0),
        "recipe": "delayed",
        "calls": 5,
        "dtype": torch.float8_e4m3fn,
    }
    round_trip(nn.Sequential(first, nn.Linear(2, 2)), nn.Sequential(second, nn.Linear(2, 2)), tmp_path)
    assert same(first.history, second.history)
    assert torch.equal(first.weight, second.weight)


def test_model_extra_state_missing_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, TrainState(model=nn.Sequential(nn.Linear(2, 2)), optimizer={}))
    both = nn.Sequential(nn.Linear(2, 2), WithExtraState())
    with pytest.raises(MismatchError, match=r"model\.1\._extra_state is not in the checkpoint"):
        load(path, TrainState(model=both, optimizer={}), parts=("model",))


def test_model_wrappers_never_reach_names() -> None:
    class OptimizedModule(nn.Module):  # stands for torch.compile's, which takes a second to import
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    want = list(ModelState(plain).entries())
    wrapped = nn.DataParallel(OptimizedModule(nn.Sequential(plain[0], OptimizedModule(plain[1]))))
    model = ModelState(wrapped)
    assert list(model.entries()) == want
    assert set(model.names().values()) == set(want)
    own = nn.Module()
    own.module = nn.Linear(2, 2)  # a user's own name stays
    assert list(ModelState(own).entries()) == ["module.weight", "module.bias"]


def test_model_parts_with_equal_names_refused() -> None:
    parts = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="two parts of the model have weight"):
        TrainState(model=parts, optimizer={})
    with pytest.raises(TypeError, match="not str"):
        TrainState(model=["x"], optimizer={})  # type: ignore[list-item]
    for nothing in (None, nn.Linear):
        with pytest.raises(TypeError, match="a module or a sequence of modules, not "):
            TrainState(model=nothing, optimizer={})  # type: ignore[arg-type]


def test_model_tied_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    def tied() -> Any:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        return model

    model, again = tied(), tied()
    round_trip(model, again, tmp_path)
    assert torch.equal(model[0].weight, again[1].weight)
    assert again[0].weight is again[1].weight


# -- extras ----------------------------------------------------------------------------------------------


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda one: optim.lr_scheduler.LambdaLR(one, lambda step: 0.9**step),
    "step": lambda one: optim.lr_scheduler.StepLR(one, 2),
    "multistep": lambda one: optim.lr_scheduler.MultiStepLR(one, [2, 4, 4]),
    "constant": lambda one: optim.lr_scheduler.ConstantLR(one),
    "linear": lambda one: optim.lr_scheduler.LinearLR(one),
    "exponential": lambda one: optim.lr_scheduler.ExponentialLR(one, 0.9),
    "cosine": lambda one: optim.lr_scheduler.CosineAnnealingLR(one, 9),
    "restarts": lambda one: optim.lr_scheduler.CosineAnnealingWarmRestarts(one, 3),
    "polynomial": lambda one: optim.lr_scheduler.PolynomialLR(one, 9),
    "cyclic": lambda one: optim.lr_scheduler.CyclicLR(one, 0.01, 0.1, step_size_up=3),
    "onecycle": lambda one: optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=20),
    "sequential": lambda one: optim.lr_scheduler.SequentialLR(
        one, [optim.lr_scheduler.LinearLR(one), optim.lr_scheduler.CosineAnnealingLR(one, 9)], [3]
    ),
    "chained": lambda one: optim.lr_scheduler.ChainedScheduler(
        [optim.lr_scheduler.ConstantLR(one), optim.lr_scheduler.ExponentialLR(one, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_of_torch_comes_back(name: str, tmp_path: Path) -> None:
    def begin() -> tuple[optim.Optimizer, Any, TrainState]:
        model = nn.Linear(2, 2)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        return (
            optimizer,
            scheduler,
            TrainState(model=model, optimizer=optimizer, extra={"scheduler": scheduler}),
        )

    def rates(optimizer: optim.Optimizer, scheduler: Any) -> list[float]:
        found = []
        for _ in range(6):
            optimizer.step()
            scheduler.step()
            found.append(float(optimizer.param_groups[0]["lr"]))
        return found

    optimizer, scheduler, state = begin()
    rates(optimizer, scheduler)
    path = save(tmp_path, state)
    want = rates(optimizer, scheduler)
    again, its_scheduler, other = begin()
    loaded = load(path, other)
    assert rates(again, its_scheduler) == want
    assert list(loaded.targets.extras.loads) == ["scheduler"]


def test_plateau_scheduler_and_scaler_come_back(tmp_path: Path) -> None:
    def begin() -> tuple[Any, TrainState]:
        model = nn.Linear(2, 2)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        extra = {
            "plateau": optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0),  # type: ignore[attr-defined]
            "sampler": torch.Generator().manual_seed(3),
        }
        extra["sampler"] = Counter(extra["sampler"].get_state())
        return extra, TrainState(model=model, optimizer=optimizer, extra=extra)

    extra, state = begin()
    for loss in (1.0, 1.0, 1.0):
        extra["plateau"].step(loss)
    extra["scaler"].load_state_dict({**extra["scaler"].state_dict(), "scale": 4.0})
    path = save(tmp_path, state)
    again, other = begin()
    load(path, other)
    for name in extra:
        assert same(extra[name].state_dict(), again[name].state_dict()), name


VALUES: dict[str, Any] = {
    "parameters": {
        "learnt": nn.Parameter(torch.ones(2)),
        "fixed": nn.Parameter(torch.ones(2), requires_grad=False),
    },
    "leaf": (torch.ones(3, requires_grad=True),),
    "scheduler": {"last": 3, "rates": [0.1, float("inf")], ("a", 1): None, 7: {1, 2}},
    "buffer": {"queue": [torch.arange(6.0).view(2, 3)], "array": np.arange(5000.0), "seed": np.uint64(2**63)},
    "empty": {"text": np.str_(""), "bytes": np.bytes_(b"")},
    "generator": torch.Generator().manual_seed(5).get_state(),
    "nothing": {},
}


def test_extra_values_come_back_exactly(tmp_path: Path) -> None:
    extra = {name: Counter(copy.deepcopy(value)) for name, value in VALUES.items()}
    path = save(tmp_path, linear(extra=extra))
    again = {name: Counter() for name in VALUES}
    loaded = load(path, linear(extra=again))
    array = again["buffer"].value.pop("array")
    assert np.array_equal(array, VALUES["buffer"]["array"])
    array[0] = 7.0  # it can be written to
    want = copy.deepcopy(VALUES)
    del want["buffer"]["array"]
    assert same(want, {name: one.value for name, one in again.items()})
    assert sorted(loaded.targets.extras.loads) == sorted(VALUES)


def test_extra_small_tensors_are_copied_at_capture() -> None:
    tensor = torch.zeros(4)
    payload = linear(extra={"loader": Counter({"seen": tensor})}).capture()
    tensor.fill_(1)
    assert payload.tensors["extra.loader.seen"].sum() == 0


def test_extra_on_one_side_only_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a", linear(extra={"ema": Counter(1)}))
    with pytest.raises(
        MismatchError, match=r"has extra\.ema, which this program lacks.*exclude_from_loading"
    ):
        load(path, linear())
    with pytest.raises(MismatchError, match=r"no extra\.loader, which this program has"):
        load(path, linear(extra={"ema": Counter(), "loader": Counter()}))
    kept = Counter("kept")
    loaded = load(path, linear(extra={"loader": kept}), excluded={"ema", "loader"})
    assert kept.value == "kept"
    assert loaded.targets.extras.excluded == ["ema", "loader"]
    assert not loaded.targets.extras.loads


def test_extra_per_rank_with_other_ranks_is_named(tmp_path: Path) -> None:
    def state(**options: Any) -> TrainState:
        return linear(extra={"loader": Counter({"at": 3})}, **options)

    path = save(tmp_path, state(per_rank=["loader"]), rank=0, num_ranks=2)
    match = r"extra\.loader has a separate state on each rank, of 1 ranks in .*, but there are 2 here"
    with pytest.raises(MismatchError, match=match):
        load(path, state(per_rank=["loader"]), num_ranks=2)
    with pytest.raises(MismatchError, match="saved once for each rank, but is for all ranks here"):
        load(path, state())
    load(path, state(per_rank=["loader"]), num_ranks=1)
    load(path, state(per_rank=["loader"]), num_ranks=2, excluded={"loader"})


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"extra": {"a.b": Counter()}}, ValueError, r"'a\.b'"),
        ({"extra": {"ema": object()}}, TypeError, r"extra\['ema'\] is a object without state_dict"),
        ({"extra": {"ema": Counter()}, "per_rank": "ema"}, TypeError, r"\('ema',\)"),
        ({"per_rank": ["ema"]}, ValueError, "'ema', which is not in extra="),
        ({"extra": [1]}, TypeError, "a dict from names to objects, not a list"),
        ({"extra": {"ema": Counter}}, TypeError, r"extra\['ema'\] is the class Counter: pass an instance"),
        ({"hyperparameters": "config"}, ValueError, "hyperparameters='config'"),
        ({"cursor": 3}, TypeError, "cursor= takes a dataclass or a mapping, not int"),
    ],
)
def test_train_state_refuses_by_name(options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        linear(**options)


def test_extra_that_cannot_be_stored_is_named() -> None:
    state = linear(extra={"loader": Counter({"files": [Path("a")]})})
    with pytest.raises(TypeError, match=r"extra\.loader\.files\.0 is a pathlib"):
        state.capture()


class Drawing(Counter):
    """Draws random numbers to tell its state, as loaders do that begin an iteration."""

    def state_dict(self) -> Any:
        """What it holds."""
        return {"seed": random.random() + float(np.random.rand()) + float(torch.rand(()))}


def test_capture_draws_no_random_numbers() -> None:
    state = linear(extra={"values": Counter(VALUES), "loader": Drawing()})
    before = rng_state.capture(CPU)
    state.capture()
    assert torch.equal(before, rng_state.capture(CPU))
