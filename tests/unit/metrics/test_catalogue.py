"""The catalogue is complete and consistent, and the documentation shows it."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from betterhalf.errors import InputError
from betterhalf.metrics.catalogue import CATALOGUE, render
from betterhalf.metrics.metric import Metric
from betterhalf.metrics.names import check_known

ROOT = Path(__file__).parents[3]


def test_documentation_is_the_rendered_catalogue() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == render() + "\n"


def test_every_metric_appears_in_the_documentation_once() -> None:
    page = render()
    assert [page.count(f"| `{name}` |") for name in CATALOGUE] == [1] * len(CATALOGUE)


def test_catalogue_holds_the_names_of_the_design() -> None:
    mismatch = {
        "mismatch": "k1/mean k2/mean k3/mean prob_gap/mean_abs prob_gap/p99_abs prob_gap/max prob_gap/min "
        "log_ratio/mean log_ratio/std log_ratio/p99_abs log_ratio/max_abs "
        "sequence_log_ratio/mean sequence_log_ratio/std sequence_log_ratio/p1 sequence_log_ratio/p99 "
        "slope_per_1k ess_fraction chi2_token pearson tokens",
        "optim": "loss_scale skipped grad_norm learning_rate subnormal_fraction zero_fraction overflow_fraction",
        "policy": "entropy/mean clip_fraction mask_fraction truncate_fraction loss version",
        "rollout": "reward/mean reward/std length/mean length/max truncated_fraction zero_advantage_fraction",
        "time": "step_seconds generate_seconds reward_seconds measure_seconds train_seconds sync_seconds",
        "system": "tokens_per_second peak_memory_gib",
    }
    wanted = {f"{area}/{name}" for area, names in mismatch.items() for name in names.split()}
    assert wanted - CATALOGUE.keys() == set()


def test_every_band_has_a_source_and_every_source_a_band() -> None:
    assert [metric.name for metric in CATALOGUE.values() if (metric.band is None) != (metric.source == "")] == []


def test_unknown_name_is_refused_with_the_nearest_known() -> None:
    check_known(["mismatch/k3/mean", "optim/loss_scale"])
    with pytest.raises(InputError, match="'mismatch/k3_mean' is not in the catalogue.*'mismatch/k3/mean'"):
        check_known(["optim/loss_scale", "mismatch/k3_mean"])


@pytest.mark.parametrize(
    ("band", "value", "healthy"),
    [
        ((None, 1e-3), 1e-3, True),
        ((None, 1e-3), 1.1e-3, False),
        ((0.3, None), 0.3, True),
        ((0.3, None), 0.29, False),
        ((-0.1, 0.1), -0.2, False),
        (None, 1e9, True),
        (None, math.nan, False),
        ((0.3, None), math.nan, False),
    ],
)
def test_a_band_includes_its_bounds_and_nothing_outside(
    band: tuple[float | None, float | None] | None, value: float, healthy: bool
) -> None:
    assert Metric("a/b", "1", "", band).healthy(value) is healthy


def test_catalogue_imports_no_torch() -> None:
    code = "import sys, betterhalf.metrics.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_task_s_own_names_need_no_entry() -> None:
    check_known(["task/score/mean", "task/errors", "loss/mine"])
    with pytest.raises(InputError, match="'tasks/score' is not in the catalogue"):
        check_known(["tasks/score"])
