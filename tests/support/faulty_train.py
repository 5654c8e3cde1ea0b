"""Run ``scripts/train.py`` with one rank that fails in the first starts of a launcher."""

import os
import signal
import sys

from kempnerforge.cli.train import main
from kempnerforge.rank_variables import RESTART_COUNT

FAULTS = "KEMPNERFORGE_TEST_FAULTS"
"""``RANK CALL HOW STARTS``: in the first STARTS starts, the CALLth optimizer call of RANK fails by HOW."""

if __name__ == "__main__":
    if FAULTS in os.environ:
        from kempnerforge.train.step import LocalStep

        rank, call, how, starts = os.environ[FAULTS].split()
        update = LocalStep.update
        calls = 0

        def faulty_update(self: LocalStep, lr: float):
            global calls
            calls += 1
            is_due = os.environ["RANK"] == rank and calls == int(call)
            if is_due and int(os.environ[RESTART_COUNT]) < int(starts):
                if how == "raise":
                    raise ValueError("no such luck")
                os.kill(os.getpid(), signal.Signals[how])
            return update(self, lr)

        LocalStep.update = faulty_update
    sys.exit(main())
