"""``kempnerforge ckpt``: look after the checkpoints of a run, from any machine that sees its folder.

No command needs torch, and all work while the run is writing: a step that goes away between listing and
reading is left out.
"""

from __future__ import annotations

import typer

from kempnerforge.cli import ckpt_check, ckpt_keep, ckpt_list, ckpt_look, timeline, weights

app = typer.Typer(help="Look at, check, compare and prune checkpoints.", no_args_is_help=True)

for command in (
    ckpt_list.ls,
    ckpt_look.inspect,
    ckpt_check.verify,
    ckpt_check.diff,
    ckpt_list.explain,
    ckpt_keep.pin,
    ckpt_keep.unpin,
    ckpt_keep.prune,
    ckpt_look.du,
    timeline.rollback,
    timeline.fork,
    weights.export,
):
    app.command()(command)
