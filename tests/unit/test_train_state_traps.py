"""Optimizers, models and extras that could come back by half: each comes back whole, or is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.state_steps import Counter, load, save
from torch import nn, optim

from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.errors import MismatchError


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 3)


def step(model: nn.Module, *optimizers: optim.Optimizer) -> None:
    model(torch.ones(2, 3)).square().sum().backward()
    for one in optimizers:
        one.step()
        one.zero_grad()


# -- optimizers ------------------------------------------------------------------------------------------


class Sam(optim.Optimizer):
    """Sharpness-aware minimization as it is usually written: around another optimizer."""

    def __init__(self, params: Any, base: Callable[..., optim.Optimizer]) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        self.base_optimizer.step()


def test_optimizer_around_another_is_refused_alone(tmp_path: Path) -> None:
    model = net()
    sam = Sam(model.parameters(), optim.AdamW)
    with pytest.raises(TypeError, match=r"Sam\.base_optimizer is an optimizer with its own state, AdamW"):
        TrainState(model=model, optimizer=sam)
    state = TrainState(model=model, optimizer={"sam": sam, "base": sam.base_optimizer})
    step(model, sam)
    path = save(tmp_path, state)
    again = net()
    other = Sam(again.parameters(), optim.AdamW)
    load(path, TrainState(model=again, optimizer={"sam": other, "base": other.base_optimizer}))
    for one, two in zip(sam.base_optimizer.state.values(), other.base_optimizer.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], two["exp_avg"])


class WithMore(optim.SGD):
    """Its state_dict has a key of its own."""

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """With the key."""
        return {**super().state_dict(), "n": 5}


class Proxy(optim.SGD):
    """Overrides state_dict and changes nothing, as wrappers of launchers do."""

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The same."""
        return super().state_dict()


def test_optimizer_with_more_than_state_and_groups_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match=r"state_dict\(\) of WithMore has 'n' beside state and param_groups"):
        TrainState(model=model, optimizer=WithMore(model.parameters(), lr=0.1))
    hooked = optim.SGD(model.parameters(), lr=0.1)
    hooked.register_state_dict_post_hook(lambda _, state: {**state, "n": 5})
    with pytest.raises(TypeError, match=r"state_dict\(\) of SGD has 'n'"):
        TrainState(model=model, optimizer=hooked)
    TrainState(model=model, optimizer=Proxy(model.parameters(), lr=0.1))


def test_optimizer_state_in_parameter_memory_fills_no_parameter(tmp_path: Path) -> None:
    """Slow weights that are the parameters themselves until the first step."""

    def begin() -> tuple[nn.Module, optim.Optimizer]:
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            optimizer.state[parameter]["slow"] = parameter.data
        return model, optimizer

    model, optimizer = begin()
    for parameter in model.parameters():
        optimizer.state[parameter]["slow"] = torch.full_like(parameter, 7.0)
    path = save(tmp_path, TrainState(model=model, optimizer=optimizer))
    again, other = begin()
    load(path, TrainState(model=again, optimizer=other))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(float(state["slow"].min()) == 7.0 for state in other.state.values())


@pytest.mark.parametrize("had_state", [True, False])
def test_optimizer_tensor_shared_by_parameters_stays_shared(had_state: bool, tmp_path: Path) -> None:
    def begin(count: float | None) -> tuple[nn.Module, optim.Optimizer]:
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        if count is not None:
            counter = torch.tensor(count)
            for parameter in model.parameters():
                optimizer.state[parameter]["n"] = counter
        return model, optimizer

    model, optimizer = begin(5.0)
    path = save(tmp_path, TrainState(model=model, optimizer=optimizer))
    again, other = begin(1.0 if had_state else None)
    load(path, TrainState(model=again, optimizer=other))
    first, second = (state["n"] for state in other.state.values())
    assert first is second
    assert float(first) == 5.0


@pytest.mark.parametrize("had_state", [True, False])
def test_optimizer_parameter_in_state_stays_one(had_state: bool, tmp_path: Path) -> None:
    """Master weights of higher precision."""

    def begin(value: float | None) -> tuple[nn.Module, optim.Optimizer]:
        model = net()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        if value is not None:
            for parameter in model.parameters():
                optimizer.state[parameter]["master"] = nn.Parameter(torch.full_like(parameter, value))
        return model, optimizer

    model, optimizer = begin(5.0)
    path = save(tmp_path, TrainState(model=model, optimizer=optimizer))
    again, other = begin(1.0 if had_state else None)
    before = [state["master"] for state in other.state.values()]
    load(path, TrainState(model=again, optimizer=other))
    found = [state["master"] for state in other.state.values()]
    assert all(isinstance(one, nn.Parameter) and one.requires_grad for one in found)
    assert all(float(one.min()) == 5.0 for one in found)
    assert all(map(lambda one, two: one is two, before, found))


