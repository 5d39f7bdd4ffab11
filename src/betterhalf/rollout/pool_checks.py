"""Checks that the engines of a pool agree with each other, and that their answers match the requests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from betterhalf.errors import ContractError, EngineError, EngineNumericsError, WeightSyncError
from betterhalf.precision.contract import SideReport, folded_digest
from betterhalf.rollout.requests import score_tolerance
from betterhalf.types import Completion, DtypeName, GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores of one engine, with which the scores of the others are compared."""

    sequences: tuple[tuple[int, ...], ...]
    """Token ids of each sequence."""
    scores: list[tuple[float, ...]]
    """Logprobs in nats; see `RolloutEngine.score`."""
    name: str
    """Name of the engine that computed them."""


def require_equal_scores(first: Scored, scores: Sequence[Sequence[float]], name: str, dtype: DtypeName) -> None:
    """Refuse an engine that computes with other weights than another one, although both hold the same.

    Args:
        first: scores of the other engine.
        scores: logprobs of the same sequences, in nats.
        name: name of the engine that computed `scores`.
        dtype: rollout dtype of both.

    Raises:
        WeightSyncError: the mean absolute difference exceeds `score_tolerance`; the message names both engines.
    """
    expected, found = ([logprob for one in some for logprob in one] for some in (first.scores, scores))
    count = max(len(expected), 1)
    difference = sum(abs(a - b) for a, b in zip(expected, found, strict=True)) / count
    allowed = score_tolerance([dtype], sum(expected) / count)
    if not difference <= allowed:
        raise WeightSyncError(
            f"the logprobs of {name} and {first.name} differ by {difference:.3g} nats per token (rounding causes at "
            f"most {allowed:.3g}), although both hold the same weights: one of them computes with stale copies or a "
            "stale cache; continue with --resume, and report this with the model's name if it happens again"
        )


def check_completions(
    requests: Sequence[GenerateRequest], groups: Sequence[tuple[Completion, ...]], policy_version: int
) -> None:
    """Refuse completions that do not match the requests.

    Raises:
        EngineError: their number or their policy version is wrong.
        EngineNumericsError: a logprob is not finite.
    """
    wanted, found = [request.group_size for request in requests], [len(group) for group in groups]
    if wanted != found:
        raise EngineError(f"the engine returned {found} completions for {wanted} wanted; report this, then --resume")
    for request, group in zip(requests, groups, strict=True):
        for sibling, completion in enumerate(group, request.first_sibling):
            if completion.policy_version != policy_version:
                raise EngineError(
                    f"the engine sampled with weights of policy version {completion.policy_version} where the pool "
                    f"loaded version {policy_version}; continue with --resume"
                )
            # A sum is finite only if every term is: logprobs are far too small to overflow a double.
            if not math.isfinite(sum(completion.behavior_logprobs)):
                raise EngineNumericsError(
                    f"prompt {request.prompt_id}, sibling {sibling}: a behavior logprob is not finite; set "
                    "precision=bf16 or precision=fp32, or check the model's files for NaN"
                )


def require_equal(reports: Mapping[str, SideReport]) -> None:
    """Refuse engines that would sample from different policies.

    Args:
        reports: name of the engine -> its report.

    Raises:
        ContractError: two engines differ in a format, a fact or the weights; the message has one line for each region
            that differs, with the engines of each value.
    """
    described = {name: _described(report) for name, report in reports.items()}
    regions = dict.fromkeys(region for values in described.values() for region in values)
    lines = []
    for region in regions:
        by_value: dict[str, list[str]] = {}
        for name, values in described.items():
            by_value.setdefault(values.get(region, "nothing"), []).append(name)
        if len(by_value) > 1:
            lines.append(f"  {region}: " + "; ".join(f"{value} in {', '.join(on)}" for value, on in by_value.items()))
    if lines:
        raise ContractError(
            "the rollout engines differ among themselves:\n" + "\n".join(lines) + "\n"
            "Give all hosts of the cluster the same processors, devices and package versions, or use one engine."
        )


def _described(report: SideReport) -> dict[str, str]:
    return {**report.dtypes, **report.facts, "weights by digest": folded_digest(report.digests)}
