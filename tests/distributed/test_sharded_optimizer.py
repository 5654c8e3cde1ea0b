"""Optimizer state of sharded parameters."""

from __future__ import annotations

import pytest
from support.lazy_state import compare_with_lazy_state
from support.ranks import run_ranks

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_eager_sharded_state_trains_as_lazy(fused: bool) -> None:
    run_ranks(compare_with_lazy_state, 2, fused, True)
