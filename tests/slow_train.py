"""``scripts/train.py`` with slow steps in a job's first start, so that there is time to stop it."""

import os
import sys
import time

from kempnerforge.cli.train import main

STEP_S = 0.7

if __name__ == "__main__":
    if "SLURM_RESTART_COUNT" not in os.environ:
        from kempnerforge.train.step import LocalStep

        update = LocalStep.update

        def slow_update(*arguments):
            time.sleep(STEP_S)
            return update(*arguments)

        LocalStep.update = slow_update
    sys.exit(main())
