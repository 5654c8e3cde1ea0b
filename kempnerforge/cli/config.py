"""``kempnerforge config``: write, check, show and document configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kempnerforge import fsio
from kempnerforge.cli.plugin_check import check_plugins
from kempnerforge.config.checkpoint_rules import why_best_has_no_choice
from kempnerforge.config.overrides import split_positionals
from kempnerforge.config.packaged import packaged_config
from kempnerforge.config.plugin_uses import plugin_identities
from kempnerforge.config.reference import json_schema, keys_text
from kempnerforge.config.run import PLACEHOLDER
from kempnerforge.config.schema import JobConfig, LoadedJob, load_job
from kempnerforge.config.suggestions import suggest_key
from kempnerforge.config.toml_text import render
from kempnerforge.errors import ConfigError, ConfigIssue

app = typer.Typer(help="Write, check, show and document configurations.", no_args_is_help=True)

# click must not parse --section.key: it passes unknown options on, in order.
OVERRIDABLE = {"ignore_unknown_options": True}

FileAndOverrides = Annotated[
    list[str],
    typer.Argument(metavar="FILE [--section.key=value ...]", help="The TOML file, and overrides."),
]

NoFiles = Annotated[
    bool,
    typer.Option(
        "--no-files",
        help="Do not check the files and folders that FILE names: they exist only on the compute nodes.",
    ),
]

NoPlugins = Annotated[
    bool,
    typer.Option(
        "--no-plugins",
        help="Do not import the plug-ins that FILE names: they are installed only on the compute nodes.",
    ),
]


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A config that comes with the package, such as quickstart.")
    ],
) -> None:
    """Write the packaged config NAME as NAME.toml into the current folder. Never overwrite a file."""
    text = packaged_config(name)
    file = Path(f"{name}.toml")
    try:
        fsio.write_new_file(file, text.encode())
    except FileExistsError:
        issue = ConfigIssue("NAME", f"{file} exists already, and is not changed", "move it first")
        raise ConfigError([issue], where="config new") from None
    typer.echo(f"wrote {file}. To train: kempnerforge train {file}")


@app.command(context_settings=OVERRIDABLE)
def check(
    arguments: FileAndOverrides,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Also check the layout for this number of processes.")
    ] = None,
    no_files: NoFiles = False,
    no_plugins: NoPlugins = False,
) -> None:
    """Check FILE, the files and the plug-ins that it names, and report everything that is invalid."""
    file, overrides = file_and_overrides(arguments)
    loaded = load_job(file, overrides, world_size=world_size, inside_job=False)
    job = loaded.job
    own_model = [] if no_plugins else check_plugins(loaded, where=file)
    if not no_files:
        from kempnerforge.train.preflight import (
            check_files_of,
        )  # imports NumPy and more, which ``show`` and ``schema`` do not need

        check_files_of(loaded, where=file)
    typer.echo(f"{file}: valid")
    for line in [*own_model, *_facts(job, world_size)]:
        typer.echo(f"  {line}")


@app.command(context_settings=OVERRIDABLE)
def show(arguments: FileAndOverrides, no_plugins: NoPlugins = False) -> None:
    """Print FILE with defaults and overrides filled in, the source of each value, and its plug-ins."""
    file, overrides = file_and_overrides(arguments)
    loaded = load_job(file, overrides, inside_job=False)
    typer.echo(_annotated(loaded), nl=False)
    if not no_plugins:
        check_plugins(loaded, where=file)
        for key, identity in plugin_identities(loaded.job).items():
            typer.echo(f"# {key}: {identity}")


@app.command()
def keys(
    prefix: Annotated[
        str, typer.Argument(help="Show only keys that begin with this, such as optimizer.")
    ] = "",
) -> None:
    """Print the keys of configuration files, with their types, defaults and documentation."""
    text = keys_text(prefix)
    if not text:
        raise ConfigError(
            [ConfigIssue("PREFIX", f'no key begins with "{prefix}"', suggest_key(prefix, JobConfig))]
        )
    typer.echo(text, nl=False)


@app.command()
def schema(
    file: Annotated[
        Path | None, typer.Argument(help="Ignored: the schema is the same for all files.")
    ] = None,
) -> None:
    """Print the JSON schema of configuration files, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


def file_and_overrides(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the arguments of a command into FILE and the overrides."""
    positionals, overrides = split_positionals(arguments)
    if not positionals:
        raise typer.BadParameter("FILE is missing")
    # Additional files are reported as issues of the overrides, together with all others.
    return positionals[0], [*overrides, *positionals[1:]]


def _annotated(loaded: LoadedJob) -> str:
    return render(loaded.job.model_dump(mode="json"), comment=lambda key: loaded.sources[key])


def _facts(job: JobConfig, world_size: int | None) -> list[str]:
    """Return a summary of a valid configuration, one fact per line."""
    from kempnerforge.train.run_length import run_length

    facts = [f"{job.model.num_parameters:,} parameters"] if job.model.is_llama else []
    if world_size is None:
        facts.append("layout: not checked; give --world-size N")
    else:
        layout = job.geometry(world_size)
        tokens = layout.global_batch_size * job.train.seq_len
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        facts += [
            f"{processes}: dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard}"
            f" x tp {layout.tp} x pp {layout.pp}",
            f"global batch: {layout.global_batch_size} sequences ({tokens:,} tokens),"
            f" {layout.accumulation_steps} x batch_size {job.train.batch_size} on each data-parallel rank",
            f"length: {run_length(job, layout.global_batch_size)}",
        ]
    if why := why_best_has_no_choice(job.checkpoint, job.eval, job.train):
        facts.append(f"warning: checkpoint.keep_best_n has nothing to choose from: {why}")
    if job.run.dir and (names := PLACEHOLDER.findall(job.run.dir)):
        facts.append(f"run.dir: {', '.join(f'{{{name}}}' for name in names)} is filled in by the SLURM job")
    return facts
