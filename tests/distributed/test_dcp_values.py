"""Leaves and structures of one process: what stock DCP gives back, ours gives back, or refuses by name."""

from __future__ import annotations

import enum
import io
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.dcp_pairs import (
    MODES,
    OURS,
    STOCK,
    WAYS,
    WRITER,
    State,
    assert_same,
    blank,
    compare,
    failure_of,
    load_by,
    load_without_target,
    save_by,
)
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from kempnerforge import AsyncCheckpointer

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32),
    *(torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits: NaNs, infinities, denormals and negative zeros."""
    if dtype is torch.bool:
        return torch.arange(math.prod(shape)).reshape(shape) % 3 == 0
    generator = torch.Generator().manual_seed(5)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def tensors() -> State:
    """Every dtype and every way in which a tensor may lie in memory."""
    base = torch.arange(24.0).reshape(4, 6)
    tied = torch.arange(5.0)
    complex_base = torch.complex(base, base + 1)
    return {
        **{f"dtype.{dtype}": random_bits(dtype, 3, 4) for dtype in DTYPES},
        "scalar": torch.tensor(1.5),
        "scalar_int": torch.tensor(7),
        "empty": torch.empty(0),
        "empty_2d": torch.empty(0, 4),
        "transposed": base.t(),
        "every_second": base[::2, 1::2],
        "view": base.view(-1)[3:9],
        "other_view": base[1],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "tied": tied,
        "tied_too": tied,
        "reversed": base.flip(0),
        "channels_last": torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(base + 2),
        "graph": (nn.Parameter(base + 3) * 2),
        "conjugate": complex_base.conj(),
        "negative": complex_base.conj().imag,
    }


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    compare(tensors, lambda: blank(tensors()), tmp_path)


def strided_targets() -> tuple[State, State]:
    """Targets that are views, and the memory that they are views of."""
    memory = {
        "transposed": torch.full((6, 4), -1.0),
        "columns": torch.full((4, 9), -1.0),
        "steps": torch.full((8, 6), -1.0),
        "conjugate": torch.full((4, 6), -1.0 + 0j),
        "negative": torch.full((4, 6), -1.0 + 0j),
    }
    views = {
        "transposed": memory["transposed"].t(),
        "columns": memory["columns"][:, 2:8],
        "steps": memory["steps"][::2],
        "conjugate": memory["conjugate"].conj(),
        "negative": memory["negative"].conj().imag,
    }
    return views, memory


def test_load_into_views_fills_only_the_view(tmp_path: Path) -> None:
    full = torch.arange(24.0).reshape(4, 6)
    state: State = dict.fromkeys(("transposed", "columns", "steps", "negative"), full)
    state["conjugate"] = torch.complex(full, full + 1)
    seen = []
    for way in (STOCK, "disabled", WRITER):
        save_by(way, dict(state), tmp_path / way)
        views, memory = strided_targets()
        load_by(way, views, tmp_path / way)
        assert_same(views, state, way)
        seen.append(memory)
    for memory in seen[1:]:
        assert_same(memory, seen[0])


def nested() -> State:
    """Containers and leaves that are no tensors, as programs put them into state dicts."""
    return {
        "model": {"layers": {"0": {"w": torch.ones(2, 3)}, "1": {"w": torch.zeros(3)}}},
        "list": [torch.arange(3), {"a": torch.arange(2.0), "b": 2}, [1, [2, "three"]]],
        "tuple": (1, "two", None, (3.0, b"four")),
        "numbers": {
            "int": 2**70,
            "nan": math.nan,
            "inf": -math.inf,
            "zero": -0.0,
            "bool": True,
            "none": None,
        },
        "text": "é\n\x00",
        "bytes": b"\x00\xff",
        "stream": io.BytesIO(b"blob"),
        "numpy": {"f": np.float32(1.5), "i": np.int64(3), "a": np.arange(6, dtype=np.int16).reshape(2, 3)},
        "torch": {"size": torch.Size([2, 3]), "dtype": torch.bfloat16},
        "ordered": OrderedDict(b=torch.ones(1), a=1),
        "betas": [0.9, 0.999],
        "complex": 1 + 2j,
        "param_groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": [2]}],
    }


@pytest.mark.smoke
def test_nested_containers_and_leaves_come_back(tmp_path: Path) -> None:
    compare(nested, lambda: blank(nested()), tmp_path)


def test_state_dict_is_not_changed_by_a_save(tmp_path: Path) -> None:
    for way in OURS:
        state = nested()
        before = {name: id(value) for name, value in state.items()}
        save_by(way, state, tmp_path / way)
        assert {name: id(value) for name, value in state.items()} == before
        assert_same(state, nested(), way)


def test_int_keys_and_empty_containers_come_back(tmp_path: Path) -> None:
    """Stock DCP gives them back because the target has them; so do ours."""

    def state() -> State:
        return {
            "state": {0: {"m": torch.ones(2)}, 1: {"m": torch.zeros(2)}},
            "empty": {"d": {}, "l": []},
            "n": 1,
        }

    def target() -> State:
        return {
            "state": {0: {"m": torch.zeros(2)}, 1: {"m": torch.ones(2)}},
            "empty": {"d": {}, "l": []},
            "n": 0,
        }

    compare(state, target, tmp_path)


class Counter:
    """A Stateful with a tensor, a number and a stream, as training loops have them."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.data = torch.full((3,), float(value))
        self.loads = 0

    def state_dict(self) -> State:
        return {"value": self.value, "data": self.data, "losses": io.BytesIO(bytes([self.value]))}

    def load_state_dict(self, state_dict: State) -> None:
        self.loads += 1
        self.value, self.data = state_dict["value"], state_dict["data"]
        assert state_dict["losses"].getvalue() == bytes([self.value])


class Nothing:
    """A Stateful whose state is empty."""

    def __init__(self) -> None:
        self.loads = 0

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state_dict: State) -> None:
        assert state_dict == {}
        self.loads += 1


