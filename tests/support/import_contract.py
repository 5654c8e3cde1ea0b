"""Find violations of the import contract: layers, separate packages, torch-free parts, sizes, and names.

The syntax tree is examined, so that imports inside functions are found too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "kempnerforge"

LAYERS = (
    (
        *("errors", "forked_children", "fsio", "hostlist", "printable", "process_identity"),
        *("python_process", "rank_variables", "torch_compat", "write_behind"),
    ),
    ("plugins",),
    ("config", "log_setup"),
    ("distributed", "model", "data", "telemetry", "slurm", "goodput", "plan"),
    ("parallel", "checkpoint"),
    ("launch",),
    ("train",),
    ("cli",),
    ("__main__",),
)
NEVER = {"checkpoint": ("model", "data", "train", "telemetry", "goodput.crash_loop_guard")}
"""Package -> packages and modules that it never imports."""
NEVER_NAMED = {"checkpoint": ("wandb", "train/loss")}
"""Package -> words that do not occur in it: what only other packages know."""
KEYS_ON_DISK = ('"wandb_id"', '"wandb_first_attempt"')
"""Keys of ``run.json`` from format 1, which ``checkpoint.run.metadata`` translates."""
BANNED_NAMES = {"utils", "helpers", "common"}

PRIVATE_TORCH = "torch_compat"
"""The one module that imports private names of torch."""

IMPORT_CALLS = ("importlib.import_module", "import_module", "__import__")

ROOMS = {
    "checkpoint": (
        ("results", "cuda", "format"),
        ("state", "run"),
        ("retention", "schedule", "save"),
        ("load", "tools", "async_save"),
        ("save_coordinator", "manager_arguments"),
        ("manager",),
    )
}
"""Layers within a package: a module imports only from earlier lines, and from its own sub-package."""

# These import torch nowhere, not even inside a function.
NO_TORCH = (
    *("errors", "forked_children", "fsio", "hostlist", "log_setup", "plugins", "printable"),
    *("process_identity", "python_process", "rank_variables", "write_behind"),
    *("config", "goodput", "slurm", "plan", "launch", "model.hf", "train.preflight"),
    *(
        "checkpoint.format",
        "checkpoint.run",
        "checkpoint.retention",
        "checkpoint.schedule",
        "checkpoint.tools",
    ),
    *("checkpoint.load.load_path",),
)
TORCH_AFTER_ALL = (
    *("checkpoint.format.dtypes", "checkpoint.run.versions"),
    *("checkpoint.run.attempt_start", "checkpoint.run.own_run"),
)
# These do not import torch when they are imported. A command or a device may import it later.
NO_TORCH_AT_IMPORT = ("cli", "telemetry")

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 70


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    target: str
    line: int
    at_import: bool
    """Whether the import happens when the module itself is imported."""


@dataclass(frozen=True)
class Module:
    """One parsed file of the package."""

    name: str
    path: Path
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def part(self) -> str:
        """The package or top-level module that it belongs to, such as ``checkpoint``; empty for the root."""
        return part_of(self.name)


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def load(root: Path) -> dict[str, Module]:
    paths = sorted((root / PACKAGE).rglob("*.py"))
    names = {module_name(root, path): path for path in paths}
    modules = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(), filename=str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        modules[name] = Module(name, path, tree, tuple(find_imports(tree, package, names)))
    return modules


def find_imports(
    tree: ast.AST, package: str, known: dict[str, Path], at_import: bool = True
) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, package)
            for alias in node.names:
                # ``from package import module`` imports the module.
                full = f"{base}.{alias.name}"
                yield Import(full if full in known else base, node.lineno, at_import)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "__import__",
        ):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, node.lineno, at_import)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            deferred = True
        yield from find_imports(node, package, known, at_import and not deferred)


def absolute(node: ast.ImportFrom, package: str) -> str:
    if node.level == 0:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def violations(root: Path) -> list[str]:
    """Return all violations of the contract in the package under ``root``."""
    modules = load(root)
    found = []
    for module in modules.values():
        where = module.path.relative_to(root)
        found += [f"{where}: {fault}" for fault in name_faults(module)]
        found += [f"{where}:{line}: {fault}" for line, fault in layer_faults(module)]
        found += [f"{where}:{line}: {fault}" for line, fault in word_faults(module)]
        found += [f"{where}:{line}: {fault}" for line, fault in room_faults(module)]
        found += [f"{where}:{line}: {fault}" for line, fault in torch_faults(module, modules)]
        found += [f"{where}:{line}: {fault}" for line, fault in private_torch_faults(module)]
        found += [f"{where}: {fault}" for fault in size_faults(module)]
    return found


def name_faults(module: Module) -> Iterator[str]:
    if BANNED_NAMES & set(module.name.split(".")):
        yield "a module is named after what it does; utils, helpers and common say nothing"
    if module.part and not any(module.part in layer for layer in LAYERS):
        yield f"{module.part} stands in no layer"


def layer_faults(module: Module) -> Iterator[tuple[int, str]]:
    own = layer_of(module.part)
    for imported in module.imports:
        if imported.target.split(".")[0] != PACKAGE:
            continue
        part = part_of(imported.target)
        if part == module.part or (not module.part and not imported.at_import):
            continue  # the root exports names of the package, and imports them at their first use
        inner = imported.target.partition(".")[2]
        if banned := [name for name in NEVER.get(module.part, ()) if f"{inner}.".startswith(f"{name}.")]:
            yield imported.line, f"{module.part} never imports {banned[0]}"
        elif layer_of(part) > own:
            yield imported.line, f"{module.part or 'the root'} imports {part}, which is a layer above it"
        elif layer_of(part) == own:
            yield imported.line, f"{module.part} imports {part}, which is in the same layer"


def word_faults(module: Module) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(module.path.read_text().splitlines(), start=1):
        if module.name == f"{PACKAGE}.checkpoint.run.metadata":
            for key in KEYS_ON_DISK:
                line = line.replace(key, "")
        for word in NEVER_NAMED.get(module.part, ()):
            if word in line:
                yield number, f"{module.part} never names {word}"


def room_faults(module: Module) -> Iterator[tuple[int, str]]:
    floors = ROOMS.get(module.part)
    own = room_of(module.name)
    if floors is None or not own:
        return
    if layer_of(own, floors) < 0:
        yield 1, f"{own} stands in no layer of {module.part}"
        return
    for imported in module.imports:
        room = room_of(imported.target)
        if part_of(imported.target) != module.part or not room or room == own:
            continue
        if layer_of(room, floors) >= layer_of(own, floors):
            yield imported.line, f"{own} imports {room}, which is not in an earlier layer of {module.part}"


def room_of(name: str) -> str:
    """Return the first name below the package: ``format`` for ``kempnerforge.checkpoint.format.paths``."""
    return [*name.split("."), "", "", ""][2]


def layer_of(part: str, layers: Sequence[tuple[str, ...]] = LAYERS) -> int:
    """Return the number of the layer. The root package is below all layers."""
    return next((number for number, layer in enumerate(layers) if part in layer), -1)


def torch_faults(module: Module, modules: dict[str, Module]) -> Iterator[tuple[int, str]]:
    inner = module.name.partition(".")[2]
    if is_torch_free(inner):
        direct = [imported for imported in module.imports if is_torch(imported.target)]
        yield from (
            (imported.line, "imports torch, and must not even inside a function") for imported in direct
        )
    elif module.part not in NO_TORCH_AT_IMPORT:
        return
    chain = chain_to_torch(module.name, modules)
    if chain:
        yield 1, f"importing it loads torch: {' -> '.join(chain)}"


def private_torch_faults(module: Module) -> Iterator[tuple[int, str]]:
    """Find imports of private modules and names of torch outside ``torch_compat``."""
    if module.part == PRIVATE_TORCH:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if is_torch(name) and any(part.startswith("_") for part in name.split(".")):
                yield node.lineno, f"imports the private {name}: import it in {PRIVATE_TORCH} instead"


def is_torch_free(inner: str) -> bool:
    """Return whether a module, named without the package, must not import torch even inside a function."""
    return inner not in TORCH_AFTER_ALL and any(f"{inner}.".startswith(f"{name}.") for name in NO_TORCH)


def is_torch(target: str) -> bool:
    return target.split(".")[0] == "torch"


def chain_to_torch(start: str, modules: dict[str, Module]) -> list[str]:
    """Return the modules through which importing ``start`` loads torch; empty if it does not."""
    seen = {start}
    chains = [[start]]
    while chains:
        chain = chains.pop(0)
        name = chain[-1]
        parents = [name.rpartition(".")[0]] if "." in name else []
        loaded = [imported.target for imported in modules[name].imports if imported.at_import]
        for target in [*parents, *loaded]:
            if is_torch(target):
                return [*chain, target]
            if target in modules and target not in seen:
                seen.add(target)
                chains.append([*chain, target])
    return []


def size_faults(module: Module) -> Iterator[str]:
    lines = len(module.path.read_text().splitlines())
    if lines > MAX_MODULE_LINES:
        yield f"{lines} lines; at most {MAX_MODULE_LINES}"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.name} has {length} lines; at most {MAX_FUNCTION_LINES}"
