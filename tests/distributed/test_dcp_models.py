"""Models and optimizers under each parallelism: saved, loaded and trained on, beside stock DCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import dcp_models
from support.dcp_models import (
    ONE_WAY,
    Training,
    alone,
    load_everywhere,
    local,
    momentum,
    net,
    resume_on,
    resume_on_all,
    whole,
)
from support.dcp_pairs import (
    MODES,
    STOCK,
    WAYS,
    WRITER,
    State,
    assert_same,
    load_by,
    load_without_target,
    reader_of,
    save_by,
)
from support.ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard


def test_models_of_two_ranks_train_on_after_a_load(tmp_path: Path) -> None:
    """FSDP2 in all modes, with two optimizers."""
    run_ranks(resume_on, 2, "fsdp2", tmp_path, WAYS, None, ("adamw", "momentum"))


def test_models_load_under_another_parallelism(tmp_path: Path) -> None:
    """FSDP2, TP and DDP on 2 ranks load what HSDP and FSDP2 + TP saved on 4, and back; 1 rank loads all."""
    two, four = ["fsdp2", "tensor_parallel", "ddp"], ["hsdp", "fsdp_and_tp"]
    run_ranks(resume_on_all, 2, two, tmp_path, ONE_WAY)
    run_ranks(resume_on_all, 4, four, tmp_path, ONE_WAY)
    on_one = load_everywhere(["alone"], two + four, tmp_path, ONE_WAY)
    on_two = run_ranks(load_everywhere, 2, two, four, tmp_path, ONE_WAY)[0]
    on_four = run_ranks(load_everywhere, 4, four, two, tmp_path, ONE_WAY)[0]
    # By source: states of different ones differ in the last bits, because sums have another order.
    sources = [(way, source) for way in ONE_WAY for source in two + four]
    by_source = dict(zip(sources, on_one, strict=True))
    for found, kinds, froms in ((on_two, two, four), (on_four, four, two)):
        keys = [(way, source) for way in ONE_WAY for source in froms for _ in kinds]
        for key, state in zip(keys, found, strict=True):
            assert_same(state, by_source[key], f"{key}")
    for source in two + four:
        for way in ONE_WAY[1:]:
            assert_same(by_source[way, source], by_source[STOCK, source], f"{way} {source}")


def options_of_state_dicts(folder: Path) -> None:
    """Flat optimizer states, whole states on rank 0 alone, states without frozen parameters."""
    for place, options in enumerate(
        (
            StateDictOptions(flatten_optimizer_state_dict=True),
            StateDictOptions(ignore_frozen_params=True, strict=False),
            StateDictOptions(cpu_offload=True),
        )
    ):
        (folder / f"{place}").mkdir(exist_ok=True)
        dist.barrier()
        resume_on("fsdp2", folder / f"{place}", ONE_WAY, options)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    training = Training(dcp_models.fsdp2)
    training.train(2)
    for way in WAYS:
        state = training.state(options)  # empty on rank 1
        assert bool(state["model"]) is (dist.get_rank() == 0)
        save_by(way, state, folder / f"full.{way}")
        resumed = Training(dcp_models.fsdp2, seed=2)
        sharded = resumed.state()
        load_by(way, sharded, folder / f"full.{way}")
        resumed.restore(sharded)
        assert_same(resumed.state(), training.state(), way)


def test_state_dict_options_come_back_as_stock(tmp_path: Path) -> None:
    run_ranks(options_of_state_dicts, 2, tmp_path)


class Application:
    """A Stateful of model and optimizer, as in PyTorch's tutorial."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def state_dict(self) -> State:
        return self.training.state()

    def load_state_dict(self, state_dict: State) -> None:
        self.training.restore(state_dict)


