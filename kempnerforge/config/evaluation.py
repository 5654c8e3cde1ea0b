"""``[eval]``: validation during training."""

from __future__ import annotations

from kempnerforge.config.section import AtLeastOne, AtLeastZero, Section


class EvalConfig(Section):
    """Validation during training."""

    interval: AtLeastZero = 0
    """Steps between validations. 0 disables validation."""

    num_batches: AtLeastOne = 8
    """Batches per validation."""