def test_optimizer_state_that_is_no_table_is_named() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = torch.ones(3)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"optimizer\.state\.weight is a Tensor: .* must be a dict"):
        TrainState(model=model, optimizer=optimizer)


def test_hyperparameters_that_lead_nowhere_are_refused() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'lrr', which no group"):
        TrainState(model=model, optimizer=optimizer, hyperparameters=("lrr",))
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match=r"keeps lr, but the scheduler extra\['s'\] continues from it"):
        TrainState(model=model, optimizer=optimizer, hyperparameters=("lr",), extra={"s": scheduler})


# -- models ----------------------------------------------------------------------------------------------


class Derived(nn.Module):
    """Keeps a Python number that follows from a parameter: set by a hook after a load."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.scale = 1.0
        self.register_load_state_dict_post_hook(lambda module, _: module.take())

    def take(self) -> None:
        """What a load has to do."""
        self.scale = float(self.weight.detach().sum())


class Overriding(nn.Module):
    """The same, by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.scale = 1.0

    def _load_from_state_dict(self, *arguments: Any, **more: Any) -> None:
        super()._load_from_state_dict(*arguments, **more)
        self.scale = float(self.weight.detach().sum())


@pytest.mark.parametrize("kind", [Derived, Overriding])
def test_model_whose_load_has_effects_has_them(kind: type[Any], tmp_path: Path) -> None:
    first, second = kind(), kind()
    model, again = nn.Sequential(first, nn.Linear(2, 2)), nn.Sequential(second, nn.Linear(2, 2))
    with torch.no_grad():
        first.weight.fill_(4.0)
    path = save(tmp_path, TrainState(model=model, optimizer={}))
    load(path, TrainState(model=again, optimizer={}), parts=("model",))
    assert second.scale == 8.0
    assert torch.equal(model.get_parameter("1.weight"), again.get_parameter("1.weight"))


class Recording(nn.Module):
    """Its extra state is a tensor that grows, and nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.seen: Any = None

    def get_extra_state(self) -> Any:
        """What ``state_dict`` has."""
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        """What ``load_state_dict`` gives."""
        self.seen = state


@pytest.mark.parametrize("before", [None, torch.zeros(2), {"a": 1}])
@pytest.mark.parametrize("stored", [None, torch.arange(5.0), {"b": torch.ones(2)}])
def test_model_extra_state_has_form_of_checkpoint(before: Any, stored: Any, tmp_path: Path) -> None:
    model, again = Recording(), Recording()
    model.seen, again.seen = stored, before
    path = save(tmp_path, TrainState(model=model, optimizer={}))
    load(path, TrainState(model=again, optimizer={}), parts=("model",))
    if isinstance(stored, dict):
        assert torch.equal(again.seen["b"], stored["b"])
    else:
        assert again.seen is None if stored is None else torch.equal(again.seen, stored)


class Adapter(nn.Module):
    """Leaves its base out of its state, as adapters do."""

    def __init__(self, *, frozen: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2).requires_grad_(not frozen)
        self.low = nn.Linear(2, 2)
        self.register_state_dict_post_hook(self._drop)

    @staticmethod
    def _drop(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}base.")]:
            del state[name]


def test_model_that_leaves_a_frozen_base_out_is_restored(tmp_path: Path) -> None:
    first, second = Adapter(), Adapter()
    model, again = nn.Sequential(first, Recording()), nn.Sequential(second, Recording())
    base = second.base.weight.clone()
    path = save(tmp_path, TrainState(model=model, optimizer={}))
    load(path, TrainState(model=again, optimizer={}), parts=("model",))
    assert torch.equal(first.low.weight, second.low.weight)
    assert torch.equal(second.base.weight, base)


def test_model_that_leaves_a_trained_parameter_out_refused() -> None:
    model = Adapter(frozen=False)
    with pytest.raises(ValueError, match=r"base\.weight is trained by optimizer=, but state_dict\(\)"):
        TrainState(model=model, optimizer=optim.SGD(model.parameters(), lr=0.1))
    trained = [one for one in Adapter().parameters() if one.requires_grad]
    assert len(trained) == 2
    frozen = Adapter()
    TrainState(model=frozen, optimizer=optim.SGD(frozen.low.parameters(), lr=0.1))


def test_model_with_lazy_parameters_is_named() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight of model= has no shape yet: call the model once"):
        TrainState(model=model, optimizer=optim.AdamW(model.parameters()))


class Versioned(nn.Module):
    """Converts states of version 1, as torchvision's and detectron2's modules do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any, **more: Any
    ) -> None:
        if local_metadata.get("version") is None:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest, **more)


