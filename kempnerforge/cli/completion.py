"""``--install-completion``: what makes the TAB key of a shell complete commands, options and files.

The scripts call the program with ``_KEMPNERFORGE_COMPLETE``, which typer answers. They are not
typer's own: its script for zsh completes nothing at the first TAB of a session.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer

from kempnerforge import fsio
from kempnerforge.errors import ConfigError, ConfigIssue

VARIABLE = "_KEMPNERFORGE_COMPLETE"
SCRIPTS = {
    "bash": """\
_kempnerforge_completion() {
    local IFS=$'\\n'
    COMPREPLY=($(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" \\
        _KEMPNERFORGE_COMPLETE=complete_bash "$1"))
}
complete -o default -F _kempnerforge_completion kempnerforge
""",
    "zsh": """\
#compdef kempnerforge
_kempnerforge_completion() {
    eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _KEMPNERFORGE_COMPLETE=complete_zsh "${words[1]}")
}
compdef _kempnerforge_completion kempnerforge
# At the first TAB of a session, zsh loads this file as the function that it calls.
(( $+compstate )) && _kempnerforge_completion "$@"
""",
    "fish": """\
function __kempnerforge_complete
    env _KEMPNERFORGE_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=$argv[1] \\
        _TYPER_COMPLETE_ARGS=(commandline -cp) kempnerforge
end
complete --command kempnerforge --no-files --arguments "(__kempnerforge_complete get-args)" \\
    --condition "__kempnerforge_complete is-args"
""",
}


def install(wanted: bool) -> None:
    """Install completion for the shell that runs the program, if ``wanted``, and exit."""
    if not wanted:
        return
    shell = _shell("--install-completion")
    home = Path.home()
    if shell == "fish":
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish" / "completions"
        script, rc, line = folder / "kempnerforge.fish", None, ""
    elif shell == "zsh":
        script = home / ".zfunc" / "_kempnerforge"
        rc = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        line = "fpath+=~/.zfunc; autoload -Uz compinit; compinit"
    else:
        script, rc = home / ".bash_completions" / "kempnerforge.sh", home / ".bashrc"
        line = "source ~/.bash_completions/kempnerforge.sh"
    fsio.make_folder(script.parent)
    fsio.atomic_write(script, SCRIPTS[shell].encode())
    if rc is not None and line not in (rc.read_text().splitlines() if rc.exists() else []):
        # A link, as programs that manage such files make, is followed.
        with os.fdopen(fsio.open_file(rc.resolve(), os.O_WRONLY | os.O_APPEND), "w") as file:
            file.write(f"\n{line}\n")
    added = f" and a line to {rc}" if rc is not None else ""
    typer.echo(f"wrote {script}{added}: completion works in {shell} sessions that begin from now on")
    raise typer.Exit


def show(wanted: bool) -> None:
    """Print the script for the shell that runs the program, if ``wanted``, and exit."""
    if wanted:
        typer.echo(SCRIPTS[_shell("--show-completion")], nl=False)
        raise typer.Exit


def register_shells() -> None:
    """Enable typer's answers to the shells, if a shell asks.

    Typer enables them when it makes a command that has its own options for completion.
    """
    if VARIABLE in os.environ:
        with_completion = typer.Typer()
        with_completion.command()(register_shells)
        typer.main.get_command(with_completion)


def _shell(option: str) -> str:
    """Return the shell that runs this program, or else that of ``$SHELL``. Raises ConfigError."""
    import shellingham  # a dependency of typer

    try:
        name = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        name = Path(os.environ.get("SHELL", "an unknown shell")).name
    if name not in SCRIPTS:
        known = f"run it in {', '.join(list(SCRIPTS)[:-1])} or {list(SCRIPTS)[-1]}"
        raise ConfigError([ConfigIssue(option, f"does not support {name}", known)])
    return name
