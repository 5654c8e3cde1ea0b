"""Samples of a dataset of the user's: an object with ``__len__`` and ``__getitem__(i)``.

A sample is ``seq_len + 1`` token ids, or a dict whose values are stacked over a micro-batch. Which
sample stands at which position is decided by ``sample_order``, as for KempnerForge's own data.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kempnerforge.data.rows import Rows
from kempnerforge.data.sample_order import mix
from kempnerforge.data.shard_reader import ids_problem
from kempnerforge.errors import ConfigError, ConfigIssue, DataError, PluginError
from kempnerforge.plugins import resolve

TRAIN_KEY, VAL_KEY = "data.dataset", "data.val.dataset"


class UserDataset:
    """A dataset of the user's, with errors that name it and the sample.

    Raises ConfigError if it cannot be built or is not map-style.
    """

    def __init__(self, name: str, args: Mapping[str, Any], *, key: str) -> None:
        self.name, self.args, self._key = name, dict(args), key
        plugin = resolve("dataset", name, key=key)
        try:
            self._object: Any = plugin.target(**args)
            self.num_samples = len(self._object) if hasattr(self._object, "__getitem__") else -1
        except Exception as error:
            args_key = f"{key.rpartition('.')[0]}.args"
            raise ConfigError([ConfigIssue(args_key, f"{name}(...) raised {_cause(error)}")]) from error
        if self.num_samples < 0:
            problem = f"{name} returned a {type(self._object).__name__}, which has no __getitem__"
            raise ConfigError([ConfigIssue(key, problem, "a dataset has __len__ and __getitem__(i)")])

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker builds the dataset anew: it may hold open files.
        return functools.partial(UserDataset, key=self._key), (self.name, self.args)

    def has_tokens(self) -> bool:
        """Return whether samples are token ids, by reading the first one. Raises PluginError."""
        return not isinstance(self._item(0), Mapping)

    def tokens(self, index: int, length: int, vocab_size: int | None) -> np.ndarray:
        """Return sample ``index``, int64 [length]. Raises PluginError if it is anything else."""
        item = self._item(index)
        try:
            array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
        except (TypeError, ValueError):
            array = np.array(None)
        if array.dtype.kind not in "biufc":
            raise self._unusable(index, f"is a {type(item).__name__}, not {length} token ids")
        if array.dtype.kind not in "iu":
            raise self._unusable(index, f"is {array.dtype}; token ids are integers")
        if array.shape != (length,):
            problem = f"has shape {list(array.shape)}; train.seq_len = {length - 1} needs {length} tokens"
            raise self._unusable(index, problem)
        if problem := ids_problem(int(array.min()), int(array.max()), vocab_size):
            raise self._unusable(index, problem)
        return array.astype(np.int64)

    def stacked(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return the values of samples ``indices`` [B], stacked: name -> [B, ...].

        Raises PluginError if samples differ in names, shapes or dtypes.
        """
        items = [self._tensors(int(index)) for index in indices]
        shapes = [{name: (list(value.shape), value.dtype) for name, value in item.items()} for item in items]
        for index, shape in zip(indices, shapes, strict=True):
            if shape != shapes[0]:
                problem = f"is {_described(shape)}, and sample {indices[0]} of the same batch is "
                raise self._unusable(int(index), problem + _described(shapes[0]))
        return {name: _stack([item[name] for item in items]) for name in items[0]}

    def _tensors(self, index: int) -> dict[str, Tensor]:
        item = self._item(index)
        if not isinstance(item, Mapping):
            raise self._unusable(index, f"is a {type(item).__name__}, and sample 0 is a dict")
        tensors = {}
        for name, value in item.items():
            try:
                tensors[str(name)] = torch.as_tensor(value).detach().cpu()
            except (TypeError, ValueError, RuntimeError):
                problem = (
                    f"has a {type(value).__name__} as {name!r}; a value is a tensor, an array or a number"
                )
                raise self._unusable(index, problem) from None
        return tensors

    def _item(self, index: int) -> Any:
        try:
            return self._object[index]
        except (Exception, SystemExit) as error:
            raise self._unusable(index, f"raised {_cause(error)}") from error

    def _unusable(self, index: int, problem: str) -> PluginError:
        return PluginError(f'{self._key} "{self.name}": sample {index} {problem}')


