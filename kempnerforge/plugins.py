"""Plug-ins: names in a config that stand for callables.

A name is one of KempnerForge's own (a module of the packages in ``BUILT_IN``), an import path
``package.module:attribute``, or a name that an installed package registers under the entry-point
group ``kempnerforge.plugins``. The working directory is searched first, as by ``python -m``.

Nothing is imported until a name is resolved. This module does not import torch; a plug-in may.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import xxhash

from kempnerforge.errors import ConfigError, ConfigIssue

GROUP = "kempnerforge.plugins"
"""The entry-point group."""

BUILT_IN = {
    "model": "kempnerforge.model.families",
    "optimizer": "kempnerforge.train.optimizers",
    "loss": "kempnerforge.train.losses",
    "sink": "kempnerforge.telemetry.plugin_sinks",
}
"""Kind of plug-in -> the package whose modules are KempnerForge's own plug-ins of that kind.

The name of a module is the name in a config, and its ``PLUGIN`` is the callable. Adding a plug-in
to KempnerForge is adding one module.
"""


@dataclass(frozen=True)
class Plugin:
    """A resolved name."""

    kind: str
    """``model``, ``optimizer``, ``loss``, ``scheduler``, ``dataset``, ``hook`` or ``sink``."""
    name: str
    """The name in the config."""
    target: Callable[..., Any]
    origin: str
    """``built-in``, or the package and version that it comes from, or the path of its file."""
    digest: str
    """xxh3-64 of the source file. Empty if there is none."""

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of KempnerForge's own."""
        return self.origin == "built-in"

    @property
    def version(self) -> str:
        """The name, the version of its package, and the digest of its source; the same in every folder."""
        package = "" if self.origin.startswith("/") else f"{self.origin}, "
        return f"{self.name} ({package}source {self.digest or 'unknown'})"

    @property
    def identity(self) -> str:
        """The name, where it comes from, and the digest of its source, for logs and comparisons."""
        return f"{self.name} ({self.origin}{f', source {self.digest}' if self.digest else ''})"


@cache
def built_in_names(kind: str) -> tuple[str, ...]:
    """Return the names of KempnerForge's own plug-ins of ``kind``. Imports none of them."""
    package = BUILT_IN.get(kind)
    spec = util.find_spec(package) if package is not None else None
    folders = spec.submodule_search_locations if spec is not None else None
    return tuple(sorted(info.name for info in pkgutil.iter_modules(folders or [])))


def is_built_in(kind: str, name: str) -> bool:
    """Return whether ``name`` is one of KempnerForge's own plug-ins. Imports nothing."""
    return name in built_in_names(kind)


def resolve(kind: str, name: str, *, key: str, also: Sequence[str] = ()) -> Plugin:
    """Return the plug-in that ``name`` stands for, after importing its module.

    Args:
        kind: what the config expects, one of those of ``Plugin.kind``.
        name: the name in the config.
        key: the config key, for errors.
        also: further names that the key accepts, for suggestions.

    Raises:
        ConfigError: there is no such name, module or attribute, the module raises an error when it
            is imported, or the attribute cannot be called.
    """
    if is_built_in(kind, name):
        module = _import_built_in(kind, name, key)
        return Plugin(kind, name, module.PLUGIN, "built-in", "")
    if ":" in name:
        return _resolve_path(kind, name, name, key)
    if issues := name_issues(kind, name, key=key, also=also):
        raise ConfigError(issues)
    return _resolve_path(kind, name, _registered()[name].value, key)


def name_issues(kind: str, name: str, *, key: str, also: Sequence[str] = ()) -> list[ConfigIssue]:
    """Return an issue if ``name`` is neither known nor an import path. Imports no plug-in."""
    if name in also or ":" in name or is_built_in(kind, name) or name in _registered():
        return []
    known = sorted({*built_in_names(kind), *also, *_registered()})
    hint = f"{_did_you_mean(name, known)}{_ways(kind, known)}"
    return [ConfigIssue(key, f'"{name}" is not a known {kind}', hint)]