def test_model_versions_are_handed_over(tmp_path: Path) -> None:
    """As ``model=``, as an extra, and inside of one."""
    model, ema, held = nn.Sequential(Versioned()), nn.Sequential(Versioned()), Versioned()
    state = TrainState(
        model=model, optimizer={}, extra={"ema": ema, "own": Counter({"m": held.state_dict()})}
    )
    path = save(tmp_path, state)
    other_model, other_ema, own = nn.Sequential(Versioned()), nn.Sequential(Versioned()), Counter()
    load(path, TrainState(model=other_model, optimizer={}, extra={"ema": other_ema, "own": own}))
    for one in (other_model, other_ema):
        assert torch.equal(one.get_parameter("0.weight"), torch.ones(2))
    assert isinstance(own.value["m"], OrderedDict)
    assert own.value["m"]._metadata == held.state_dict()._metadata  # type: ignore[attr-defined]


def test_capture_beside_a_forward_copies_buffers() -> None:
    linear, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    assert norm.running_mean is not None
    model = nn.Sequential(linear, norm)
    state = TrainState(model=model, optimizer={})
    found = state.capture(overlapping=True).tensors
    want = {name: tensor.clone() for name, tensor in found.items()}
    model(torch.randn(4, 3))
    for name in ("model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked"):
        assert torch.equal(found[name], want[name]), name
    assert found["model.0.weight"].data_ptr() == linear.weight.data_ptr()
    assert state.capture().tensors["model.1.running_mean"].data_ptr() == norm.running_mean.data_ptr()


def test_optimizer_of_another_class_is_refused(tmp_path: Path) -> None:
    model = net()
    path = save(tmp_path, TrainState(model=model, optimizer=optim.AdamW(model.parameters())))
    other = TrainState(model=model, optimizer=optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(MismatchError, match=r"optimizer is SGD here and AdamW in the checkpoint.*load_path"):
        load(path, other)


def test_tied_parameters_need_equal_values(tmp_path: Path) -> None:
    """Saved without the tie: one of the two would be lost."""

    def begin(tied: bool) -> nn.Module:
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        if tied:
            model[1].weight = model[0].weight
        return model

    path = save(tmp_path, TrainState(model=begin(False), optimizer={}))
    with pytest.raises(MismatchError, match=r"model\.0\.weight and model\.1\.weight are one tensor here"):
        load(path, TrainState(model=begin(True), optimizer={}), parts=("model",))


def test_model_that_exports_another_dtype_is_refused() -> None:
    model = net()
    model.register_state_dict_post_hook(
        lambda _module, state, *_: state.update({name: value.half() for name, value in state.items()})
    )
    with pytest.raises(ValueError, match=r"weight is torch\.float32, but state_dict\(\) of model= returns"):
        TrainState(model=model, optimizer=optim.SGD(model.parameters(), lr=0.1))


class Nested(nn.Module):
    """Overrides both methods, as research code does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def state_dict(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        """Nested."""
        return {"net": self.net.state_dict(), "version": 3}

    def load_state_dict(self, state: Any) -> Any:  # type: ignore[override]
        """Its counterpart."""
        assert state["version"] == 3
        return self.net.load_state_dict(state["net"])


def test_model_with_methods_of_its_own_comes_back(tmp_path: Path) -> None:
    model, again = Nested(), Nested()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    path = save(tmp_path, TrainState(model=model, optimizer=optimizer))
    load(path, TrainState(model=again, optimizer=optim.SGD(again.parameters(), lr=0.1)))
    assert torch.equal(model.net.weight, again.net.weight)


def test_numpy_generator_of_another_kind_is_named() -> None:
    before = np.random.get_state(legacy=False)
    numpy_random: Any = np.random  # its types lack ``set_bit_generator``
    try:
        numpy_random.set_bit_generator(np.random.PCG64(1))
        with pytest.raises(TypeError, match="NumPy's global generator is PCG64"):
            TrainState(model=net(), optimizer={}).capture()
    finally:
        numpy_random.set_bit_generator(np.random.MT19937())
        np.random.set_state(before)