def test_stateful_objects_are_loaded_in_place(tmp_path: Path) -> None:
    for way in WAYS:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        save_by(way, {"m": model, "c": Counter(3), "none": Nothing(), "epoch": 4}, tmp_path / way)
        other, counter, none = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), Counter(0), Nothing()
        weight = other[0].weight
        target: State = {"m": other, "c": counter, "none": none, "epoch": 0}
        load_by(way, target, tmp_path / way)
        assert (target["m"], target["c"], target["none"]) == (other, counter, none)
        assert (counter.value, counter.loads, none.loads, target["epoch"]) == (3, 1, 1, 4)
        assert other[0].weight is weight
        assert_same(counter.data, Counter(3).data, way)
        assert_same(other.state_dict(), model.state_dict(), way)


def test_load_keeps_dicts_and_tensors_of_the_target(tmp_path: Path) -> None:
    """Loads fill in place: who holds the dict or the tensor sees the new values."""
    for way in WAYS:
        save_by(way, {"m": {"w": torch.ones(2)}, "o": {"lr": 0.1, "g": {"b": 2}}}, tmp_path / way)
        weight = torch.zeros(2)
        target: State = {"m": {"w": weight}, "o": {"lr": 0.2, "g": {"b": 0}}}
        model, options, group = target["m"], target["o"], target["o"]["g"]
        load_by(way, target, tmp_path / way)
        assert target["m"] is model
        assert target["o"] is options
        assert_same(weight, torch.ones(2), way)
        assert (options["lr"], options["g"] is group, group["b"]) == (0.1, True, 2)


def spoil(value: Any) -> None:
    """Change in place what can be changed in place, at every depth."""
    if isinstance(value, torch.Tensor):
        value.fill_(1) if value.dtype is torch.bool else value.detach().mul_(0).sub_(3)
    elif isinstance(value, np.ndarray):
        value += 5
    elif isinstance(value, io.BytesIO):
        value.write(b"spoilt")
    elif isinstance(value, bytearray):
        value += b"spoilt"
    elif isinstance(value, set):
        value.add("spoilt")
    elif isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value["spoilt"] = 1
    elif isinstance(value, list | tuple):
        for item in value:
            spoil(item)
        if isinstance(value, list):
            value.append("spoilt")


def test_leaves_changed_after_a_save_are_as_at_the_save(tmp_path: Path) -> None:
    def state() -> State:
        large = {"array": np.arange(5000.0), "tensor": torch.arange(300_000.0)}
        inside = (torch.ones(3), [np.arange(3)], {"a": [1]}, torch.arange(300_000.0))
        return {**nested(), "large": large, "inside": inside, "set": {1}, "bytearray": bytearray(b"x")}

    for mode in MODES:
        with AsyncCheckpointer(mode) as checkpointer:
            saved = state()
            checkpointer.save(saved, tmp_path / mode)
            spoil(saved)
        assert "spoilt" in saved
        assert_same(load_without_target(mode, tmp_path / mode), state(), mode)


