"""The package keeps its layers, and the checker that says so finds every kind of fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.import_contract import NO_TORCH_AT_IMPORT, PACKAGE, is_torch_free, load, violations

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]


def test_import_contract_package_complies() -> None:
    assert violations(ROOT) == []


def test_import_contract_torch_free_modules_load_no_torch() -> None:
    """The same by experiment: third parties that import torch are found too."""
    names = [
        name
        for name in load(ROOT)
        if is_torch_free(inner := name.partition(".")[2]) or inner.split(".")[0] in NO_TORCH_AT_IMPORT
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


SOUND = {
    "__init__.py": "def __getattr__(name):\n    from kempnerforge.checkpoint.state import train_state\n",
    "errors.py": "",
    "config/__init__.py": "from kempnerforge import errors\n",
    "config/schema.py": "from .. import errors\nfrom . import section\n",
    "config/section.py": "",
    "model/__init__.py": "",
    "model/llama.py": "import torch\nfrom kempnerforge.config.schema import JobConfig\n",
    "data/__init__.py": "",
    "torch_compat.py": "from torch.distributed.distributed_c10d import _world as c10d_world\n",
    "checkpoint/__init__.py": "",
    "checkpoint/format/__init__.py": "",
    "checkpoint/format/paths.py": "from kempnerforge import config\n",
    "checkpoint/state/__init__.py": "",
    "checkpoint/state/train_state.py": "import torch\nfrom kempnerforge.distributed import mesh\n",
    "distributed/__init__.py": "",
    "distributed/mesh.py": "import torch\n",
    "telemetry/__init__.py": "",
    "telemetry/spans.py": "def now():\n    import torch\n",
    "cli/__init__.py": "",
    "cli/app.py": "def run():\n    from kempnerforge.checkpoint.state import train_state\n",
}

# What is added or replaced in a sound tree, and what must be said about it.
FAULTS = {
    "upward": (
        {"model/llama.py": "import kempnerforge.train.loop\n"},
        "model imports train, which is a layer above",
    ),
    "upward, lazy": (
        {"config/schema.py": "def f():\n    from kempnerforge.model import llama\n"},
        "config imports model, which is a layer above",
    ),
    "upward, relative": (
        {"data/a.py": "from ..cli import app\n"},
        "data imports cli, which is a layer above",
    ),
    "upward, for types only": (
        {"data/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kempnerforge.train\n"},
        "data imports train, which is a layer above",
    ),
    "upward, by name": (
        {"data/a.py": "import importlib\nx = importlib.import_module('kempnerforge.train')\n"},
        "data imports train, which is a layer above",
    ),
    "sideways": (
        {"data/a.py": "from kempnerforge.model.llama import Llama\n"},
        "data imports model, which is in the same layer",
    ),
    "sideways through the root": (
        {"data/a.py": "from kempnerforge import model\n"},
        "data imports model, which is in the same layer",
    ),
    "the root": ({"__init__.py": "from kempnerforge import errors\n"}, "the root imports errors"),
    "checkpoint": (
        {"checkpoint/state/train_state.py": "def f():\n    from kempnerforge.data import loader\n"},
        "checkpoint never imports data",
    ),
    "checkpoint, one module": (
        {
            "goodput/__init__.py": "",
            "goodput/crash_loop_guard.py": "",
            "checkpoint/state/train_state.py": "from kempnerforge.goodput import crash_loop_guard\n",
        },
        "checkpoint never imports goodput.crash_loop_guard",
    ),
    "checkpoint, a word": (
        {"checkpoint/format/paths.py": "def f(row):\n    return row['train/loss']\n"},
        "checkpoint/format/paths.py:2: checkpoint never names train/loss",
    ),
    "checkpoint, a key elsewhere": (
        {"checkpoint/format/paths.py": 'KEY = "wandb_id"\n'},
        "checkpoint never names wandb",
    ),
    "upward in a package": (
        {"checkpoint/format/paths.py": "from kempnerforge.checkpoint.state import train_state\n"},
        "format imports state, which is not in an earlier layer of checkpoint",
    ),
    "sideways in a package": (
        {"checkpoint/run/lease.py": "def f():\n    from kempnerforge.checkpoint.state import train_state\n"},
        "run imports state, which is not in an earlier layer of checkpoint",
    ),
    "no layer in a package": ({"checkpoint/misc.py": ""}, "misc stands in no layer of checkpoint"),
    "no layer": ({"misc/a.py": ""}, "misc stands in no layer"),
    "banned name": ({"train/utils.py": ""}, "utils, helpers and common say nothing"),
    "torch, directly": ({"config/section.py": "import torch.nn\n"}, "config/section.py:1: imports torch"),
    "torch, lazily": (
        {"checkpoint/format/paths.py": "def f():\n    from torch import nn\n"},
        "checkpoint/format/paths.py:2: imports torch",
    ),
    "torch, through another module": (
        {"checkpoint/format/paths.py": "from kempnerforge.distributed import mesh\n"},
        "loads torch: kempnerforge.checkpoint.format.paths -> kempnerforge.distributed.mesh -> torch",
    ),
    "torch, through the package": (
        {"checkpoint/format/__init__.py": "from kempnerforge.checkpoint.state import train_state\n"},
        "paths -> kempnerforge.checkpoint.format -> kempnerforge.checkpoint.state.train_state -> torch",
    ),
    "torch, in a command": (
        {"cli/app.py": "from kempnerforge.checkpoint.state import train_state\n"},
        "loads torch: kempnerforge.cli.app -> kempnerforge.checkpoint.state.train_state -> torch",
    ),
    "private module of torch": (
        {"data/a.py": "def f():\n    from torch.distributed._shard.api import ShardedTensor\n"},
        "data/a.py:2: imports the private torch.distributed._shard.api.ShardedTensor: import it in",
    ),
    "private module of torch, whole": (
        {"data/a.py": "import torch._dynamo\n"},
        "imports the private torch._dynamo: import it in torch_compat",
    ),
    "private name of torch": (
        {"data/a.py": "from torch.distributed.distributed_c10d import Store, _world\n"},
        "imports the private torch.distributed.distributed_c10d._world: import it in torch_compat",
    ),
    "long module": ({"data/a.py": "x = 1\n" * 501}, "501 lines; at most 500"),
    "long function": (
        {"data/a.py": "class A:\n    async def f(self):\n" + "        x = 1\n" * 70},
        "f has 71 lines; at most 70",
    ),
}


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_import_contract_check_sound_tree_has_no_faults(tmp_path: Path) -> None:
    write_tree(tmp_path, SOUND)
    assert violations(tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_import_contract_check_finds_each_fault(tmp_path: Path, fault: str) -> None:
    files, expected = FAULTS[fault]
    write_tree(tmp_path, SOUND | files)
    found = violations(tmp_path)
    assert any(expected in line for line in found), found
