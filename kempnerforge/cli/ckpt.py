"""``kempnerforge ckpt``: manage the checkpoints of a run from any machine that can access its folder.

No command imports torch. All commands work while the run is writing: a step that disappears between
listing and reading is skipped.
"""

from __future__ import annotations

from typing import ClassVar

import typer

from kempnerforge.cli.lazy import LazyGroup, Member


class Commands(LazyGroup):
    """All commands of the group."""

    members: ClassVar = {
        "ls": Member(
            "ckpt_list",
            "ls",
            "List the steps of RUN: age, size, why each was saved, why it is kept, whether it is ok.",
        ),
        "inspect": Member(
            "ckpt_inspect",
            "inspect",
            "Show the contents of a step: origin, files, tensors, layout, versions, train state.",
        ),
        "verify": Member(
            "ckpt_verify",
            "verify",
            "Verify every byte of a step, or of all steps of a run. Exit status 0: all ok, 1: one is "
            "corrupt.",
        ),
        "diff": Member(
            "ckpt_verify",
            "diff",
            "Compare two steps: config, layout, versions, train state, tensors.",
        ),
        "explain": Member(
            "ckpt_explain",
            "explain",
            "Show which rule keeps each step of RUN; with STEP, why that step exists or does not.",
        ),
        "pin": Member(
            "ckpt_prune", "pin", "Keep a step of RUN until it is unpinned. Works while the run is writing."
        ),
        "unpin": Member("ckpt_prune", "unpin", "Apply the run's retention rules to a pinned step again."),
        "prune": Member(
            "ckpt_prune",
            "prune",
            "Delete the steps of RUN that its config does not keep, as a run does after each save.",
        ),
        "du": Member(
            "ckpt_inspect",
            "du",
            "Show the disk usage of every step of RUN (model, optimizer, rng, other) and of other folders.",
        ),
        "rollback": Member(
            "ckpt_rollback",
            "rollback",
            "Roll RUN back to STEP: move later steps aside, so that the same command resumes from it.",
        ),
        "fork": Member(
            "ckpt_rollback",
            "fork",
            "Create NEW_RUN, a new run that continues from STEP_DIR. STEP_DIR is not changed.",
        ),
        "export": Member(
            "weights",
            "export",
            "Export the weights of a step, saved under any layout, to a folder that other tools can load.",
        ),
    }


app = typer.Typer(
    cls=Commands,
    help="Inspect, verify, compare and prune checkpoints.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _group() -> None:
    pass
