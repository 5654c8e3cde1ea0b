"""The tokenizer of a step, and the tokens that begin and end its texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.load import load_path
from kempnerforge.cli.step_config import section
from kempnerforge.config.path_text import expand
from kempnerforge.data.index import INDEX_NAME, read_index
from kempnerforge.data.tokenizer import BYTES, TOKENIZER, ByteTokenizer, load_tokenizer, tokenizer_path
from kempnerforge.errors import DataError, KempnerForgeError

if TYPE_CHECKING:
    from kempnerforge.config.schema import ModelConfig
    from kempnerforge.data.tokenizer import Tokenizer

Note = Callable[[str], None]
GIVE_IT = "give --tokenizer FILE"


@dataclass(frozen=True)
class StepTokens:
    """What is known of the tokens of a step."""

    tokenizer: Tokenizer | None
    separator_id: int | None
    """The id after every document in training."""
    bos_id: int | None = None
    """The id before every document in training."""
    imported: dict[str, Any] = field(default_factory=dict)
    """The settings of the imported model with whose weights training began; empty without one."""

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The end token of the imported model, else the separator."""
        return self.imported["eos_token_id"] if self.imported else self.separator_id

    @property
    def bos_token_id(self) -> int | None:
        """The BOS token of the imported model, else that of the data.

        Data without one have the separator before documents.
        """
        if self.imported:
            return self.imported["bos_token_id"]
        return self.bos_id if self.bos_id is not None else self.separator_id

    @property
    def end_tokens(self) -> set[int]:
        """All tokens that end a text: those of ``eos_token_id``, and the separator."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return {token for token in (*ids, self.separator_id) if token is not None}


def find_tokens(
    view: StepView, config: Mapping[str, Any], model: ModelConfig, requested: Path | None, note: Note
) -> StepTokens:
    """Return the requested tokenizer, else that of the step, and the special tokens.

    ``note`` is called with what is not known, and why. Raises DataError for a tokenizer that is not
    the model's.
    """
    imported = _imported_from(view, config, note)
    tokenizer = _find_tokenizer(view, config, imported, requested, note)
    if tokenizer is not None and model.vocabulary is not None and tokenizer.vocab_size > model.vocabulary:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but the model has "
            f"{model.vocabulary}: it is not the model's tokenizer"
        )
    separator_id = _separator(view, config)
    if separator_id is None and tokenizer is not None:
        separator_id = tokenizer.separator_id
    bos = view.manifest.provenance.tokenizer.get("bos_id", "")
    bos_id = int(bos) if bos.isdecimal() else None
    return StepTokens(tokenizer, separator_id, bos_id, imported if _has_special_tokens(imported) else {})


def _has_special_tokens(imported: Mapping[str, Any]) -> bool:
    """Return whether an import stored its special tokens. Those of earlier versions did not."""
    if not {"eos_token_id", "bos_token_id", "generation"} <= imported.keys():
        return False
    eos = imported["eos_token_id"]
    ids = [*(eos if isinstance(eos, list) else [eos]), imported["bos_token_id"]]
    return all(token is None or type(token) is int for token in ids)


def _find_tokenizer(
    view: StepView, config: Mapping[str, Any], imported: Mapping[str, Any], requested: Path | None, note: Note
) -> Tokenizer | None:
    recorded, data = view.manifest.provenance.tokenizer, section(config, "data")
    if requested is not None:
        path = str(requested)
    elif data.get("text") is not None:
        path = recorded.get("path") or str(data.get("tokenizer", BYTES))
    elif recorded.get("digest") == ByteTokenizer().digest:
        path = BYTES
    elif data.get("dataset_path") is not None:
        folder = expand(str(data["dataset_path"]), key="data.dataset_path")
        path = recorded.get("path") or str(folder / TOKENIZER)
    elif data.get("sources") and "path" in recorded:
        path = recorded["path"]
    elif "path" in imported:
        path = str(Path(str(imported["path"])) / TOKENIZER)
    else:
        note(f"the tokenizer of {view.path.name} is not recorded; {GIVE_IT}")
        return None
    file = tokenizer_path(path)
    if requested is None and file is not None and not file.is_file():
        note(f"the tokenizer {file} does not exist; {GIVE_IT}")
        return None
    eos = data.get("eos_token") if requested is None and data.get("text") is not None else None
    found = load_tokenizer(path, eos=None if eos is None else str(eos))
    # An imported model's step records no tokenizer: the file is in the folder that was imported.
    if requested is not None or data:
        _compare(path, found.digest, recorded.get("digest"), is_requested=requested is not None, note=note)
    return found


def _compare(path: str, digest: str, recorded: str | None, *, is_requested: bool, note: Note) -> None:
    """Compare with the tokenizer of the run. Raises DataError if they differ, unless it was requested."""
    if recorded is None:
        if path != BYTES:
            note(f"cannot check that {path} is the tokenizer of the run: the step records none")
    elif digest != recorded and is_requested:
        note(f"{path} is not the tokenizer that the run was trained with; it is used as requested")
    elif digest != recorded:
        raise DataError(
            f"{path} is not the tokenizer that the run was trained with: its digest is {digest}, and was "
            f"{recorded}. Restore the old file, or {GIVE_IT}, which is used without this check"
        )


def _separator(view: StepView, config: Mapping[str, Any]) -> int | None:
    """Return the separator of the data, as the step records it, else as the index of prepared data has it."""
    recorded = view.manifest.provenance.tokenizer.get("separator_id", "")
    if recorded.isdecimal():
        return int(recorded)
    folder = section(config, "data").get("dataset_path")
    if folder is None or not ((path := expand(str(folder), key="data.dataset_path")) / INDEX_NAME).is_file():
        return None
    return read_index(path).separator_id


def _imported_from(view: StepView, config: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """Return what an import stored in the step, or in the step with whose weights the run began."""
    for _ in range(16):  # runs that began with weights of runs
        stored = view.train_state().get("imported_from")
        if isinstance(stored, dict):
            return stored
        checkpoint = section(config, "checkpoint")
        given = view.manifest.provenance.tokenizer.get("load_path") or str(checkpoint.get("load_path") or "")
        if not given or "model" in checkpoint.get("exclude_from_loading", []):
            return {}
        try:
            view = StepView.open(load_path.candidates(expand(given, key="checkpoint.load_path"))[0])
            config = view.config()
        except (KempnerForgeError, OSError) as error:
            note(f"the end token of the weights that the run began with is unknown: {error}")
            return {}
    return {}
