"""Shell completion, installed by ``--install-completion`` and used by the TAB key of each real shell."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

RC_FILES = {"bash": ".bashrc", "zsh": ".zshrc", "fish": ".config/fish/config.fish"}
"""Shell -> the file that it reads when it starts, which makes the prompt plain."""
PROMPT = "ready$ "
PROMPTS = {
    "bash": f"PS1='{PROMPT}'\nbind 'set bell-style none'\nbind 'set enable-bracketed-paste off'\n",
    "zsh": f"PS1='{PROMPT}'\n",
    "fish": f"function fish_prompt; echo -n '{PROMPT}'; end\nfunction fish_greeting; end\n",
}
DEADLINE_S = 60.0


def shells() -> list[object]:
    return [
        pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"no {name} here"))
        for name in RC_FILES
    ]


class Terminal:
    """An interactive shell in a terminal of its own."""

    def __init__(self, shell: str, home: Path) -> None:
        self._seen = ""
        pid, self._fd = pty.fork()
        if pid == 0:
            environ = {**os.environ, "HOME": str(home), "TERM": "dumb", "SHELL": shutil.which(shell) or ""}
            for name in ("ZDOTDIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "BASH_ENV"):
                environ.pop(name, None)
            os.chdir(home)
            os.execvpe(shell, [shell, "-i"], environ)
        self._pid = pid

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the output matches, and return what was read until then. Fail after ``DEADLINE_S``."""
        deadline = time.monotonic() + DEADLINE_S
        while (found := re.search(pattern, self._seen, re.S)) is None:
            assert time.monotonic() < deadline, self._seen
            if select.select([self._fd], [], [], 1.0)[0]:
                self._seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(self._fd, 4096).decode())
        before, self._seen = self._seen[: found.end()], self._seen[found.end() :]
        return before

    def close(self) -> None:
        os.close(self._fd)  # hangs the shell up
        os.waitpid(self._pid, 0)


@pytest.fixture(params=shells())
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A shell whose home is ``tmp_path`` and has completion installed, by the shell itself."""
    name = request.param
    file = tmp_path / RC_FILES[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    programs = Path(sys.executable).parent
    path = f"set -gx PATH {programs} $PATH" if name == "fish" else f'export PATH="{programs}:$PATH"'
    file.write_text(f"{path}\n{PROMPTS[name]}")
    # fish would otherwise index all man pages in the background.
    (tmp_path / ".local/share/fish/generated_completions").mkdir(parents=True)
    terminal = Terminal(name, tmp_path)
    try:
        terminal.wait_for(re.escape(PROMPT))
        terminal.type("kempnerforge --install-completion\n")
        terminal.wait_for("completion works in")
    finally:
        terminal.close()
    return name


def test_completion_tab_completes_commands_and_groups(shell: str, tmp_path: Path) -> None:
    (tmp_path / "some_run_folder").mkdir()
    terminal = Terminal(shell, tmp_path)
    try:
        terminal.wait_for(re.escape(PROMPT))
        # What each line completes to is one name, which the shell writes out.
        for typed, completed in [
            ("kempnerforge unb\t", "kempnerforge unblock"),
            ("kempnerforge ckpt expl\t", "kempnerforge ckpt explain"),
            ("kempnerforge config check --world\t", "kempnerforge config check --world-size"),
            ("kempnerforge ckpt ls some_r\t", "kempnerforge ckpt ls some_run_folder"),
        ]:
            terminal.type(typed)
            terminal.wait_for(re.escape(completed))
            terminal.type("\x15")  # erase the line
    finally:
        terminal.close()


@pytest.mark.smoke
def test_completion_of_commands_imports_none_of_them() -> None:
    """What bash calls at a TAB."""
    code = (
        "import sys\nsys.argv = ['kempnerforge']\nfrom kempnerforge.cli.app import main\n"
        "try:\n    main()\nfinally:\n    print(*(name for name in sys.modules if name in "
        "('torch', 'numpy', 'wandb') or name.startswith('kempnerforge.cli.')))\n"
    )
    asked = {"COMP_WORDS": "kempnerforge c", "COMP_CWORD": "1", "_KEMPNERFORGE_COMPLETE": "complete_bash"}
    done = run([sys.executable, "-c", code], **asked)
    *names, loaded = done.stdout.splitlines()
    assert names == ["ckpt", "config"]
    assert {name.rpartition(".")[2] for name in loaded.split()} == {"app", "completion", "lazy"}


@pytest.mark.smoke
def test_completion_of_unknown_shell_is_refused() -> None:
    done = run(["sh", "-c", f"{sys.executable} -m kempnerforge --show-completion; exit $?"], SHELL="/bin/sh")
    assert done.returncode == 2
    expected = r"--show-completion: does not support (sh|dash|busybox); run it in bash, zsh or fish\n"
    assert re.fullmatch(expected, done.stderr)


def run(command: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environ})
