"""Code shared by tests of weight import and export: small models, steps that hold them, the command line."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from support.step_maker import Box, write_step

from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.config.schema import ModelConfig
from kempnerforge.config.toml_text import render
from kempnerforge.model.init import init_weights_
from kempnerforge.model.llama import Llama

TINY: dict[str, Any] = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_hidden_dim": 64,
    "vocab_size": 61,
    "max_seq_len": 64,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short enough that all three bands of frequencies occur within the test's sequences.
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {"n_kv_heads": 2, "norm_eps": 1e-3},
    "tied embeddings": {"tie_embeddings": True},
    "llama 3.1 rope": {"rope_theta": 500000.0, "rope_scaling": SCALING, "n_kv_heads": 1},
    "wide heads": {"head_dim": 20, "n_kv_heads": 2},
}


def make_model(**changes: Any) -> Llama:
    """Return a whole model whose attention is far from uniform and whose norms differ from one another."""
    config = ModelConfig.model_validate(TINY | changes)
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu")
    init_weights_(model, seed=3, init_std=0.3, n_layers=config.n_layers)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
    return model


def config_toml(model: Llama, extra: str = "") -> str:
    return render({"model": model.config.model_dump(mode="json")}) + extra


def save(
    folder: Path, model: Llama, *, split: int = 1, step: int = 7, extra: str = "", **provenance: Any
) -> Path:
    """Write a step with ``model``, each weight split into ``split`` files: some by rows, some by columns."""
    state = {f"model.{name}": tensor.numpy() for name, tensor in model.state_dict().items()}
    boxes = {
        name: cut(array.shape, split, by_columns=place % 2 == 1)
        for place, (name, array) in enumerate(state.items())
    }
    return write_step(folder, step, state=state, boxes=boxes, config=config_toml(model, extra), **provenance)


def cut(shape: Sequence[int], count: int, *, by_columns: bool) -> list[Box]:
    """Return ``count`` boxes of uneven sizes that cover ``shape``. None of them begins at a whole head."""
    dim = len(shape) - 1 if by_columns else 0
    bounds = sorted({0, *(shape[dim] * place // count + 1 for place in range(1, count)), shape[dim]})
    found = []
    for begin, end in itertools.pairwise(bounds):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = begin, end - begin
        found.append((tuple(offsets), tuple(sizes)))
    return found


def weights_of(step: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a step, by their names in the model."""
    reader = SafetensorsReader(step)
    found = {
        name: torch.empty(entry.shape) for name, entry in reader.index.items() if name.startswith("model.")
    }
    load_tensors(found, reader)
    reader.close()
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def assert_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def process(*arguments: object, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``kempnerforge`` in a separate process, after running ``code``."""
    main = f"{code}\nfrom kempnerforge.cli.app import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", main, *map(str, arguments)],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
