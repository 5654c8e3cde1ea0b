"""Train from a TOML file: ``torchrun scripts/train.py --config FILE --section.key=value ...``."""

import sys

from kempnerforge.cli.train import main

# The guard is required: processes that training spawns import this file again.
if __name__ == "__main__":
    sys.exit(main())
