"""Delay torchrun in a job's first start, as a file system that many nodes read at once does."""

import os
import sys
import time

if "SLURM_RESTART_COUNT" not in os.environ and any(word.endswith("torchrun") for word in sys.orig_argv):
    time.sleep(600)  # until the signal ends the process, which does not handle it yet
