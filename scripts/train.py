"""Train what a TOML file describes: ``torchrun scripts/train.py --config FILE --section.key=value ...``."""

import sys

from kempnerforge.cli.train import main

# The guard is needed: processes that training spawns import this file again.
if __name__ == "__main__":
    sys.exit(main())
