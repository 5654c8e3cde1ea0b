"""A user's own loop around ``CheckpointManager``, as in the README: ``python own_loop.py JSON``.

The keys of JSON are ``folder``, ``max_steps``, ``checkpoint`` (a table of the config), ``step_s``
(a pause in each step), ``raise_at`` and ``hang_at`` (a step before which the loop raises, or prints
"hangs" and waits to be killed), ``write_s`` (a pause in each write), ``finish`` and ``leave``
(whether the loop calls ``finish`` and leaves the ``with`` block).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent


def command(**settings: Any) -> list[str]:
    """Return the command that starts such a loop."""
    return [sys.executable, str(Path(__file__)), json.dumps(settings, default=str)]


def run(**settings: Any) -> subprocess.CompletedProcess[str]:
    """Run such a loop until it ends in any way."""
    return subprocess.run(
        command(**settings), capture_output=True, text=True, timeout=120, check=False, env=environment()
    )


def start(**settings: Any) -> subprocess.Popen[str]:
    """Start such a loop."""
    return subprocess.Popen(
        command(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def main(settings: dict[str, Any]) -> None:
    import torch

    from kempnerforge import CheckpointConfig, CheckpointManager, TrainState
    from kempnerforge.checkpoint.save.writer_client import Writer

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if write_s := settings.get("write_s"):
        write = Writer.write

        def slow(*arguments: Any, **more: Any) -> Any:
            time.sleep(write_s)
            return write(*arguments, **more)

        Writer.write = slow
    torch.manual_seed(5)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    state = TrainState(model=model, optimizer=optimizer)
    config = CheckpointConfig.model_validate({"async_mode": "async", **settings["checkpoint"]})
    with contextlib.ExitStack() as leaving:
        ckpt = CheckpointManager(config, state=state, run_dir=Path(settings["folder"]))
        if settings.get("leave", True):
            leaving.enter_context(ckpt)
        ckpt.resume(state)
        while state.step < settings["max_steps"]:
            if state.step == settings.get("raise_at"):
                raise ValueError("the loop is broken")
            if state.step == settings.get("hang_at"):
                print("hangs", flush=True)
                time.sleep(600)
            model(torch.randn(4, 8)).square().mean().backward()
            ckpt.wait_for_staging()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(settings.get("step_s", 0.0))
            state.advance()
            ckpt.after_step(state)
        if settings.get("finish", True):
            ckpt.finish(state)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