@dataclass(frozen=True)
class MapSamples:
    """The samples of one split, numbered from 0."""

    dataset: UserDataset
    num_samples: int
    has_tokens: bool
    """Whether a sample is token ids, not a dict."""
    seq_len: int
    vocab_size: int | None
    held_out: np.ndarray | None = None
    """Sorted indices of the dataset that are held out for validation."""
    is_held_out: bool = False
    """Whether these samples are those of ``held_out``, not all others."""

    @property
    def counts_all(self) -> bool:
        """Whether all targets count. Of dicts, the model counts items."""
        return self.has_tokens

    def read(self, ids: np.ndarray) -> Rows:
        """Return samples ``ids`` [N]. Raises PluginError."""
        length = self.seq_len + 1
        rows = [self.dataset.tokens(int(index), length, self.vocab_size) for index in self.indices(ids)]
        return Rows(np.stack(rows) if rows else np.empty((0, length), dtype=np.int64))

    def read_fields(self, ids_B: np.ndarray) -> dict[str, Tensor]:
        """Return the values of samples ``ids_B``, stacked: name -> [B, ...]. Raises PluginError."""
        return self.dataset.stacked(self.indices(ids_B))

    def indices(self, ids: np.ndarray) -> np.ndarray:
        """Return the indices in the dataset of samples ``ids`` [N], int64 [N]."""
        if self.held_out is None:
            return ids
        if self.is_held_out:
            return self.held_out[ids]
        return ids + np.searchsorted(self.held_out - np.arange(self.held_out.size), ids, side="right")


class MapDataset:
    """A dataset of the user's, divided into ``train`` and ``val``.

    Args:
        train: the samples to train on. Without ``val``, ``val_fraction`` of them are held out.
        val: the samples to validate on.
        vocab_size: vocabulary of the model, if it is known.
        has_tokens: whether samples are token ids, not dicts.
    """

    index = None
    """As ``TokenDataset.index``: there is no tokenizer."""

    def __init__(
        self,
        train: UserDataset,
        val: UserDataset | None,
        *,
        own_val: bool,
        val_fraction: float,
        vocab_size: int | None,
        has_tokens: bool,
    ) -> None:
        self.train, self.val, self.has_tokens = train, val, has_tokens
        self._vocab_size = vocab_size
        self._val_fraction = 0.0 if own_val else val_fraction
        self._held_out = held_out_indices(train.num_samples, self._val_fraction)

    def split(self, name: str, seq_len: int) -> MapSamples:
        """Return the samples of ``"train"`` or ``"val"``. Raises :class:`DataError` if there are none."""
        own = self.val if name == "val" and self.val is not None else self.train
        held_out = self._held_out if own is self.train and self._held_out.size else None
        count = own.num_samples
        if own is self.train:
            count = self._held_out.size if name == "val" else count - self._held_out.size
        if count < 1:
            held = f", {self._held_out.size} of them held out for validation" if own is self.train else ""
            raise DataError(
                f"{own.name} has {own.num_samples} samples{held}: none is left for the {name} split"
            )
        return MapSamples(
            own, count, self.has_tokens, seq_len, self._vocab_size, held_out, is_held_out=name == "val"
        )

    def fingerprint(self, split: str, seq_len: int) -> dict[str, Any]:
        """Return what determines the samples, as JSON values: not where the plug-in was found."""
        fields = {
            "dataset_name": self.train.name,
            "dataset_args": self.train.args,
            "dataset_length": self.train.num_samples,
            "val_fraction": self._val_fraction,
            "num_samples": self.split(split, seq_len).num_samples,
        }
        return {**fields, "seq_len": seq_len} if self.has_tokens else fields


def held_out_indices(num_samples: int, fraction: float) -> np.ndarray:
    """Return the sorted indices below ``num_samples`` that are held out for validation, int64.

    One pseudo-random index of each interval of 1 / ``fraction`` indices is held out, so that
    samples that are added at the end change nothing for the others. At least one is held out.
    """
    if fraction <= 0 or num_samples < 2:
        return np.empty(0, dtype=np.int64)
    edges = np.floor(np.arange(int(num_samples * fraction) + 2) / fraction).astype(np.int64)
    starts, widths = edges[:-1], np.diff(edges)
    # Not the index 0 itself, of which ``mix`` is 0.
    numbers = mix(edges[1:].astype(np.uint64))
    chosen = starts + (numbers % widths.astype(np.uint64)).astype(np.int64)
    chosen = chosen[chosen < num_samples]
    return chosen if chosen.size else np.array([num_samples - 1])


def _stack(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dtype is torch.bfloat16:  # NumPy has no such dtype
        return torch.stack(tensors)
    # NumPy makes the copy: torch would start a thread pool for the prefetching thread.
    return torch.from_numpy(np.stack([tensor.numpy() for tensor in tensors]))


def _described(shapes: Mapping[str, tuple[list[int], torch.dtype]]) -> str:
    return ", ".join(
        f"{name} {str(dtype).removeprefix('torch.')} {shape}" for name, (shape, dtype) in shapes.items()
    )


def _cause(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({frame.filename}:{frame.lineno})"
