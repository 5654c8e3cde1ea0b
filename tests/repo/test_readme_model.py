"""The model of one's own on README's first page, and that of the guide, fit a config as they are written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kempnerforge.cli.app import app

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "## Your own model"), ("docs/guide/own-model.md", "# Your own model")]
)
def test_own_model_of_docs_fits_config(
    page: str, heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / page).read_text().partition(heading)[2]
    code, config = (re.search(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S) for kind in ("python", "toml"))
    assert code is not None
    assert config is not None
    (tmp_path / "my_models.py").write_text(code[1])
    (tmp_path / "bigram.toml").write_text(config[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    checked = CliRunner().invoke(app, ["config", "check", "bigram.toml", "--world-size", "2"])
    assert checked.exit_code == 0, checked.output
    assert "33,153 parameters in my_models:Bigram" in checked.output
