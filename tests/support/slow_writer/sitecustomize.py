"""A writer process with slow storage until a file exists. Put this folder first in PYTHONPATH."""

import os
import sys
import time

FOLDER = os.environ.get("KEMPNERFORGE_TEST_SLOW_WRITER")
"""Writes are slow until ``FOLDER/open`` exists. ``FOLDER/PID`` gets a byte for each byte written slowly."""
PIECE_BYTES, PIECE_S = 4096, 0.5

if FOLDER is not None and any(word.endswith("checkpoint.save.writer_process") for word in sys.orig_argv):
    pwrite = os.pwrite
    log = os.open(f"{FOLDER}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def slow_pwrite(fd, data, offset):
        """Write a piece. The caller continues with the rest."""
        if os.path.exists(f"{FOLDER}/open"):
            return pwrite(fd, data, offset)
        time.sleep(PIECE_S)
        written = pwrite(fd, data[:PIECE_BYTES], offset)
        os.write(log, bytes(written))
        return written

    os.pwrite = slow_pwrite
