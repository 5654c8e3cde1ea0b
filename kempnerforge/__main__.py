"""``python -m kempnerforge``, and for several processes ``torchrun ... -m kempnerforge``."""

from __future__ import annotations

from kempnerforge.cli.app import main

if __name__ == "__main__":
    main()