def _registered() -> dict[str, metadata.EntryPoint]:
    _search_working_directory()
    return {entry.name: entry for entry in metadata.entry_points(group=GROUP)}


def argument_issues(
    plugin: Plugin, args: Mapping[str, Any], *, key: str, given: int = 0
) -> list[ConfigIssue]:
    """Return why ``plugin`` cannot be called with the keyword arguments ``args``.

    Args:
        key: the config key of the table of arguments.
        given: number of positional arguments that KempnerForge passes before them.
    """
    try:
        signature = inspect.signature(plugin.target)
    except (TypeError, ValueError):
        return []  # a callable without a readable signature, such as one of a C extension
    parameters = list(signature.parameters.values())[given:]
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in by_name]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    issues = [
        ConfigIssue(
            f"{key}.{name}",
            f"{plugin.name} has no argument {name}",
            f"{_did_you_mean(name, names)}it takes: {', '.join(names) or 'none'}",
        )
        for name in args
        if name not in names and not takes_any
    ]
    if missing := [p.name for p in by_name if p.default is p.empty and p.name not in args]:
        needs = f"{plugin.name} needs {', '.join(missing)}"
        issues.append(ConfigIssue(key, needs, f"set {key}.{missing[0]}"))
    return issues


def _import_built_in(kind: str, name: str, key: str) -> Any:
    """Import one of KempnerForge's own plug-ins. An extra of its name has what it needs beyond the rest."""
    try:
        return importlib.import_module(f"{BUILT_IN[kind]}.{name}")
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        problem = f'"{name}" needs the package {package}, which is not installed'
        raise _fault(key, problem, f"pip install 'kempnerforge[{name}]'") from error


def _resolve_path(kind: str, name: str, path: str, key: str) -> Plugin:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise _fault(key, f'"{name}" is not an import path', 'write "package.module:attribute"')
    _search_working_directory()
    module = _import(module_name, name, key)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            known = [known for known in getattr(target, "__dict__", {}) if not known.startswith("_")]
            raise _fault(
                key, f'"{name}": {module_name} has no {attribute}', _did_you_mean(part, known).strip()
            )
        target = getattr(target, part)
    if not callable(target):
        raise _fault(key, f'"{name}" is of type {type(target).__name__}', "name a class or a function")
    source = _source_of(target, module)
    return Plugin(kind, name, target, _origin(module_name, source), _digest(source))


def _import(module_name: str, name: str, key: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            searched = "the working directory, PYTHONPATH and installed packages were searched"
            raise _fault(key, f'"{name}": there is no module {error.name}', searched) from None
        raise _import_fault(key, name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_fault(key, name, error) from error


def _import_fault(key: str, name: str, error: BaseException) -> ConfigError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename}:{frame.lineno}"
    return _fault(key, f'"{name}" cannot be imported: {type(error).__name__}: {error}', f"see {where}")


def _search_working_directory() -> None:
    """Let modules of the working directory be found. ``torchrun`` and console scripts leave it out."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)
        importlib.invalidate_caches()


def _source_of(target: Any, module: Any) -> Path | None:
    try:
        source = inspect.getsourcefile(target)
    except TypeError:  # an instance, or a builtin
        source = None
    source = source or getattr(module, "__file__", None)
    return Path(source) if source is not None else None


def _origin(module_name: str, source: Path | None) -> str:
    top = module_name.partition(".")[0]
    if source is not None and "site-packages" not in source.parts and "dist-packages" not in source.parts:
        return str(source)
    for package in metadata.packages_distributions().get(top, []):
        return f"{package} {metadata.version(package)}"
    return str(source) if source is not None else top


def _digest(source: Path | None) -> str:
    try:
        return xxhash.xxh3_64_hexdigest(source.read_bytes()) if source is not None else ""
    except OSError:  # a module in a zip file
        return ""


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"? ' if close else ""


def _ways(kind: str, known: Sequence[str]) -> str:
    listed = f"known: {', '.join(known)}; " if known else ""
    return f'{listed}your own {kind} is named "package.module:attribute"'


def _fault(key: str, problem: str, hint: str) -> ConfigError:
    return ConfigError([ConfigIssue(key, problem, hint)])
