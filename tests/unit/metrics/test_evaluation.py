"""Names of the metrics of evaluations: known by their form, and documented as templates."""

from __future__ import annotations

import pytest

from betterhalf.errors import InputError
from betterhalf.metrics.catalogue import render
from betterhalf.metrics.evaluation import TEMPLATES, is_evaluation, metric_name
from betterhalf.metrics.names import check_known


@pytest.mark.parametrize(
    ("estimate", "name"),
    [
        ("avg@8", "evaluation/gsm-8k/accuracy/mean"),
        ("pass@16", "evaluation/gsm-8k/pass_at_16/mean"),
        ("maj@4", "evaluation/gsm-8k/majority_at_4/mean"),
    ],
)
def test_the_name_of_an_estimate_is_known(estimate: str, name: str) -> None:
    assert metric_name("gsm-8k", estimate, "mean") == name
    check_known([name, name.replace("/mean", "/low"), name.replace("/mean", "/high")])


@pytest.mark.parametrize(
    "name", ["evaluation/a/accuracy", "evaluation/a/b/accuracy/mean", "evaluation/a/pass_at_x/mean"]
)
def test_other_names_of_the_area_are_refused(name: str) -> None:
    assert not is_evaluation(name)
    with pytest.raises(InputError, match="is not in the catalogue"):
        check_known([name])


def test_each_template_stands_for_a_known_name_and_is_documented_once() -> None:
    page = render()
    for metric in TEMPLATES:
        assert is_evaluation(metric.name.replace("_K/", "_4/"))
        assert page.count(f"| `{metric.name}` |") == 1