@pytest.mark.parametrize("keys", [None, "model", "step", {"optimizer.state", "step"}, "optimizer.state.w"])
def test_load_without_target_gives_stock_structure(tmp_path: Path, keys: Any) -> None:
    state = {
        "model": {"w": torch.ones(2), "layers": {"0": {"b": torch.zeros(3)}}},
        "optimizer": {
            "state": {"w": {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": ["w"]}],
        },
        "step": 7,
    }
    save_by(STOCK, dict(state), tmp_path / STOCK)
    wanted = load_without_target(STOCK, tmp_path / STOCK, keys)
    for way in OURS:
        save_by(way, dict(state), tmp_path / way)
        assert_same(load_without_target(way, tmp_path / way, keys), wanted, way)


def failures(
    state: State, target: State, folder: Path, planner: DefaultLoadPlanner | None = None
) -> list[str]:
    """What a load of ``state`` into ``target`` raises, by way."""
    found = []
    for way in (STOCK, "disabled", WRITER):
        if not (folder / way).exists():
            save_by(way, dict(state), folder / way)
        found.append(failure_of(load_by, way, dict(target), folder / way, planner=planner))
    return found


def test_load_of_missing_or_extra_keys_as_stock(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "sub": {"n": 1, "v": torch.ones(3)}}
    for missing in ({"w": torch.zeros(2), "x": torch.zeros(1)}, {"sub": {"n": 0, "y": 3}}):
        stock, *ours = failures(state, missing, tmp_path)
        assert "Missing key in checkpoint state_dict" in stock
        assert ours == [stock, stock]
        for way in (STOCK, "disabled", WRITER):
            target = {**missing, "w": torch.zeros(2)}
            load_by(way, target, tmp_path / way, planner=DefaultLoadPlanner(allow_partial_load=True))
            wanted = {**missing, "w": torch.ones(2)}
            if "sub" in missing:
                wanted["sub"] = {"n": 1, "y": 3}
            assert_same(target, wanted, way)
    for way in (STOCK, "disabled", WRITER):  # extra keys of the checkpoint are passed over
        target = {"sub": {"v": torch.zeros(3)}}
        load_by(way, target, tmp_path / way)
        assert_same(target, {"sub": {"v": torch.ones(3)}}, way)


def test_load_of_other_shape_or_kind_as_stock(tmp_path: Path) -> None:
    state = {"w": torch.ones(2, 3), "n": 5}
    stock, *ours = failures(state, {"w": torch.zeros(3, 2)}, tmp_path)
    assert "ValueError" in stock
    assert "Size mismatch" in stock
    assert ours == [stock, stock]
    stock, *ours = failures(state, {"w": 3}, tmp_path)  # a number where the checkpoint has a tensor
    assert "ValueError" in stock
    assert ours == [stock, stock]
    for way in (STOCK, "disabled", WRITER):  # a tensor where the checkpoint has a number: replaced
        target = {"n": torch.zeros(2)}
        load_by(way, target, tmp_path / way)
        assert target == {"n": 5}


def test_load_of_other_dtype_is_refused_not_cast(tmp_path: Path) -> None:
    """On purpose: stock DCP rounds fp32 to bf16 in silence."""
    stock, *ours = failures({"w": torch.ones(2)}, {"w": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path)
    assert stock == "nothing"
    for found in ours:
        assert "MismatchError" in found
        assert "w is torch.float32" in found


class Colour(enum.Enum):
    RED = 1


class Custom:
    pass


UNSTORABLE: list[Callable[[], Any]] = [
    lambda: Path("/tmp"),
    lambda: Colour.RED,
    Custom,
    lambda: failure_of,
    lambda: torch.ones(2, 2).to_sparse(),
    lambda: torch.empty(2, device="meta"),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: np.array([object()]),
]


@pytest.mark.parametrize("make", UNSTORABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_leaf_that_needs_pickle_is_refused_by_name(tmp_path: Path, make: Callable[[], Any]) -> None:
    """On purpose: stock DCP pickles what it does not know. Ours says which leaf, and writes nothing."""
    for way in OURS:
        found = failure_of(save_by, way, {"sub": {"leaf": make()}, "n": 1}, tmp_path / way)
        assert "TypeError" in found or "ValueError" in found, way
        assert "sub.leaf" in found, way
    # What the writer left, because it learns of the leaf only when it is given it, the next save removes.
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(f".{WRITER}")] == []


def test_sets_come_back_and_stateful_inside_is_refused(tmp_path: Path) -> None:
    compare(
        lambda: {"s": {1, "a"}, "f": {"r": frozenset({2})}}, lambda: {"s": None, "f": {"r": None}}, tmp_path
    )
    for way in OURS:  # stock DCP pickles it: only Statefuls of the first level are asked for their state
        found = failure_of(save_by, way, {"sub": {"model": Counter(1)}}, tmp_path / f"{way}2")
        assert "TypeError" in found
        assert "sub.model" in found


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    for way in WAYS:
        found = failure_of(save_by, way, dict(state), tmp_path / way)
        assert "ValueError" in found, way
        assert "a.b" in found, way


def test_empty_state_dict_saves_and_loads(tmp_path: Path) -> None:
    for way in WAYS:
        save_by(way, {}, tmp_path / way)
        load_by(way, {}, tmp_path / way)
        assert load_without_target(way, tmp_path / way) == {}


def test_save_over_checkpoint_is_refused_stock_overwrites(tmp_path: Path) -> None:
    """On purpose: nothing that was committed is ever replaced."""
    for way in WAYS:
        save_by(way, {"w": torch.ones(2)}, tmp_path / way)
        found = failure_of(save_by, way, {"w": torch.zeros(2)}, tmp_path / way)
        target = {"w": torch.full((2,), 5.0)}
        load_by(way, target, tmp_path / way)
        if way == STOCK:
            assert found == "nothing"
            assert_same(target, {"w": torch.zeros(2)})
        else:
            assert "SaveFailedError" in found
            assert "never replaced" in found
            assert_same(target, {"w": torch.ones(2)}, way)


ODD: dict[str, Callable[[], State]] = {
    "list_of_empty_dicts": lambda: {"a": [{}, {}], "w": torch.ones(2)},
    "surrogate_pair": lambda: {"a": {"text": "\ud83d\ude00", "lone": "\ud83d"}},
    "surrogates_in_tuple": lambda: {"a": ({"\ud83d\ude00": "\ud83d\ude00"},)},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_leaf_comes_back_or_is_refused(tmp_path: Path, kind: str) -> None:
    for way in OURS:
        found = failure_of(save_by, way, ODD[kind](), tmp_path / way)
        if found != "nothing":
            assert "Error" in found
            assert "a" in found.replace("Exception", ""), way
            continue
        wanted = ODD[kind]()
        if (way, kind) == (WRITER, "list_of_empty_dicts"):  # DCP's planner does not show it to the writer
            del wanted["a"]
        assert_same(load_without_target(way, tmp_path / way), wanted, way)


def test_parameter_in_a_tuple_stays_a_parameter(tmp_path: Path) -> None:
    for way in WAYS:
        state = {"p": (nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False))}
        found = failure_of(save_by, way, state, tmp_path / way)
        if found == "nothing":
            first, second = load_without_target(way, tmp_path / way)["p"]
            assert (type(first), first.requires_grad) == (nn.Parameter, True), way
            assert (type(second), second.requires_grad) == (nn.Parameter, False), way
        else:
            assert "TypeError" in found
            assert "p.0" in found


@pytest.mark.parametrize("place", [0, 1, 2])
def test_list_with_an_empty_dict_is_whole_or_refused(tmp_path: Path, place: int) -> None:
    """DCP's planner does not show the writer empty dicts: no load may give a list that lacks one."""
    leaves: list[Any] = [np.arange(3), 5]
    leaves.insert(place, {})
    for way in WAYS:
        save_by(way, {"k": leaves}, tmp_path / way)
        target: State = {"k": [{} if isinstance(item, dict) else None for item in leaves]}
        found = failure_of(load_by, way, target, tmp_path / way)
        if found == "nothing":
            assert_same(target["k"], leaves, way)
        else:
            assert way in (STOCK, WRITER)
            assert "Missing key in checkpoint state_dict: k" in found
