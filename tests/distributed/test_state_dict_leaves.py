"""Every kind of leaf comes back equal, or is refused by name before anything is written."""

from __future__ import annotations

import collections
import datetime
import enum
import io
import itertools
import pathlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.state_trees import Wrapper, blank, nested, same
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import save

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.save.dcp_writer import SafetensorsWriter
from kempnerforge.errors import MismatchError, SaveFailedError

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed", "ignore:The PyTorch API of nested", "ignore:Sparse CSR", "ignore:.*quantize"
)

Leaf = Callable[[], Any]


class Named(torch.Tensor):
    """A subclass with memory of its own."""


class Color(enum.Enum):
    RED = 1


def floats(*shape: int) -> torch.Tensor:
    return torch.arange(float(np.prod(shape))).reshape(shape) - 2.5


def stateful_buffer() -> io.BytesIO:
    buffer = io.BytesIO(b"some bytes")
    buffer.seek(4)
    return buffer


def cycle() -> list[Any]:
    one: list[Any] = [1]
    one.append(one)
    return one


TENSORS: dict[str, Leaf] = {
    "plain": lambda: floats(3, 4),
    "transposed": lambda: floats(3, 4).t(),
    "strided": lambda: floats(6, 4)[::2, 1:],
    "expanded": lambda: floats(1, 3).expand(4, 3),
    "overlapping": lambda: floats(5).as_strided((3, 3), (1, 1)),
    "zero dim": lambda: torch.tensor(4.5),
    "empty": lambda: torch.empty(0, 4),
    "nan bits": lambda: torch.tensor([float("nan"), -float("nan"), float("inf"), -0.0]),
    "conj": lambda: torch.complex(floats(4), floats(4) + 1).conj(),
    "conj zero dim": lambda: torch.tensor(1 + 2j).conj(),
    "neg": lambda: torch.complex(floats(4), floats(4)).conj().imag,
    "parameter": lambda: torch.nn.Parameter(floats(3)),
    "subclass with memory": lambda: floats(5).as_subclass(Named),
    "complex64": lambda: torch.complex(floats(3), floats(3)),
    "float8_e4m3fn": lambda: floats(4).to(torch.float8_e4m3fn),
    "float8_e5m2": lambda: floats(4).to(torch.float8_e5m2),
    "float8_e4m3fnuz": lambda: floats(4).to(torch.float8_e4m3fnuz),
    "float8_e5m2fnuz": lambda: floats(4).to(torch.float8_e5m2fnuz),
    "uint16": lambda: torch.arange(5).to(torch.uint16),
    "uint64": lambda: torch.arange(5).to(torch.uint64),
    "bool": lambda: torch.tensor([True, False]),
}
VALUES: dict[str, Leaf] = {
    "none": lambda: None,
    "bool value": lambda: True,
    "int": lambda: -(2**80),
    "float": lambda: 0.1,
    "nan": lambda: float("nan"),
    "complex": lambda: complex(1, float("inf")),
    "text": lambda: 'a "__tensor__" \ud800 \0',
    "bytes": lambda: b"\x00\xff",
    "bytearray": lambda: bytearray(b"ab"),
    "BytesIO": stateful_buffer,
    "numpy scalar": lambda: np.float16(1.5),
    "numpy bool": lambda: np.bool_(True),
    "numpy datetime": lambda: np.datetime64("2026-01-02"),
    "numpy array": lambda: np.arange(6, dtype=">i2").reshape(2, 3),
    "large numpy array": lambda: np.arange(5000.0).reshape(50, 100),
    "empty numpy array": lambda: np.empty((0, 3), np.float32),
    "Size": lambda: torch.Size([2, 3]),
    "dtype": lambda: torch.bfloat16,
    "device": lambda: torch.device("cuda", 1),
    "tuple": lambda: (1, "a", (2.5, None)),
    "tuple with tensors": lambda: (floats(3), 7, {"inner": floats(2).bfloat16()}),
    "list in a tuple": lambda: ([floats(2)], [1]),
    "list of values": lambda: [1, [2, "a"], (3,)],
    "list of tuples": lambda: [(floats(2), 1), (floats(3), 2)],
    "empty list": list,
    "empty tuple": tuple,
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({"a"}),
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "Counter in a list": lambda: [(collections.Counter("aab"),)],
    "defaultdict in a tuple": lambda: (collections.defaultdict(list, a=[1]),),
    "OrderedDict in a tuple": lambda: (collections.OrderedDict(b=1, a=2),),
    "int keys in a tuple": lambda: ({1: "a", (2, 3): "b"},),
    "dict": lambda: {"a": 1, "b": {"c": floats(2)}},
    "dict with dots": lambda: {"a.b": floats(2), "a": {"b.c": 1, "d": 2}},
    "int keys": lambda: {0: floats(2), 1: {"a": 3}},
    "empty dict": dict,
    "empty dicts within": lambda: {"a": {}, "b": [floats(1), {}, {"c": {}}], "d": {"lr": 1}},
    "list of tensors": lambda: [floats(2), 3, None, floats(1)],
    "list of dicts": lambda: [{"a": floats(2)}, {"b": 2}],
    "list of empty dicts": lambda: [{}, {}],
    "empty dicts beside values": lambda: [{}, 3, [{}, 1]],
    "empty lists, empty dicts within": lambda: [[], [{}], []],
    "surrogate pairs": lambda: ({"\ud83d\ude00": "a\ud83d\ude00"}, "\U0001f600"),
    "parameter in a tuple": lambda: (torch.nn.Parameter(floats(2)), 1),
    "list of lists": lambda: [[floats(2)], [[floats(1)], 3]],
}
REFUSED: dict[str, tuple[Leaf, str]] = {
    "wrapper": (lambda: Wrapper(floats(3)), r"leaf is a .*Wrapper, which has no memory of its own"),
    "wrapper in a tuple": (lambda: (1, Wrapper(floats(3))), r"leaf\.1 is a .*Wrapper"),
    "meta": (lambda: torch.empty(2, device="meta"), r"leaf is on the meta device"),
    "coo": (lambda: floats(3).to_sparse(), r"leaf has layout torch\.sparse_coo"),
    "csr": (lambda: floats(3, 3).to_sparse_csr(), r"leaf has layout torch\.sparse_csr"),
    "coo in a tuple": (lambda: (floats(3).to_sparse(),), r"leaf\.0 has layout torch\.sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([floats(2), floats(3)]), r"leaf is a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([floats(2), floats(3)], layout=torch.jagged),
        r"leaf is a nested tensor",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(floats(3), 0.1, 0, torch.qint8),
        r"leaf is quantized",
    ),
    "mkldnn": (lambda: floats(3).to_mkldnn(), r"leaf has layout torch\._mkldnn"),
    "lazy parameter": (torch.nn.UninitializedParameter, r"leaf is not initialized"),
    "complex128": (lambda: torch.zeros(2, dtype=torch.complex128), r"leaf has dtype torch\.complex128"),
    "float8_e8m0fnu": (
        lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        r"leaf has dtype torch\.float8_e8m0fnu",
    ),
    "path": (lambda: pathlib.Path("/a"), r"leaf is a pathlib\.PosixPath"),
    "enum": (lambda: Color.RED, r"leaf is a .*Color"),
    "date": (lambda: datetime.date(2026, 1, 2), r"leaf is a datetime\.date"),
    "function": (lambda: floats, r"leaf is a builtins\.function"),
    "numpy objects": (lambda: np.array([None]), r"leaf is a numpy array"),
    "numpy records": (lambda: np.zeros(2, "i4,f4"), r"leaf is a numpy array"),
    "path in a list": (lambda: [1, [pathlib.Path("/")]], r"leaf\.1\.0 is a pathlib"),
    "holds itself": (cycle, r"leaf.* is nested more than 200 deep, or holds itself"),
}
NAMES: dict[str, tuple[Any, str]] = {
    "surrogate": ({"a\ud800": floats(1)}, r"a\\ud800.*lone surrogates"),
    "long": ({"é" * 40_000: floats(1)}, r"the name has 80000 bytes, of at most 65535"),
    "long and flat": ({"n" * 70_000: floats(1), "b": floats(2)}, r"nnn.*\(70000 characters\)"),
    "metadata": ({"__metadata__": floats(1)}, r"__metadata__ is reserved"),
    "paths": ({"__paths__": 1}, r"__paths__ is reserved"),
    "nul": ({"a\0b": floats(1)}, r"a\\x00b.* NUL"),
    "nul of an object": ({"a": {"b\0": 1}}, r"b\\x00.* NUL"),
    "nul of an empty dict": ({"a": {"b\0": {}}}, r"b\\x00.* NUL"),
    "two of one name": ({"a.b": floats(1), "a": {"b": floats(2)}}, r"two leaves are called a\.b"),
    "int and text": ({1: floats(1), "1": floats(2)}, r"two leaves are called 1"),
    "in a tuple too": ({"a": (floats(1),), "a.0": floats(2)}, r"two leaves are called a\.0"),
}


