"""``kempnerforge ckpt export`` and ``kempnerforge import``: weights to and from the formats of others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kempnerforge.checkpoint.format import hf_format
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.tools import hf_export as exporting
from kempnerforge.checkpoint.tools import hf_import
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_paths import AsJson, StepPath, find_step
from kempnerforge.errors import DataError, MismatchError

if TYPE_CHECKING:
    from kempnerforge.config.schema import ModelConfig

# Imported inside the commands, as everywhere in ``ckpt``: pydantic takes longer than most commands take.

NOT_THERE = ("optimizer", "scheduler", "data", "rng")
"""What a checkpoint of weights alone lacks."""
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", re.IGNORECASE)


class Format(str, Enum):  # noqa: UP042 - typer shows the values
    """Formats that can be exported."""

    hf = "hf"


class Dtype(str, Enum):  # noqa: UP042
    """Types of exported weights, as ``checkpoint.export_dtype`` has them."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"

    @property
    def safetensors(self) -> str:
        """What safetensors calls it."""
        return {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[self.value]

    @property
    def torch(self) -> str:
        """What torch calls it."""
        return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.value]


import_app = typer.Typer(help="Make checkpoints from weights of others.", no_args_is_help=True)


def export(
    step_dir: StepPath,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; it must not exist.")],
    format: Annotated[Format, typer.Option(help="hf: what transformers' from_pretrained reads.")] = Format.hf,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Type of the weights; by default checkpoint.export_dtype of the run.", show_default=False
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Most bytes of weights in a file, such as 5GB or 500MB.")
    ] = "5GB",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The tokenizer.json to go with it; by default the run's own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights of a step, of any layout, as a folder that other tools load."""
    max_shard_bytes = _parse_size(max_shard_size)
    source = find_step(step_dir)
    with read_locks.lock_for_reading(source, what="export"):
        view = StepView.open(source)
        done = _export_hf(view, out, dtype, max_shard_bytes, tokenizer)
    if as_json:
        text.print_json({**vars(done), "path": str(done.path), "format": format.value})
        return
    typer.echo(
        f"{done.path}: {done.num_parameters:,} parameters as {done.dtype}, {text.size(done.size_bytes)} in "
        f"{len(done.files)} files\n"
        f"To load it: transformers.AutoModelForCausalLM.from_pretrained({str(done.path)!r})"
    )


def _export_hf(
    view: StepView, out: Path, dtype: Dtype | None, max_shard_bytes: int, tokenizer: Path | None
) -> exporting.Exported:
    from kempnerforge.model import hf

    config = view.config()
    model = _model_of(config, view.path)
    dtype = dtype or _export_dtype(config, view.path)
    tokens = _tokenizer_files(view, config, model, tokenizer)
    body = hf.to_hf_config(model, dtype=dtype.torch, eos_token_id=tokens.eos_token_id)
    generation = {"_from_model_config": True, "eos_token_id": tokens.eos_token_id}
    with text.progress("exporting") as progress:
        return exporting.export(
            view,
            out,
            hf.tensor_map(model),
            dtype=dtype.safetensors,
            small_files={
                hf_format.CONFIG: hf_format.json_bytes(body),
                "generation_config.json": hf_format.json_bytes(generation),
                **tokens.files,
            },
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )


@import_app.callback()
def _group() -> None:
    # With a callback, typer keeps the one command below the group's name.
    pass


@import_app.command()
def hf(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder with config.json and .safetensors files.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The checkpoint to make; it must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint for checkpoint.load_path from a Hugging Face model of Llama's architecture."""
    from kempnerforge.config.toml_text import render
    from kempnerforge.model import hf as names

    path = folder / hf_format.CONFIG
    model = names.from_hf_config(hf_format.read_json(path), where=str(path))
    section = render({"model": model.model_dump(mode="json", exclude_none=True)})
    with text.progress("importing") as progress:
        done = hf_import.import_weights(
            folder,
            out,
            names.tensor_map(model),
            redundant=names.redundant_names(model),
            config_toml=section,
            progress=progress,
        )
    if as_json:
        body = {**vars(done), "path": str(done.path), "exclude_from_loading": NOT_THERE, "model": section}
        text.print_json(body)
        return
    typer.echo(
        f"{done.path}: {done.num_parameters:,} parameters as fp32, {text.size(done.size_bytes)}\n"
        "To train from it, put this into a config:"
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
            f"{path} cannot be exported: it has no [model] in a config.toml, so its shape is not known"
        )
    try:
        return ModelConfig.model_validate(config["model"])
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, ('model', *first['loc'])))}: {first['msg']}"
        raise MismatchError(f"{path}: its config is not of this version ({what})") from None


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


@dataclass(frozen=True)
class _Tokens:
    """What an export has to say of tokens."""

    eos_token_id: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def _tokenizer_files(
    view: StepView, config: Mapping[str, Any], model: ModelConfig, asked: Path | None
) -> _Tokens:
    """The tokenizer that was asked for, else the run's; without files where it was the byte tokenizer."""
    from kempnerforge.data.tokenizer import BYTES, load_tokenizer

    table, recorded = config.get("data", {}), view.manifest.provenance.tokenizer
    named = table.get("tokenizer", BYTES) if table.get("text") is not None else None
    if asked is None and named in (None, BYTES):
        return _Tokens(load_tokenizer(BYTES).separator_id if named else None)
    path = (asked or Path(recorded.get("path") or str(named))).expanduser()
    path = path / TOKENIZER if path.is_dir() else path
    if asked is None and not path.is_file():
        typer.echo(
            f"the run's tokenizer {path} is not there, so none is exported; give --tokenizer FILE", err=True
        )
        return _Tokens()
    loaded = load_tokenizer(str(path))
    if loaded.vocab_size > model.vocab_size:
        raise DataError(
            f"tokenizer {path}: {loaded.vocab_size} ids, and the model has {model.vocab_size}: not its own"
        )
    _compare_tokenizer(path, loaded.digest, recorded.get("digest"), is_asked=asked is not None)
    files = {TOKENIZER: path.read_bytes()}
    for name in TOKENIZER_FILES[1:]:
        if path.with_name(name).is_file():
            files[name] = path.with_name(name).read_bytes()
    return _Tokens(loaded.separator_id, files)


def _compare_tokenizer(path: Path, digest: str, recorded: str | None, *, is_asked: bool) -> None:
    """Compare with the tokenizer that the run was trained with. Raises DataError unless asked for it."""
    if recorded is None:
        typer.echo(
            f"whether {path} is the tokenizer of the run cannot be checked: the step records none", err=True
        )
    elif digest != recorded and is_asked:
        typer.echo(f"{path} is not the tokenizer that the run was trained with; taken as asked", err=True)
    elif digest != recorded:
        raise DataError(
            f"{path} is not the tokenizer that the run was trained with: its digest is {digest}, and was "
            f"{recorded}. Put the old file back, or name one with --tokenizer FILE, which is taken as it is"
        )


def _parse_size(given: str) -> int:
    match = _SIZE.fullmatch(given.strip())
    size_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size_bytes < 1:
        raise typer.BadParameter(
            f"{given!r} is not a size; write 5GB, 500MB or 2GiB", param_hint="--max-shard-size"
        )
    return size_bytes
