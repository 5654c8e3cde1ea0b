"""``kempnerforge ckpt export`` and ``kempnerforge import``: convert weights to and from other formats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kempnerforge.checkpoint.format import hf_format
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.tools import hf_export as exporting
from kempnerforge.checkpoint.tools import hf_import, safetensors_export
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, StepPath, find_step
from kempnerforge.cli.step_tokenizer import find_tokens
from kempnerforge.data.tokenizer import TOKENIZER
from kempnerforge.errors import MismatchError

if TYPE_CHECKING:
    from kempnerforge.config.schema import ModelConfig

# Imported inside the commands, as everywhere in ``ckpt``: pydantic takes longer to import than most
# commands take to run.

NOT_THERE = ("optimizer", "scheduler", "data", "rng")
"""Parts that a checkpoint of weights alone does not have."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", re.IGNORECASE)


class Format(str, Enum):  # noqa: UP042 - typer shows the values
    """Formats that can be exported."""

    hf = "hf"
    safetensors = "safetensors"


class Dtype(str, Enum):  # noqa: UP042
    """Dtypes of exported weights, named as in ``checkpoint.export_dtype``."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def safetensors(self) -> str:
        """Name of the dtype in safetensors."""
        return {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[self.value]

    @property
    def torch(self) -> str:
        """Name of the dtype in torch."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.value]


import_app = typer.Typer(help="Import weights from other formats.", no_args_is_help=True)


