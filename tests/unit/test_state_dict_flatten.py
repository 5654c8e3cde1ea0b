"""From a nested state dict to names, tensors and JSON, and the paths by which it is built again."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from kempnerforge.checkpoint.format import structure
from kempnerforge.checkpoint.format.safetensors_file import ShardItem
from kempnerforge.checkpoint.format.structure import FLAT, Structure
from kempnerforge.checkpoint.load.shadows import may_overlap
from kempnerforge.checkpoint.save.commit import PlannedItem
from kempnerforge.checkpoint.save.union import Held, unite
from kempnerforge.checkpoint.state.flatten import payload_of
from kempnerforge.checkpoint.state.pieces import check_name
from kempnerforge.distributed.store_channel import LocalBoard, collect

T = torch.ones(1)
TREES: dict[str, dict[Any, Any]] = {
    "flat": {"a.b": T, "c": 1},
    "nested": {"model": {"w": T, "deep": {"b": T}}, "epoch": 3},
    "dots in keys": {"model": {"layers.0.w": T}, "optim": {"state": {"layers.0.w": {"m": T, "step": 1}}}},
    "a dot hides a level": {"a.b": {"c": T}, "a": {"b": {"d": T}}, "a.b.e": T},
    "top name in a container's": {"a.b": T, "a": {"c": T}},
    "lists": {"groups": [{"lr": 0.1}, {"lr": 0.2}], "tensors": [T, [T], 3], "plain": [1, [2]]},
    "digits": {"a": {"0": T, "1": {"2": T}}, "b": [T, {"0": T}]},
    "number keys": {"a": {0: T, 1: {2: T}}, 5: T},
    "empty names": {"": {"a": T}, "b": {"": T, "c": {"": {"": T}}}},
    "tuples": {"a": (T, 1), "b": {"c": (1, 2)}},
}


@pytest.mark.parametrize("kind", TREES)
def test_payload_names_and_paths_are_those_of_dcp(kind: str) -> None:
    flat, paths = flatten_state_dict(TREES[kind])
    payload = payload_of(TREES[kind])
    inside = {"a.0"} if kind == "tuples" else set()
    assert {*payload.tensors, *payload.objects} - inside == set(flat)
    stored = json.loads(json.dumps(structure.encode(payload.structure)))
    found = structure.decode(stored)
    assert {name: found.path(name) for name in flat} == paths
    assert (stored is None) == all(len(path) == 1 for path in paths.values())


def test_payload_of_flat_tensors_is_the_same_mapping() -> None:
    state = {"a": T, "b.c": T}
    assert payload_of(state).tensors is state
    assert payload_of(state).structure is FLAT


def test_payload_empty_dicts_are_kept_by_path() -> None:
    payload = payload_of({"a": {}, "b": {"c": {}, "d": 1}, "e": [T, {}]})
    assert set(payload.objects) == {"b.d"}
    found = structure.decode(json.loads(json.dumps(structure.encode(payload.structure))))
    assert found.empty == {"a": ("a",), "b.c": ("b", "c"), "e.1": ("e", 1)}


def test_structure_bare_lists_have_empty_dicts_and_no_others() -> None:
    tree = {"a": [{}, 1], "b": [[{}], 2], "c": [{"d": 1}, {}], "e": [1, 2], "f": {"g": [[], [{}]]}}
    found = structure.decode(structure.encode(payload_of(tree).structure))
    assert set(found.bare_lists) == {("a",), ("b",), ("f", "g")}
    of_dcp = structure.encode(Structure({"a.1": ("a", 1)}))
    assert structure.decode(of_dcp).bare_lists == ()


def test_structure_json_has_containers_alone() -> None:
    payload = payload_of(
        {"model": {f"w{number}": T for number in range(100)}, "groups": [{"lr": 1}], "n": {}}
    )
    assert structure.encode(payload.structure) == {"tree": {"model": {}, "groups": [[0, {}]], "n": None}}


@pytest.mark.parametrize("body", [[], {"tree": []}, {"tree": {"a": 3}}, {"tree": {}, "other": {"a": "b"}}, 3])
def test_structure_of_another_form_raises(body: Any) -> None:
    with pytest.raises((ValueError, TypeError, AttributeError)):
        structure.decode(body)


def test_structure_merge_has_all_ranks_leaves() -> None:
    first = payload_of({"a.b": T, "c": {}, "d": {}}).structure
    second = payload_of({"a": {"b": T, "e": T}, "c": {"f": 1}}).structure
    merged = structure.merge(
        [(structure.encode(first), ["a.b"]), (structure.encode(second), ["a.b", "a.e", "c.f"])]
    )
    found = structure.decode(merged)
    assert [found.path(name) for name in ("a.b", "a.e", "c.f")] == [("a.b",), ("a", "e"), ("c", "f")]
    assert found.empty == {"d": ("d",)}


def test_payload_of_nested_dict_has_tensors_and_json() -> None:
    payload = payload_of({"a": {"w": T}, "b": (1, T), "c": None})
    assert set(payload.tensors) == {"a.w", "b.1"}
    assert payload.objects == {"b": {"__tuple__": [1, {"__tensor__": {"name": "b.1"}}]}, "c": None}


def item(name: str, size: int = 4, whole: int | None = None) -> PlannedItem:
    return PlannedItem(ShardItem(name, "F32", (0,), (size,)), (whole or size,))


def test_unite_lowest_rank_contributes() -> None:
    union = unite([Held([], ("a", "b")), Held([], ("b", "c")), Held([], ("c", "d"))])
    assert [set(names) for names in union.contributed] == [set(), {"c"}, {"d"}]


def test_unite_tensors_inside_leaf_are_one_ranks() -> None:
    inside = {"a.0": "a"}
    first = Held([item("a.0"), item("w")], ("a",), inside)
    second = Held([item("a.0"), item("w")], ("a",), inside)
    assert [[one.item.name for one in items] for items in unite([first, second]).items] == [
        ["a.0", "w"],
        ["w"],
    ]
    shards = Held([item("a.0", 2, 4)], ("a",), inside)
    assert [len(items) for items in unite([shards, shards]).items] == [1, 1]


def test_unite_tensor_here_and_value_there_raises() -> None:
    with pytest.raises(ValueError, match="x is a tensor on rank 0 and none on rank 1"):
        unite([Held([item("x")]), Held([], ("x",))])


def test_check_name_shortens_what_it_shows() -> None:
    with pytest.raises(
        ValueError, match=r"^'n{59}\.\.\.' \(100000 characters\): the name has 100000 bytes"
    ) as raised:
        check_name("n" * 100_000)
    assert len(str(raised.value)) < 200
    check_name("é" * 32_767)
    check_name("")


@pytest.mark.parametrize(
    ("tensor", "overlaps"),
    [
        (torch.zeros(4, 6).t(), False),
        (torch.zeros(4, 6)[::2, 1:3], False),
        (torch.zeros(0, 3).expand(5, 0, 3), False),
        (torch.zeros(1, 3).expand(4, 3), True),
        (torch.zeros(9).as_strided((4, 3), (2, 1)), True),
        (torch.zeros(()), False),
    ],
)
def test_may_overlap_finds_shared_elements(tensor: torch.Tensor, overlaps: bool) -> None:
    assert may_overlap(tensor) is overlaps


def test_collect_ends_when_a_rank_has_failed() -> None:
    board = LocalBoard()
    board.post("1/rank1", {"error": "x"})
    board.post("1/failed", {"rank": 1})
    found = collect(board, ["1/rank0", "1/rank1"], timeout_s=1e9, stop_key="1/failed")
    assert found == {"1/rank0": None, "1/rank1": {"error": "x"}}