def statefuls(folder: Path) -> None:
    """A Stateful around everything; and the compiled model and optimizer themselves as Statefuls."""
    for way in WAYS:
        training, resumed = (Training(dcp_models.fsdp2, seed=seed) for seed in (1, 2))
        training.train(2)
        save_by(way, {"app": Application(training)}, folder / f"app.{way}")
        load_by(way, {"app": Application(resumed)}, folder / f"app.{way}")
        assert_same(resumed.state(), training.state(), way)
        assert resumed.train(2) == training.train(2)
        compiled, plain = Training(alone, momentum), Training(alone, momentum, seed=2)
        for one in (compiled, plain):
            one.train(1)
        wrapper = torch.compile(compiled.model, backend="eager")
        model_state = get_model_state_dict(wrapper)  # type: ignore[arg-type]
        save_by(way, {"model": model_state, "opt": compiled.optimizer}, folder / f"own.{way}")
        load_by(way, {"model": plain.model, "opt": plain.optimizer}, folder / f"own.{way}")
        assert_same(plain.state(), compiled.state(), way)


def test_statefuls_of_models_come_back(tmp_path: Path) -> None:
    run_ranks(statefuls, 2, tmp_path)


class Stage(nn.Module):
    """Layers ``first`` to ``last`` of a pipeline, under their names in the whole model."""

    def __init__(self, first: int, last: int, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for number in range(first, last):
            torch.manual_seed(seed + number)
            self.layers[str(number)] = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All layers in turn."""
        for layer in self.layers.values():
            x = layer(x)
        return x


def train_stage(stage: nn.Module) -> torch.optim.Optimizer:
    """One step of AdamW."""
    optimizer = torch.optim.AdamW(stage.parameters(), lr=0.1)
    stage(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def pipeline(folder: Path) -> None:
    """Two stages of two layers, then stages of one and three; other keys on each rank, numbers among them."""
    rank = dist.get_rank()

    def state(cuts: list[int], seed: int) -> tuple[Stage, torch.optim.Optimizer, State]:
        stage = Stage(cuts[rank], cuts[rank + 1], seed)
        optimizer = train_stage(stage)
        model, flat = get_state_dict(stage, optimizer, options=FLAT)
        return stage, optimizer, {"model": model, "optimizer": flat, f"loader.{rank}": {"position": rank + 5}}

    for way in WAYS:
        _, _, saved = state([0, 2, 4], 10)
        save_by(way, saved, folder / way)
        stage, optimizer, target = state([0, 1, 4], 20)
        load_by(way, target, folder / way)
        assert target[f"loader.{rank}"] == {"position": rank + 5}, way
        set_model_state_dict(stage, target["model"])
        set_optimizer_state_dict(stage, optimizer, target["optimizer"], options=FLAT)
        found = whole(get_state_dict(stage, optimizer, options=FLAT))
        wanted = load_without_target(way, folder / way)
        names = set(found[0])
        assert_same(found[0], {name: wanted["model"][name] for name in names}, way)
        for name in names:
            for kind in ("exp_avg", "exp_avg_sq", "step"):
                key = f"state.{name}.{kind}"
                assert_same(found[1][key], wanted["optimizer"][key], f"{way} {key}")


def test_pipeline_stages_with_other_keys_come_back(tmp_path: Path) -> None:
    run_ranks(pipeline, 2, tmp_path)
    wanted = load_without_target(STOCK, tmp_path / STOCK)
    assert set(wanted) == {"model", "optimizer", "loader.0", "loader.1"}
    for way in (*MODES, WRITER):
        assert_same(load_without_target(way, tmp_path / way), wanted, way)


def experts(folder: Path) -> None:
    """Each expert is sharded over two of four ranks, the rest over all: tensors of several meshes."""
    rank = dist.get_rank()
    everyone = init_device_mesh("cpu", (4,))
    pairs = [DeviceMesh("cpu", [number, number + 2]) for number in range(2)]

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = nn.ModuleDict({"shared": nn.Linear(3, 5)})
        for number in range(2):
            torch.manual_seed(seed + 1 + number)
            expert = nn.Linear(3, 7)
            if rank % 2 == number:
                fully_shard(expert, mesh=pairs[number])
                made[f"expert_{number}"] = expert
        fully_shard(made["shared"], mesh=everyone)
        return made

    for way in ONE_WAY:
        saved, other = model(1), model(5)
        save_by(way, {"model": get_model_state_dict(saved)}, folder / way)
        target = {"model": get_model_state_dict(other)}
        load_by(way, target, folder / way)
        set_model_state_dict(other, target["model"])
        assert_same(get_model_state_dict(other), get_model_state_dict(saved), way)


def test_experts_on_submeshes_come_back(tmp_path: Path) -> None:
    run_ranks(experts, 4, tmp_path)
    wanted = load_without_target(STOCK, tmp_path / STOCK)
    assert set(wanted["model"]) == {
        f"{module}.{kind}" for module in ("shared", "expert_0", "expert_1") for kind in ("weight", "bias")
    }
    for way in ONE_WAY[1:]:
        assert_same(load_without_target(way, tmp_path / way), wanted, way)


class Tuned(nn.Module):
    """A pretrained model, frozen, under a new head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.base = net(seed).requires_grad_(False)
        torch.manual_seed(seed)
        self.new_head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The new head on the pretrained output."""
        return self.new_head(self.base(x))


def fine_tune(folder: Path) -> None:
    """Load a pretrained model into a part of a larger one, train and save what is new, go on from both."""
    mesh = init_device_mesh("cpu", (2,))
    for way in WAYS:
        base = Training(dcp_models.fsdp2)
        base.train(2)
        save_by(way, base.state(), folder / f"base.{way}")
        weights = whole(get_model_state_dict(base.model))

        def make(seed: int) -> tuple[Tuned, torch.optim.Optimizer]:
            model = Tuned(seed)
            fully_shard(model, mesh=mesh)
            return model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])

        def load_base(model: Tuned, way: str = way) -> None:
            part = get_model_state_dict(model, submodules={model.base})
            part = {name.removeprefix("base."): tensor for name, tensor in part.items()}
            load_by(way, {"model": part}, folder / f"base.{way}")

        tuned, optimizer = make(3)
        load_base(tuned)
        tuned(torch.ones(2, dcp_models.WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ignore = StateDictOptions(ignore_frozen_params=True, strict=False)
        model_state, optimizer_state = get_state_dict(tuned, optimizer, options=ignore)
        assert set(model_state) == {"new_head.weight", "new_head.bias", "base.steps"}
        save_by(way, {"model": model_state, "optimizer": optimizer_state}, folder / f"tuned.{way}")

        again, its_optimizer = make(4)
        load_base(again)
        model_state, optimizer_state = get_state_dict(again, its_optimizer, options=ignore)
        target = {"model": model_state, "optimizer": optimizer_state}
        load_by(way, target, folder / f"tuned.{way}")
        set_model_state_dict(again, target["model"], options=ignore)
        set_optimizer_state_dict(again, its_optimizer, target["optimizer"], options=ignore)
        assert_same(get_model_state_dict(again), get_model_state_dict(tuned), way)
        assert_same(
            get_optimizer_state_dict(again, its_optimizer, options=ignore),
            get_optimizer_state_dict(tuned, optimizer, options=ignore),
            way,
        )
        found = whole(get_model_state_dict(again))
        for name in ("up.weight", "down.bias", "head.weight", "scale"):
            assert_same(found[f"base.{name}"], weights[name], f"{way} {name}")


def test_fine_tuning_loads_a_part_and_goes_on(tmp_path: Path) -> None:
    run_ranks(fine_tune, 2, tmp_path)


def test_partial_load_of_a_grown_model_keeps_the_rest(tmp_path: Path) -> None:
    """``allow_partial_load``: layers that the checkpoint lacks keep their weights, optimizer state too."""
    for way in (STOCK, "disabled", WRITER):
        training = Training(alone)
        training.train(1)
        save_by(way, training.state(), tmp_path / way)
        grown = Training(alone, seed=2)
        grown.model.new = nn.Linear(2, 2)
        grown.optimizer.add_param_group({"params": list(grown.model.new.parameters())})
        state = grown.state()
        before = {name: tensor.clone() for name, tensor in state["model"].items() if name.startswith("new")}
        load_by(way, state, tmp_path / way, planner=DefaultLoadPlanner(allow_partial_load=True))
        wanted = {**training.state()["model"], **before}
        assert_same(state["model"], wanted, way)
        for name, tensors in training.state()["optimizer"]["state"].items():
            assert_same(state["optimizer"]["state"][name], tensors, f"{way} {name}")


BROADCAST = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)


def broadcast(folder: Path) -> None:
    """Rank 0 reads the whole state alone (``no_dist``) and sends each rank its part."""
    rank = dist.get_rank()
    training = Training(dcp_models.fsdp2)
    training.train(2)
    for way in WAYS:
        save_by(way, training.state(), folder / way)
        resumed, state = Training(dcp_models.fsdp2, seed=2), {"model": {}, "optimizer": {}, "step": 2}
        if rank == 0:
            state = Training(alone, seed=3).state()
            load(state, storage_reader=reader_of(way, folder / way), no_dist=True)
        # Two calls: set_state_dict takes an empty model state for "the optimizer alone".
        set_model_state_dict(resumed.model, state["model"], options=BROADCAST)
        set_optimizer_state_dict(resumed.model, resumed.optimizer, state["optimizer"], options=BROADCAST)
        found, wanted = resumed.state(), training.state()
        for one in (found, wanted):
            del one["optimizer"]["param_groups"][0]["betas"]  # torch makes a list of it
        wanted["step"] = 0
        assert_same(found, wanted, way)


def test_state_read_by_rank_0_alone_is_broadcast(tmp_path: Path) -> None:
    run_ranks(broadcast, 2, tmp_path)


class Odd(nn.Module):
    """Tied weights, a buffer that is not saved, and an extra state of several kinds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.extra: Any = {"calls": seed, "mean": torch.full((2,), float(seed)), "name": ("a", b"b")}

    def get_extra_state(self) -> Any:
        """Part of ``state_dict``."""
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        """Part of ``load_state_dict``."""
        self.extra = state


def test_tied_weights_and_extra_state_come_back(tmp_path: Path) -> None:
    for way in WAYS:
        model, other = Odd(1), Odd(2)
        for one in (model, other):
            one.head(one.embed(torch.tensor([1, 2]))).sum().backward()
        optimizers = [torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9) for one in (model, other)]
        optimizers[0].step()
        save_by(way, {"model": model, "optimizer": optimizers[0]}, tmp_path / way)
        optimizers[1].step()
        load_by(way, {"model": other, "optimizer": optimizers[1]}, tmp_path / way)
        assert other.head.weight is other.embed.weight
        assert_same(other.state_dict(), model.state_dict(), way)
        assert_same(optimizers[1].state_dict(), optimizers[0].state_dict(), way)


def sharded_optimizer(folder: Path) -> list[dict[str, Any]]:
    """``load_sharded_optimizer_state_dict``: the optimizer's part, without a target."""
    training = Training(dcp_models.fsdp2)
    training.train(2)
    found = []
    for way in WAYS:
        state = training.state()
        save_by(way, {"model": state["model"], "optimizer": state["optimizer"]}, folder / way)
        plain = {name: torch.zeros(1) for name in state["model"]}
        loaded = load_sharded_optimizer_state_dict(plain, "optimizer", reader_of(way, folder / way))
        found.append(local(loaded))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sharded_optimizer_state_loads_as_stock(tmp_path: Path) -> None:
    for stock, *ours in run_ranks(sharded_optimizer, 2, tmp_path):
        assert set(stock["optimizer"]) == {"state", "param_groups"}
        for way, found in zip(WAYS[1:], ours, strict=True):
            assert_same(found, stock, way)
