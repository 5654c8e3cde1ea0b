"""Shared by tests of the wandb sink: a sink, a reader of its fragments, and a small server for the client."""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.telemetry import wandb_sink
from kempnerforge.telemetry.wandb_sink import WandbSink

FAKE_KEY = "k" * 40
ENTITY = {"id": "e", "name": "us"}


def as_a_user_without_settings(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Hide the wandb settings of this machine's user."""
    home.mkdir()
    patch.setenv("HOME", str(home))
    patch.delenv("WANDB_MODE", raising=False)
    patch.delenv("NETRC", raising=False)
    patch.setenv("WANDB_X_DISABLE_STATS", "true")  # its process outlives a killed client by seconds


class Told(logging.Handler):
    """Collects what a sink logs, until the next one is made."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message, by its level."""
        kept = self.warnings if record.levelno >= logging.WARNING else self.notes
        kept.append(record.getMessage())


def make_sink(folder: Path, told: Told, *, attempt: int = 1, first_new_step: int = 0) -> WandbSink:
    wandb_sink.log.handlers = [told]
    wandb_sink.log.setLevel(logging.INFO)
    return WandbSink(
        folder,
        "proj",
        "a run",
        "run0001",
        {"train": {"max_steps": 8}},
        attempt,
        place={"hosts": [f"node{attempt}"], "slurm_job_id": "7", "slurm_restart_count": attempt - 1},
        first_new_step=first_new_step,
    )


def fragments(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def records(fragment: Path) -> list[dict[str, Any]]:
    """Return all records of a run's transaction log, read by wandb's own tool."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(fragment)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def history(fragment: Path) -> dict[int, dict[str, Any]]:
    items = [record["history"]["item"] for record in records(fragment) if record["type"] == "history"]
    assert len({item["_step"] for item in items}) == len(items)
    return {item["_step"]: item for item in items}


class WandbServer(ThreadingHTTPServer):
    """The part of a wandb server that the client needs: runs, resume status, and history lines."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WandbRequest)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.run_names: list[str] = []
        self.configs: list[dict[str, Any]] = []
        self.history: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.refuse_from_step = math.inf
        """The server answers 404 to rows from this step on."""

    def answer_query(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL answer; empty for a query that only reports."""
        if operation == "RunResumeStatus":
            known = variables["name"] in self.run_names
            return {
                "model": {
                    "id": "m",
                    "name": "proj",
                    "entity": ENTITY,
                    "bucket": self.status() if known else None,
                }
            }
        if operation == "UpsertBucket":
            self.run_names.append(variables["name"])
            self.configs.append(json.loads(variables["config"] or "{}"))
            project = {"id": "m", "name": variables["project"], "entity": ENTITY}
            bucket = {"id": "b", "name": variables["name"], "displayName": "a run", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "u", "username": "us", "entity": ENTITY["name"], "flags": "{}"}}
        if operation in ("Run", "RunHistoryKeys"):
            newest = self.history[-1]["_step"] if self.history else -1
            run = {"id": "b", "name": self.run_names[0], "displayName": "a run", "state": "finished"}
            run |= {"user": {}, "historyKeys": {"lastStep": newest}, "tags": []}
            return {"project": {"internalId": "1", "run": run}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def status(self) -> dict[str, Any]:
        """Return the answer to a client that resumes this run."""
        newest = [json.dumps(self.history[-1])] if self.history else []
        return {
            "id": "b",
            "name": self.run_names[0],
            "displayName": "a run",
            "summaryMetrics": json.dumps(self.history[-1] if self.history else {}),
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(newest),
            "eventsTail": "[]",
            "config": json.dumps(self.configs[-1]),
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {}}),  # without it, the client considers the run as never started
        }

    def take_stream(self, body: dict[str, Any]) -> bool:
        """Store history lines at the offset that the client names. Return False if they are refused."""
        stream = body.get("files", {}).get("wandb-history.jsonl")
        if stream:
            lines = [json.loads(line) for line in stream["content"]]
            taken = [line for line in lines if line["_step"] < self.refuse_from_step]
            self.history[stream["offset"] :] = taken
            if taken != lines:
                return False
        if body.get("complete"):
            self.exit_codes.append(body["exitcode"])
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""


class WandbRequest(BaseHTTPRequestHandler):
    """One request of the client. Unknown requests are answered with an empty object."""

    protocol_version = "HTTP/1.1"
    server: WandbServer  # type: ignore[assignment]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        accepted = True
        if self.path == "/graphql":
            query = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            name = query.get("operationName") or (named[1] if named else "")
            answer = {"data": self.server.answer_query(name, query.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            accepted = self.server.take_stream(json.loads(body))
        payload = json.dumps(answer).encode()
        self.send_response(200 if accepted else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output quiet."""
