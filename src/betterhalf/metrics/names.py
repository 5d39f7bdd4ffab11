"""Names that a metric of a step may have."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from betterhalf.errors import InputError
from betterhalf.metrics.catalogue import CATALOGUE
from betterhalf.metrics.evaluation import is_evaluation
from betterhalf.metrics.metric import FREE_AREAS


def is_known(name: str) -> bool:
    """Return whether a step may have this metric: it is in the catalogue, in a free area, or of an evaluation."""
    return name in CATALOGUE or name.partition("/")[0] in FREE_AREAS or is_evaluation(name)


def nearest(name: str) -> str:
    """Return the metric in the catalogue whose name is the most similar."""
    return get_close_matches(name, CATALOGUE, n=1, cutoff=0.0)[0]


def check_known(names: Iterable[str]) -> None:
    """Raise InputError for a name neither in the catalogue nor in a free area; the message names the nearest."""
    for name in names:
        if not is_known(name):
            raise InputError(
                f"metric {name!r} is not in the catalogue. Add it to metrics/catalogue.py, or use {nearest(name)!r}."
            )
