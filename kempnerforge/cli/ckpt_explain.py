"""``kempnerforge ckpt explain``: why a step is kept, or why it does not exist."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention import pins
from kempnerforge.checkpoint.retention.policy import BestN, Verdict, decide
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.tools.step_history import Absence, RunFacts, explain_absence, read_facts
from kempnerforge.cli import formatting as text
from kempnerforge.cli.ckpt_list import manifest_of, verdict_json
from kempnerforge.cli.ckpt_paths import (
    AsJson,
    CheckpointFolder,
    FoundPolicy,
    RunPath,
    find_policy,
    find_run,
    parse_step,
)
from kempnerforge.goodput.event_log import Event


def explain(
    run: RunPath,
    step: Annotated[
        str | None, typer.Argument(metavar="STEP", help="Number of a step, which need not exist.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which rule keeps each step of RUN; with STEP, why that step exists or does not."""
    checkpoints = find_run(run)
    number = parse_step(step) if step is not None else None
    listed = paths.list_folder(checkpoints.folder).steps
    policy = find_policy(checkpoints, listed)
    verdicts = decide(
        Retention(checkpoints.folder, policy.policy, checkpoints.owner).survey(listed), policy.policy
    )
    if number is not None:
        _explain_one(checkpoints, policy, verdicts, number, as_json=as_json)
        return
    steps = {verdict.step for verdict in verdicts}
    lost_pins = sorted(step for step in pins.read(checkpoints.folder) if step not in steps)
    if as_json:
        body = {
            "folder": str(checkpoints.folder),
            **_policy_json(policy),
            "steps": [verdict_json(verdict) for verdict in verdicts],
            "pins_without_step": lost_pins,
        }
        text.print_json(body)
        return
    typer.echo(_policy_in_words(policy))
    for verdict in verdicts:
        typer.echo(f"step {verdict.step}: {_verdict_in_words(checkpoints, policy, verdict)}")
    for lost in lost_pins:
        typer.echo(f"step {lost} is pinned but does not exist")


def _explain_one(
    checkpoints: CheckpointFolder, policy: FoundPolicy, verdicts: list[Verdict], step: int, *, as_json: bool
) -> None:
    verdict = next((verdict for verdict in verdicts if verdict.step == step), None)
    facts = (
        read_facts(checkpoints.run_dir, checkpoints.folder) if checkpoints.run_dir is not None else RunFacts()
    )
    absence = explain_absence(step, facts, policy.config)
    if verdict is not None:
        state = "kept" if verdict.keep else "goes" if policy.source else "not known"
        absence = Absence(state, _verdict_in_words(checkpoints, policy, verdict), absence.events)
    saved = _saved_in_words(checkpoints, step) if verdict is not None else ""
    if as_json:
        body = {
            "folder": str(checkpoints.folder),
            "step": step,
            "is_there": verdict is not None,
            "state": absence.state,
            "why": absence.text,
            "saved": saved or None,
            "reasons": [asdict(reason) for reason in verdict.reasons] if verdict is not None else [],
            "events": list(absence.events),
            **_policy_json(policy),
        }
        text.print_json(body)
        return
    if verdict is not None:
        typer.echo(f"step {step}: {absence.text}")
        if saved:
            typer.echo(f"  {saved}")
        typer.echo(f"  {_policy_in_words(policy)}")
    else:
        typer.echo(f"step {step} does not exist ({absence.state}): {absence.text}")
    for event in absence.events:
        typer.echo(f"  {_event_in_words(event)}")


def _policy_json(policy: FoundPolicy) -> dict[str, Any]:
    return {
        "policy": [rule.describe() for rule in policy.policy.rules] if policy.source else None,
        "policy_from": policy.source or None,
        "policy_problem": policy.problem or None,
    }


def _policy_in_words(policy: FoundPolicy) -> str:
    if not policy.source:
        return f"the retention rules are unknown: {policy.problem}"
    rules = "; ".join(rule.describe() for rule in policy.policy.rules)
    return f"retention rules, from the config in {policy.source}: {rules}"


def _verdict_in_words(checkpoints: CheckpointFolder, policy: FoundPolicy, verdict: Verdict) -> str:
    if verdict.keep:
        return f"kept: {'; '.join(reason.text for reason in verdict.reasons)}"
    if not policy.source:
        return "not known"
    manifest = manifest_of(checkpoints.step(verdict.step))
    missing = [
        rule.metric
        for rule in policy.policy.rules
        if isinstance(rule, BestN) and manifest and rule.metric not in manifest.provenance.metrics
    ]
    note = f" ({', '.join(missing)} was not measured at this step)" if missing else ""
    return f"will be deleted after the next save: no rule keeps it{note}"


def _saved_in_words(checkpoints: CheckpointFolder, step: int) -> str:
    manifest = manifest_of(checkpoints.step(step))
    if manifest is None:
        return ""
    origin = manifest.provenance
    return (
        f"saved for: {origin.reason}, by attempt {origin.attempt} of run {origin.run_id or 'unknown'}, "
        f"{text.age(manifest.time)} ago"
    )


def _event_in_words(event: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    kind = event["event"]
    if kind == "put_off":
        first, last = event["from_step"], event["to_step"]
        what = f"put off at step {first}" if last == first else f"put off from step {first} on"
        what += f", until step {last}" if last not in (None, first) else ""
    elif kind == "deleted":
        what = "deleted"
    else:
        what = {"commit": "committed", "failed": "save failed", "skipped": "save skipped"}[kind]
        what += f" ({event['reason']})"
    return f"{when}, attempt {event['attempt']}: {what}"
