"""Former private words of the project must not return. Each one has a standard term."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("kempnerforge", "benchmarks", "scripts", "slurm", "configs", "docs")
SUFFIXES = (".py", ".md", ".toml", ".sh", ".css", "")

NAMES = {
    "AGAIN_AFTER_S": "REPEAT_SIGNAL_AFTER_S",
    "ANNOUNCEMENT": "PREEMPT_WARNING_SIGNAL",
    "AgreedPlan": "SavePlanCache",
    "ArenaSet": "HostBuffers",
    "AttemptBook": "AttemptRecorder",
    "DEAD_BAND": "HYSTERESIS",
    "FOLLOW_S": "POLL_INTERVAL_S",
    "NOT SOUND": "corrupt",
    "Pacer": "SaveIntervalController",
    "PlacedModel": "ParallelModel",
    "Pulse": "SharedProgress",
    "RankPlace": "RankInfo",
    "RoomKeeper": "DiskSpaceGuard",
    "SaveTax": "SaveCost",
    "ShardImage": "ShardLayout",
    "StepClock": "StepTimer",
    "StepFacts": "StepInfo",
    "TaxMeter": "OverheadMeter",
    "Updater": "TrainStepBase",
    "as_agreed": "mark_collective",
    "ask_grace": "query_grace",
    "attempt_note": "describe_attempt",
    "goodbye": "exit_message",
    "hurry": "set_priority",
    "last_words": "on_exit",
    "look_at": "update",
    "names_elsewhere": "remote_tensor_names",
    "quiet_step_s": "baseline_step_s",
    "raise_together": "raise_on_any_error",
    "stood_still": "add_blocking_time",
    "worst_outcome": "most_severe",
}
"""Former name -> the name to use. Matched as whole words, in the same case."""

PHRASES = {
    "goes after the next save": "will be deleted after the next save",
    "no longer count against it": "reset the failure counter",
    "see to it": "fix this",
    "see to the cause": "fix the cause",
    "time between steps that is none": "work between steps",
    "train on it by this": "add this to your config to train on it",
    "worth one that was seen": "weighted as one observed failure",
}
"""Former phrase -> what to write. Matched in any case, also across a line break."""


def _pattern(text: str, *, flags: int = 0) -> re.Pattern[str]:
    words = r"\s+(?:#\s+)?".join(map(re.escape, text.split()))
    return re.compile(rf"\b{words}\b", flags)


PATTERNS = [
    *((_pattern(name), better) for name, better in NAMES.items()),
    *((_pattern(phrase, flags=re.IGNORECASE), better) for phrase, better in PHRASES.items()),
]


def complaints(text: str, where: str) -> Iterator[str]:
    """Yield file, line, the word and its replacement for each former word in ``text``."""
    for pattern, better in PATTERNS:
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f'{where}:{line}: write "{better}" instead of "{" ".join(match[0].split())}"'


def _files() -> list[Path]:
    listed = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    texts = [path for path in listed if path.is_file() and path.suffix in SUFFIXES]
    return sorted([*texts, ROOT / "README.md"])


@pytest.mark.smoke
def test_words_former_private_terms_stay_out() -> None:
    found = [
        complaint
        for path in _files()
        for complaint in complaints(path.read_text(errors="replace"), str(path.relative_to(ROOT)))
    ]
    assert not found, "\n".join(["", *found])


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nsee  to\n# it now", 'x:2: write "fix this" instead of "see to # it"'),
        ("The StepFacts of", 'x:1: write "StepInfo" instead of "StepFacts"'),
        ("stood_still_for and stepfacts", None),
    ],
)
def test_words_complaint_names_line_and_replacement(text: str, expected: str | None) -> None:
    assert list(complaints(text, "x")) == ([expected] if expected else [])
