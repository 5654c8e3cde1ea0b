"""Fixtures for tests with the real wandb client: ``pytest_plugins = ["support.wandb_fixtures"]``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.wandb_server import FAKE_KEY, WandbServer, as_a_user_without_settings


@pytest.fixture
def fresh_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Hide the settings of this machine's user, and end the client's service process after the test."""
    as_a_user_without_settings(monkeypatch, tmp_path / "home")
    yield
    import wandb

    wandb.teardown()


@pytest.fixture
def server(fresh_client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WandbServer]:
    """A running server, with a key for it in the user's netrc file."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        host = server.url.removeprefix("http://")
        (tmp_path / "home" / ".netrc").write_text(f"machine {host} login user password {FAKE_KEY}\n")
        (tmp_path / "home" / ".netrc").chmod(0o600)
        yield server
        server.shutdown()
        thread.join()
