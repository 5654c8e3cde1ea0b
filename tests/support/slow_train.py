"""Run ``scripts/train.py`` with slow steps at first, so that there is time to stop it.

Restarts in place and by SLURM are fast.
"""

import os
import sys
import time

from kempnerforge.cli.train import main
from kempnerforge.rank_variables import RESTART_COUNT

STEP_S = 0.7
SLOW_STEPS = 20
"""Later steps are even slower, so that a job does not finish before it is stopped on a busy machine."""
FAULT_AT = "KEMPNERFORGE_TEST_FAULT_AT"
"""Number of the optimizer call that fails until SLURM has restarted the job; unset for none."""
SLOW_DATA = "KEMPNERFORGE_TEST_SLOW_DATA"
"""If set, the first start prepares its data for so long that only a signal ends it."""
FAST = "KEMPNERFORGE_TEST_FAST"

if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ and FAST not in os.environ:
        from kempnerforge.train.step import LocalStep

        if SLOW_DATA in os.environ:
            from kempnerforge.train import data_setup

            data_setup.prepare_cached = lambda *_arguments, **_options: time.sleep(3600)
        update = LocalStep.update
        calls = 0

        def slow_update(self: LocalStep, lr: float):
            global calls
            calls += 1
            if str(calls) == os.environ.get(FAULT_AT):
                raise ValueError("this node is bad")
            if os.environ.get(RESTART_COUNT, "0") != "0":
                return update(self, lr)
            waits = calls > SLOW_STEPS and os.environ.get("SLURM_ARRAY_TASK_ID") != "0"
            time.sleep(STEP_S * (5 if waits else 1))
            return update(self, lr)

        LocalStep.update = slow_update
    sys.exit(main())
