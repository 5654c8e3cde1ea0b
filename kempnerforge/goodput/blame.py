"""Decide whether the checkpoint that an attempt started from may have caused its end."""

from __future__ import annotations

CAUSES_IN_STATE = ("NonFiniteError", "DamagedCheckpointError", "MismatchError")
"""Classes of errors that the loaded state may have caused.

All other errors have causes that another checkpoint would not remove: memory (host or CUDA),
devices, networks, hangs, signals, kills, and the code of the user.
"""


def may_lie_in_state(error_type: str, *, began_at: int | None, healthy: bool) -> bool:
    """Return whether the checkpoint that an attempt started from may have caused its end.

    Args:
        error_type: class of the error that ended it; empty if it ended without one.
        began_at: the step that it resumed from; None if it ended before it resumed.
        healthy: whether it trained long enough afterwards for that checkpoint to be trusted.
    """
    return error_type in CAUSES_IN_STATE and bool(began_at) and not healthy