@pytest.fixture
def checkpointer() -> Iterator[AsyncCheckpointer]:
    with AsyncCheckpointer() as made:
        yield made


def tree(leaf: Any) -> dict[str, Any]:
    return {"model": {"w": floats(2, 2)}, "leaf": leaf, "last": 3}


def assert_comes_back(path: Path, state: dict[str, Any]) -> None:
    """With a target and without one."""
    target = blank(state)
    load(target, storage_reader=SafetensorsReader(path))
    expected = nested(state)
    assert same(nested(target), expected), target
    made = _load_state_dict_from_keys(storage_reader=SafetensorsReader(path))
    assert made.keys() == expected.keys()
    assert same({key: made[key] for key in expected}, expected) or same(_sorted(made), _sorted(expected)), (
        made
    )


def _sorted(value: Any) -> Any:
    """Without a target, DCP puts dicts together in the order of names."""
    if type(value) is dict:
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(child) for child in value] if type(value) is list else value


@pytest.mark.parametrize("kind", [*TENSORS, *VALUES])
def test_leaf_of_each_kind_comes_back_equal(
    kind: str, tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    state = tree({**TENSORS, **VALUES}[kind]())
    checkpointer.save(state, tmp_path / "c")
    assert_comes_back(tmp_path / "c", state)


@pytest.mark.parametrize("kind", REFUSED)
def test_leaf_that_cannot_be_held_is_refused_by_name(
    kind: str, tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    make, message = REFUSED[kind]
    with pytest.raises((TypeError, ValueError), match=message):
        checkpointer.save(tree(make()), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", NAMES)
def test_name_that_cannot_be_held_is_refused(
    kind: str, tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    state, message = NAMES[kind]
    with pytest.raises(ValueError, match=message):
        checkpointer.save(state, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_dict_of_int_keys_is_flat_text(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    checkpointer.save({0: floats(2), 1: floats(3)}, tmp_path / "c")
    loaded = {"0": torch.zeros(2), "1": torch.zeros(3)}
    load_tensors(loaded, SafetensorsReader(tmp_path / "c"))
    assert same(loaded, {"0": floats(2), "1": floats(3)})


@pytest.mark.parametrize("kind", [kind for kind in (*TENSORS, *VALUES) if "empty dict" not in kind])
def test_storage_writer_leaf_of_each_kind_comes_back(kind: str, tmp_path: Path) -> None:
    """But for empty dicts, which DCP's planner drops before a writer sees them."""
    state = tree({**TENSORS, **VALUES}[kind]())
    save(state, storage_writer=SafetensorsWriter(tmp_path / "c"))
    assert_comes_back(tmp_path / "c", state)


BY_DCP = {"holds itself", "lazy parameter", "mkldnn", "csr", "nested", "jagged", "quantized"}
"""DCP's planner raises before a writer sees them."""


@pytest.mark.parametrize("kind", sorted(set(REFUSED) - BY_DCP))
def test_storage_writer_refuses_leaf_by_name(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CheckpointException, match=message):
        save(tree(make()), storage_writer=SafetensorsWriter(tmp_path / "c"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a\ud800", "n" * 70_000, "__metadata__", "a\0b"])
def test_storage_writer_refuses_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"surrogates|bytes|reserved|NUL"):
        save({name: floats(2)}, storage_writer=SafetensorsWriter(tmp_path / "c"))
    assert list(tmp_path.iterdir()) == []


TARGETS: dict[str, Leaf] = {
    "conj": lambda: torch.zeros(4, 3, dtype=torch.complex64).conj(),
    "conj narrowed": lambda: torch.zeros(8, 6, dtype=torch.complex64).conj()[::2, ::2],
    "transposed": lambda: torch.zeros(3, 4, dtype=torch.complex64).t(),
    "subclass": lambda: torch.zeros(4, 3, dtype=torch.complex64).as_subclass(Named),
    "gradient": lambda: torch.zeros(4, 3, dtype=torch.complex64, requires_grad=True),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_load_target_of_each_kind_has_right_values(
    kind: str, tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    values = torch.complex(floats(4, 3), floats(4, 3) + 1)
    checkpointer.save({"w": values}, tmp_path / "c")
    for number in range(2):
        target = TARGETS[kind]()
        if number:
            load({"w": target}, storage_reader=SafetensorsReader(tmp_path / "c"))
        else:
            load_tensors({"w": target}, SafetensorsReader(tmp_path / "c"))
        assert torch.equal(target.detach().as_subclass(torch.Tensor), values)


def test_load_target_with_neg_bit_has_right_values(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    checkpointer.save({"w": floats(4), "s": torch.tensor(2.0)}, tmp_path / "c")
    target = torch.zeros(4, dtype=torch.complex64).conj().imag
    scalar = torch.zeros((), dtype=torch.complex64).conj().imag
    assert target.is_neg()
    load_tensors({"w": target, "s": scalar}, SafetensorsReader(tmp_path / "c"))
    assert torch.equal(target, floats(4))
    assert float(scalar) == 2.0


@pytest.mark.parametrize("by_dcp", [False, True])
def test_load_target_that_shares_memory_fits_or_raises(
    by_dcp: bool, tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    checkpointer.save({"alike": floats(1, 3).expand(4, 3), "other": floats(4, 3)}, tmp_path / "c")

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        if by_dcp:
            load(tensors, storage_reader=SafetensorsReader(tmp_path / "c"))
        else:
            load_tensors(tensors, SafetensorsReader(tmp_path / "c"))

    target = torch.zeros(1, 3).expand(4, 3)
    fill({"alike": target})
    assert torch.equal(target, floats(1, 3).expand(4, 3))
    for shared in (torch.zeros(1, 3).expand(4, 3), torch.zeros(9).as_strided((4, 3), (2, 1))):
        with pytest.raises(
            (MismatchError, CheckpointException), match=r"other: elements of the tensor to fill share"
        ):
            fill({"other": shared})


@pytest.mark.parametrize("by_dcp", [False, True])
@pytest.mark.parametrize("make", [Wrapper, lambda _: torch.empty(5000, 2, device="meta")])
def test_load_into_tensor_without_memory_is_refused(
    make: Callable[[torch.Tensor], torch.Tensor],
    by_dcp: bool,
    tmp_path: Path,
    checkpointer: AsyncCheckpointer,
) -> None:
    checkpointer.save({"a": floats(3), "w": floats(5000, 2)}, tmp_path / "c")
    target = {"a": torch.zeros(3), "w": make(torch.zeros(5000, 2))}
    if by_dcp and target["w"].is_meta:
        pytest.skip("dcp.load makes its own tensors for those")
    reader = SafetensorsReader(tmp_path / "c")
    with pytest.raises((TypeError, CheckpointException), match=r"w is .*cannot be filled"):
        load(target, storage_reader=reader) if by_dcp else load_tensors(target, reader)
    assert not target["a"].any()


@pytest.fixture
def plan_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP keeps plans on the class."""
    for name in [name for name in vars(SavePlanner) if name.startswith("_cached")]:
        monkeypatch.setattr(SavePlanner, name, {})


@pytest.mark.usefixtures("plan_caches")
@pytest.mark.parametrize("one_writer", [False, True])
def test_storage_writer_with_cached_plans_saves(one_writer: bool, tmp_path: Path) -> None:
    """Unchanged plans, changed ones, and a dtype that DCP's comparison does not see."""
    states: list[dict[str, Any]] = [
        {"w": floats(3), "n": {"epoch": 1}},
        {"w": floats(3) + 1, "n": {"epoch": 2}},
        {"w": floats(3) + 2, "n": {"epoch": 3}, "more": floats(2)},
        {"w": floats(3) + 3, "n": {"epoch": 4}, "more": floats(2)},
        {"w": (floats(3) + 4).double(), "n": {"epoch": 5}, "more": floats(2)},
    ]
    writer = SafetensorsWriter(tmp_path / "none")
    for number, state in enumerate(states):
        path = tmp_path / f"c{number}"
        if one_writer:
            writer.reset(path)
        used = writer if one_writer else SafetensorsWriter(path)
        save(state, storage_writer=used, planner=DefaultSavePlanner(enable_plan_caching=True))
        assert_comes_back(path, state)


def test_storage_writer_without_lookup_refuses_leaf(tmp_path: Path) -> None:
    class Planner(DefaultSavePlanner):
        lookup_object = None  # type: ignore[assignment]

    with pytest.raises(CheckpointException, match="epoch is not a tensor, and Planner has no lookup_object"):
        save({"epoch": 1}, storage_writer=SafetensorsWriter(tmp_path / "c"), planner=Planner())


def test_load_from_keys_gives_part_of_nested_state(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    state = {
        "model": {"layers.0.w": floats(2), "empty": {}},
        "optim": {"state": {"layers.0.w": {"step": 3, "m": floats(2)}}, "groups": [{"lr": 0.1}, {}]},
        "pair": (floats(1), 2),
    }
    checkpointer.save(state, tmp_path / "c")
    reader = SafetensorsReader(tmp_path / "c")
    found = _load_state_dict_from_keys({"optim"}, storage_reader=reader)
    assert same(_sorted(found), _sorted({"optim": state["optim"]}))
    found = _load_state_dict_from_keys({"model", "pair"}, storage_reader=reader)
    assert same(_sorted(found), _sorted({"model": state["model"], "pair": state["pair"]}))
    assert reader.read_metadata().planner_data["optim.state.layers.0.w.m"] == (
        "optim",
        "state",
        "layers.0.w",
        "m",
    )
    assert "pair.0" not in set(reader.read_metadata().state_dict_metadata)


def test_hugging_face_reader_reads_nested_checkpoint(tmp_path: Path, checkpointer: AsyncCheckpointer) -> None:
    small = floats(3).to(torch.float8_e4m3fnuz)
    checkpointer.save({"a": {"w": floats(3), "f": small}, "pair": (floats(2), 1)}, tmp_path / "c")
    loaded = {"a.w": torch.zeros(3), "pair.0": torch.zeros(2), "a.f": torch.zeros(3).to(small.dtype)}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path / "c")))
    assert same(loaded, {"a.w": floats(3), "pair.0": floats(2), "a.f": small})


def test_save_payload_error_is_raised_and_leaves_nothing(
    tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    def fail() -> Any:
        raise OSError(5, "Input/output error")

    with pytest.raises(SaveFailedError, match=r"rank 0: OSError: \[Errno 5\]"):
        checkpointer.save(fail, tmp_path / "c")
    with pytest.raises(TypeError, match="a state dict is a mapping from names to values, not int"):
        checkpointer.save(3, tmp_path / "c")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_save_and_load_under_default_device(
    device: str, tmp_path: Path, checkpointer: AsyncCheckpointer
) -> None:
    state = tree({"a": (floats(2), np.arange(2000)), "b": floats(3).expand(2, 3), "c": np.float32(2)})
    target = {"leaf": {"b": torch.zeros(3).expand(2, 3)}}
    with torch.device(device):
        checkpointer.save(state, tmp_path / "c")
        load(target, storage_reader=SafetensorsReader(tmp_path / "c"))
        leaf = SafetensorsReader(tmp_path / "c").leaf("leaf.a")
    assert same(leaf, state["leaf"]["a"])
    assert same(target["leaf"]["b"], state["leaf"]["b"])


def test_leaf_kinds_number_more_than_sixty() -> None:
    assert len(list(itertools.chain(TENSORS, VALUES, REFUSED, NAMES))) > 60
