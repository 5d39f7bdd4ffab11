"""The checks before a sweep: what `train` refuses without reading weights is refused by name before any cell runs."""

from __future__ import annotations

import pytest

from betterhalf.errors import InputError
from betterhalf.runs.sweep_checks import check_curves


def test_curves_of_every_metric_that_a_run_can_log_are_kept() -> None:
    check_curves(("mismatch/k3/mean", "task/solved/mean", "evaluation/held_out/accuracy/mean"))
    for name in ("mismatch/k3/men", "evaluation/held_out/accuracy"):
        with pytest.raises(InputError, match=f"sweep.curves names '{name}', which is no metric"):
            check_curves((name,))
