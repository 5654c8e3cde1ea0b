"""``kempnerforge ckpt``: look after the checkpoints of a run, from any machine that sees its folder.

No command needs torch, and all work while the run is writing: a step that goes away between listing and
reading is left out.
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
            "List the steps of RUN: age, size, what each was saved for, why it is kept, whether it is sound.",
        ),
        "inspect": Member(
            "ckpt_inspect",
            "inspect",
            "Show what a step holds: where it came from, files, tensors, layout, versions, train state.",
        ),
        "verify": Member(
            "ckpt_verify",
            "verify",
            "Check every byte of a step, or of all steps of a run. Exit status 0: all sound, 1: one is "
            "damaged.",
        ),
        "diff": Member(
            "ckpt_verify",
            "diff",
            "Say what differs between two steps: config, layout, versions, train state, tensors.",
        ),
        "explain": Member(
            "ckpt_explain",
            "explain",
            "Say which rule keeps each step of RUN; with STEP, why that step exists or does not.",
        ),
        "pin": Member(
            "ckpt_prune", "pin", "Keep a step of RUN until it is unpinned, also while a run writes there."
        ),
        "unpin": Member("ckpt_prune", "unpin", "Leave a step of RUN to the run's rules again."),
        "prune": Member(
            "ckpt_prune",
            "prune",
            "Delete the steps of RUN that its config does not keep, as a run does after each save.",
        ),
        "du": Member(
            "ckpt_inspect",
            "du",
            "Show the bytes of every step of RUN: model, optimizer, rng, other; and of what is no step.",
        ),
        "rollback": Member(
            "ckpt_rollback",
            "rollback",
            "Go back to STEP of RUN: set later steps aside, so that the same command goes on from it.",
        ),
        "fork": Member(
            "ckpt_rollback",
            "fork",
            "Make NEW_RUN a new run that goes on from STEP_DIR, which stays as it is.",
        ),
        "export": Member(
            "weights",
            "export",
            "Write the weights of a step, of any layout, as a folder that other tools load.",
        ),
    }


app = typer.Typer(
    cls=Commands,
    help="Look at, check, compare and prune checkpoints.",
    no_args_is_help=True,
    add_completion=False,
)


@app.callback()
def _group() -> None:
    pass
