"""``kempnerforge generate``: continue a prompt with a checkpoint, on one process or with torchrun."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.cli import formatting
from kempnerforge.cli.ckpt_paths import AsJson, find_steps
from kempnerforge.cli.step_config import (
    load_for,
    raise_on_first_of_node,
    refuse_plugins_of_others,
    section,
    stored_config,
)
from kempnerforge.cli.step_tokenizer import find_tokens
from kempnerforge.cli.train import rank_and_world_size
from kempnerforge.config.overrides import split_positionals
from kempnerforge.config.sources import Layer
from kempnerforge.errors import ConfigError, ConfigIssue, DataError, KempnerForgeError
from kempnerforge.printable import printable

if TYPE_CHECKING:
    from kempnerforge.config.schema import JobConfig
    from kempnerforge.data.text_decoder import TextDecoder
    from kempnerforge.data.tokenizer import Tokenizer

app = typer.Typer(add_completion=False)

FORCED = Layer(
    "kempnerforge generate",
    {
        # No data are read, but a config must name some.
        "data": {"dataset_path": "none is read"},
        # A compiled model would be compiled again for each length of the text.
        "train": {"batch_size": 1, "compile_model": False},
        # One sequence would use one stage at a time.
        "distributed": {"pp": 1, "pp_schedule": "1f1b", "pp_microbatch_size": "none", "pp_layers": "none"},
    },
)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="STEP_DIR [--section.key=value ...]",
        help="A step's folder, the link RUN/checkpoints/latest, or a run's folder (its newest step); "
        "and overrides of the step's config.",
    ),
]


@app.command(name="generate", context_settings={"ignore_unknown_options": True})
def generate(
    arguments: Arguments,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue. It may be empty.")],
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of new tokens.")] = 200,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Divides the logits. 0 always takes the most probable token.")
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Sample among the most probable tokens, which together have this probability."
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(metavar="S", help="The same seed gives the same text.")] = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The tokenizer.json of the model. Default: the run's tokenizer."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print a prompt and what a checkpoint continues it with, under any layout.

    On several processes: torchrun --nproc-per-node N -m kempnerforge generate STEP_DIR --prompt TEXT.
    The run is not changed and may be training at the same time.
    """
    rank, world_size = rank_and_world_size(os.environ)
    log = _log if rank == 0 else _ignore
    try:
        _check(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
        positionals, overrides = split_positionals(arguments)
        if not positionals:
            raise typer.BadParameter("STEP_DIR is missing")
        step_folder = find_steps(Path(positionals[0]))[0][0]
        view = StepView.open(step_folder, step=paths.step_number(step_folder.name))
        job = _load_job(view, [*overrides, *positionals[1:]], world_size, log)
        start = _tokenize(view, job, prompt, tokenizer, log)
    except KempnerForgeError as error:
        raise_on_first_of_node(error)

    # Imported here: torch takes seconds to import, and help and errors do not need it.
    from kempnerforge.train import generation

    if len(start.ids) > (seen := generation.max_context_len(job)):
        log(f"the prompt has {len(start.ids):,} tokens; the model sees the last {seen:,}")
    output = _Output(prompt, start.tokenizer.decoder(start.ids), is_streamed=rank == 0 and not as_json)
    sampling = generation.Sampling(max_tokens, temperature, top_p, seed)
    started = time.perf_counter()
    try:
        end_token = generation.generate(
            job,
            step_folder,
            generation.Prompt(start.ids, start.tokenizer.vocab_size, start.end_tokens),
            sampling,
            output.add,
        )
    except KempnerForgeError as error:
        if rank == 0 or not error.agreed:
            raise
        raise typer.Exit(error.exit_status) from None
    if rank != 0:
        return
    output.end()
    if as_json:
        body = {"path": str(step_folder), "step": view.manifest.provenance.step, "prompt": prompt}
        body |= {"text": output.text, "tokens": output.num_tokens, "end_token": end_token}
        formatting.print_json(body | asdict(sampling))
        return
    why = output.why_it_ended(end_token)
    log(f"{output.num_tokens} tokens in {time.perf_counter() - started:.1f} s, ended by {why}")


def _check(*, max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raise ConfigError with every option that has a bad value."""
    rules = (
        ("--max-tokens", max_tokens, max_tokens >= 1, "allowed: 1 or more"),
        ("--temperature", temperature, 0 <= temperature < math.inf, "allowed: 0 or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "allowed: more than 0, at most 1"),
        ("--seed", seed, 0 <= seed < 2**63, "allowed: 0 to 2^63 - 1"),
    )
    if faults := [
        ConfigIssue(name, f"{value}", allowed) for name, value, holds, allowed in rules if not holds
    ]:
        raise ConfigError(faults, where="command line")


def _load_job(view: StepView, overrides: list[str], ranks: int, log: Callable[[str], None]) -> JobConfig:
    """Return the config of the step with ``overrides``, reduced to what generation needs, for ``ranks``.

    Raises ConfigError.
    """
    if staged := [
        override.partition("=")[0] for override in overrides if override.startswith("--distributed.pp")
    ]:
        remedy = "generation uses no pipeline stages: leave it out"
        raise ConfigError([ConfigIssue(key, "has no effect", remedy) for key in staged], where="command line")
    stored = stored_config(view)
    train, model = section(stored, "train"), section(stored, "model")
    # A model of the user's may draw buffers from the seed, which are not stored.
    names = ("seed", "mixed_precision", "deterministic", "seq_len")
    kept = {key: train[key] for key in names if key in train}
    if not train and "max_seq_len" in model:  # an import
        kept["seq_len"] = model["max_seq_len"]
    loaded, notice = load_for(
        {
            **{name: section(stored, name) for name in ("distributed", "optimizer")},
            "model": model,
            "train": kept,
        },
        overrides,
        forced=FORCED,
        where=str(view.path / paths.CONFIG),
        ranks=ranks,
    )
    refuse_plugins_of_others(loaded, view)
    if notice:
        log(notice)
    return loaded.job


@dataclass(frozen=True)
class _Start:
    tokenizer: Tokenizer
    ids: list[int]
    """BOS or the separator, and the prompt."""
    end_tokens: set[int]


def _tokenize(
    view: StepView, job: JobConfig, prompt: str, requested: Path | None, log: Callable[[str], None]
) -> _Start:
    """Tokenize the prompt. Raises DataError if the tokenizer of the step is not known."""
    notes: list[str] = []
    tokens = find_tokens(view, view.config(), job.model, requested, notes.append)
    if tokens.tokenizer is None:
        raise DataError(notes[-1])
    for note in notes:
        log(note)
    first = tokens.bos_token_id if tokens.bos_token_id is not None else tokens.separator_id
    assert first is not None, "every tokenizer has a separator"
    ids = [first, *tokens.tokenizer.encode(os.fsencode(prompt)).tolist()]
    return _Start(tokens.tokenizer, ids, tokens.end_tokens)


class _Output:
    """The prompt and the text that follows, printed while it is generated."""

    def __init__(self, prompt: str, decoder: TextDecoder, *, is_streamed: bool) -> None:
        self.text = ""
        """What follows the prompt."""
        self.num_tokens = 0
        self._prompt = prompt
        self._decoder = decoder
        self._is_streamed = is_streamed
        self._has_reader = True

    def add(self, token: int) -> bool:
        """Print the text that ``token`` completes. Return False if nobody reads it any more."""
        if self.num_tokens == 0:
            self._print(self._prompt)
        self.num_tokens += 1
        return self._append(self._decoder.add(token))

    def end(self) -> None:
        """Print the rest, and end the line."""
        if self.num_tokens == 0:
            self._print(self._prompt)
        self._append(self._decoder.flush())
        self._print("\n")

    def why_it_ended(self, end_token: int | None) -> str:
        """Return what ended the text."""
        if not self._has_reader:
            return "a closed pipe"
        return "--max-tokens" if end_token is None else f"end token {end_token}"

    def _append(self, text: str) -> bool:
        self.text += text
        return self._print(text)

    def _print(self, text: str) -> bool:
        if not self._is_streamed:
            return True
        encoding = sys.stdout.encoding or "utf-8"
        try:
            sys.stdout.write(printable(text, lines=True).encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:
            self._is_streamed = self._has_reader = False
            # Python flushes standard output when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return False
        return True


def _log(message: str) -> None:
    typer.echo(message, err=True)


def _ignore(_message: str) -> None:
    """Drop a message, on ranks other than 0."""