def export(
    step_dir: StepPath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create. It must not exist.")],
    format: Annotated[
        Format | None,
        typer.Option(
            help="hf: what transformers' from_pretrained reads, for KempnerForge's own model. "
            "safetensors: the names of the model itself. Default: hf if it is possible.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the weights. Default: checkpoint.export_dtype of the run.", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum size of a file of weights, such as 5GB or 500MB.")
    ] = "5GB",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The tokenizer.json to include. Default: the run's tokenizer."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export the weights of a step, saved under any layout, to a folder that other tools can load."""
    max_shard_bytes = _parse_size(max_shard_size)
    source = find_step(step_dir)
    with read_locks.lock_for_reading(source, what="export"):
        view = StepView.open(source)
        own_names = format is Format.safetensors or (format is None and _is_own_model(view))
        notes: list[str] = []
        if own_names:
            done = _export_own_names(view, out, dtype, max_shard_bytes, tokenizer)
        else:
            done, notes = _export_hf(view, out, dtype, max_shard_bytes, tokenizer)
    for note in notes:
        typer.echo(note, err=True)
    if as_json:
        used = Format.safetensors if own_names else Format.hf
        text.print_json({**vars(done), "path": str(done.path), "format": used.value})
        return
    if done.training_weights_of:
        typer.echo(
            f"these are the weights of training: how {done.training_weights_of} computes its evaluation "
            "weights is not known",
            err=True,
        )
    if done.evaluation_weights_of:
        typer.echo(f"these are the evaluation weights of {done.evaluation_weights_of}")
    load = f"transformers.AutoModelForCausalLM.from_pretrained({str(done.path)!r})"
    if own_names:
        load = f"safetensors.torch.load_file(FILE), for each file of {done.path}"
    typer.echo(
        f"{done.path}: {done.num_parameters:,} parameters as {done.dtype}, {text.size(done.size_bytes)} in "
        f"{len(done.files)} files\nTo load it: {load}"
    )


def _is_own_model(view: StepView) -> bool:
    """Return whether the step has a model of the user's, which has no names in Hugging Face's Llama."""
    from kempnerforge.config.model import LLAMA

    return view.config().get("model", {}).get("name", LLAMA) != LLAMA


def _export_own_names(
    view: StepView, out: Path, dtype: Dtype | None, max_shard_bytes: int, tokenizer: Path | None
) -> exporting.Exported:
    if tokenizer is not None:
        raise typer.BadParameter("is for --format hf", param_hint="--tokenizer")
    dtype = dtype or _export_dtype(view.config(), view.path)
    with text.progress("exporting") as progress:
        return safetensors_export.export(
            view, out, dtype=dtype.safetensors, max_shard_bytes=max_shard_bytes, progress=progress
        )


def _export_hf(
    view: StepView, out: Path, dtype: Dtype | None, max_shard_bytes: int, tokenizer: Path | None
) -> tuple[exporting.Exported, list[str]]:
    """Return the export, and notes on what it lacks."""
    from kempnerforge.model import hf

    config = view.config()
    model = _model_of(config, view.path)
    dtype = dtype or _export_dtype(config, view.path)
    notes: list[str] = []
    tokens = find_tokens(view, config, model, tokenizer, notes.append)
    if tokens.tokenizer is None:
        notes.append("the export has no tokenizer")
    if tokens.eos_token_id is None:
        notes.append("the export names no end token: transformers generates until max_new_tokens")
    eos = tokens.eos_token_id if isinstance(tokens.eos_token_id, list) else [tokens.eos_token_id]
    if "data" in config and (unnamed := tokens.end_tokens.difference(eos)):
        notes.append(
            f"documents of the run end with token {unnamed.pop()}, which is not an end token of the "
            "imported model"
        )
    ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    body = hf.to_hf_config(model, dtype=dtype.torch, **ends)
    generation = tokens.imported.get("generation") or {"_from_model_config": True, **ends}
    with text.progress("exporting") as progress:
        done = exporting.export(
            view,
            out,
            hf.tensor_map(model),
            dtype=dtype.safetensors,
            small_files={
                hf_format.CONFIG: hf_format.json_bytes(body),
                hf_format.GENERATION: hf_format.json_bytes(generation),
                **(tokens.tokenizer.files() if tokens.tokenizer else {}),
            },
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
    return done, notes


@import_app.callback()
def _group() -> None:
    # With a callback, typer keeps the single command as a subcommand of the group.
    pass


@import_app.command()
def hf(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with config.json and .safetensors files.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint to create. It must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Create a checkpoint for checkpoint.load_path from a Hugging Face model with Llama's architecture."""
    from kempnerforge.config.toml_text import render
    from kempnerforge.model import hf as names

    path = folder / hf_format.CONFIG
    body = hf_format.read_json(path)
    model = names.from_hf_config(body, where=str(path))
    generation = folder / hf_format.GENERATION
    tokens = names.special_tokens(
        body, hf_format.read_json(generation) if generation.is_file() else None, where=str(folder)
    )
    section = render({"model": model.model_dump(mode="json", exclude_none=True)})
    with text.progress("importing") as progress:
        done = hf_import.import_weights(
            folder,
            out,
            names.tensor_map(model),
            redundant=names.redundant_names(model),
            special_tokens=tokens,
            config_toml=section,
            progress=progress,
        )
    if as_json:
        text.print_json(
            {**vars(done), "path": str(done.path), "exclude_from_loading": NOT_THERE, "model": section}
        )
        return
    typer.echo(
        f"{done.path}: {done.num_parameters:,} parameters as fp32, {text.size(done.size_bytes)}\n"
        "Add this to your config to train from it:"
    )
    typer.echo(f"{section}\n[checkpoint]\nload_path = {json.dumps(str(done.path), ensure_ascii=False)}")
    typer.echo(f"exclude_from_loading = {json.dumps(NOT_THERE)}")
    if (folder / TOKENIZER).is_file():
        named = json.dumps(str((folder / TOKENIZER).resolve()), ensure_ascii=False)
        typer.echo(f"\n[data]\ntokenizer = {named}")


def _model_of(config: Mapping[str, Any], path: Path) -> ModelConfig:
    from pydantic import ValidationError

    from kempnerforge.config.schema import ModelConfig

    if "model" not in config:
        raise MismatchError(
            f"{path} cannot be exported: it has no config.toml with [model], so its shapes are unknown. "
            "--format safetensors keeps the names of its tensors"
        )
    try:
        model = ModelConfig.model_validate(config["model"])
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, ('model', *first['loc'])))}: {first['msg']}"
        raise MismatchError(f"{path}: this version cannot read its config ({what})") from None
    if not model.is_llama:
        raise MismatchError(
            f"{path} cannot be exported as hf: its model is {model.name}. Use --format safetensors"
        )
    return model


def _export_dtype(config: Mapping[str, Any], path: Path) -> Dtype:
    from kempnerforge.config.checkpoint import CheckpointConfig

    table = config.get("checkpoint", {})
    named = table.get("export_dtype", CheckpointConfig().export_dtype) if isinstance(table, dict) else table
    try:
        return Dtype(named)
    except ValueError:
        raise MismatchError(
            f"{path}: checkpoint.export_dtype is {named!r} in its config; give --dtype"
        ) from None


def _parse_size(given: str) -> int:
    match = _SIZE.fullmatch(given.strip())
    size_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size_bytes < 1:
        raise typer.BadParameter(
            f"{given!r} is not a size; write 5GB, 500MB or 2GiB", param_hint="--max-shard-size"
        )
    return size_bytes
