"""``kempnerforge plan`` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
LLAMA = str(ROOT / "configs" / "llama_7b.toml")
FREE = ["--distributed.dp_replicate=1", "--distributed.dp_shard=-1"]


def test_plan_piped_fits_100_columns_without_torch() -> None:
    code = (
        "import sys; from kempnerforge.cli.app import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    layout = ["--distributed.tp=2", "--distributed.pp=2", "--distributed.pp_microbatch_size=2"]
    command = [sys.executable, "-c", code, "plan", LLAMA, *FREE, *layout, "--world-size", "32"]
    done = subprocess.run(
        [*command, "--memory-gb=80"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    # The first line may have a long path in it.
    assert max(map(len, done.stdout.splitlines()[1:])) <= 100
    assert "…" not in done.stdout
    assert "\x1b" not in done.stdout
    for text in (
        "pp 2 x dp_replicate 1 x dp_shard 8 x tp 2",
        "{0-14 by 2}",
        "embedding, layers 0-15",
        "layers 16-31, head",
        "6,738,415,616 parameters",
        "4,194,304 tokens per step",
        "64 x pp_microbatch_size 2 on each of 8 data-parallel ranks",
        "1f1b, 64 microbatches, bubble 1.5 %",
        "fits: ",
    ):
        assert text in done.stdout, text
