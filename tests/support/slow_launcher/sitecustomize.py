"""Delay the launcher in a job's first start, as a file system that many nodes read at once does."""

import os
import sys
import time

is_launcher = any(word.endswith("/kempnerforge") for word in sys.orig_argv) and "train" in sys.orig_argv
if "SLURM_RESTART_COUNT" not in os.environ and is_launcher:
    time.sleep(600)  # until the signal ends the process, which does not handle it yet
