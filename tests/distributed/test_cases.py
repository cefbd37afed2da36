"""Every distributed case as a test of its own; `-m "not slow"` takes an all-pairs subset of each product."""

from __future__ import annotations

import pytest

from tests.distributed.registry import load_cases

pytestmark = pytest.mark.distributed


def _parameters() -> list:
    return [pytest.param(c, id=c.id, marks=[pytest.mark.slow] if c.slow else []) for c in load_cases()]


@pytest.mark.parametrize("distributed_case", _parameters())
def test_distributed(distributed_case, batches) -> None:
    """The case's own assertions held on every rank."""
    result = batches.result(distributed_case)
    if not result.passed:
        pytest.fail(result.report(), pytrace=False)
