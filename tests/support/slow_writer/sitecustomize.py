"""A writer process whose storage is slow, but does not hang, until a file is there. First in PYTHONPATH."""

import os
import sys
import time

FOLDER = os.environ.get("KEMPNERFORGE_TEST_SLOW_WRITER")
"""Until ``FOLDER/open`` exists, writes are slow. ``FOLDER/PID`` gets a byte for each byte written slowly."""
PIECE_BYTES, PIECE_S = 4096, 0.5

if FOLDER is not None and any(word.endswith("checkpoint.save.writer_process") for word in sys.orig_argv):
    pwrite = os.pwrite
    log = os.open(f"{FOLDER}/{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def slow_pwrite(fd, data, offset):
        """Write a piece: the caller goes on with the rest."""
        if os.path.exists(f"{FOLDER}/open"):
            return pwrite(fd, data, offset)
        time.sleep(PIECE_S)
        written = pwrite(fd, data[:PIECE_BYTES], offset)
        os.write(log, bytes(written))
        return written

    os.pwrite = slow_pwrite
