"""Sentences that compare arms: what collapsed, and what separates it from what did not."""

from __future__ import annotations

from typing import Any

from tests.unit.report.conftest import SUMMARY, collapse_summary

from betterhalf.report.comparison import changes_text, comparison_sentences


def sentences(**verdicts: tuple[str, float]) -> list[str]:
    """Return the sentences on seven arms, with some other verdicts and final rewards."""
    arms: dict[str, dict[str, Any]] = collapse_summary()["arms"]
    for name, (verdict, reward) in verdicts.items():
        arms[name] |= {"verdict": verdict, "final_reward": reward}
    return comparison_sentences(arms)


def test_arms_that_differ_in_precision_alone_are_not_compared() -> None:
    assert comparison_sentences(SUMMARY["arms"]) == []


def test_a_collapse_is_described_with_what_prevents_it() -> None:
    outcome, aligned, dual, sides = sentences()
    assert outcome == (
        "Rewards began at 0.60 and ended: learned fp16 (0.97), bf16 (0.96), e8m2_aligned (0.86), "
        "coarse_engine (0.87); damaged dual_clip (0.70); collapsed e8m2 (0.00), coarse_trainer (0.01)."
    )
    assert aligned.startswith(
        "e8m2_aligned differs from e8m2 in engine.rounding=aligned alone and learned (0.86 against 0.00; "
        "k3 2.0e-08 against 2.5e-01). The same coarse arithmetic with less mismatch learns"
    )
    assert dual.startswith("dual_clip differs from e8m2 in algorithm.surrogate.dual_clip=3.0 alone and lost reward")
    assert dual.endswith(")."), "a damaged arm proves no cause"
    assert sides.endswith("So it is the trainer's rounding that breaks the run, not the engine's.")


def test_a_collapse_that_does_not_appear_is_said() -> None:
    outcome, sides = sentences(e8m2=("learned", 0.9), coarse_trainer=("dips", 0.8), dual_clip=("flat", 0.6))
    assert outcome.endswith("No arm collapsed.")
    assert sides.endswith("So neither side alone breaks the run.")


def test_arms_that_lose_reward_from_the_first_step_on_are_broken_without_a_collapse() -> None:
    verdicts = {"e8m2": ("damaged", 0.126), "coarse_trainer": ("damaged", 0.08), "dual_clip": ("learned", 0.7)}
    outcome, aligned, dual, sides = sentences(**verdicts)
    assert outcome.endswith("; damaged e8m2 (0.13), coarse_trainer (0.08).")
    assert aligned.endswith("so the mismatch between trainer and engine is what breaks the run.")
    assert dual.endswith("so it is such tokens that break the run.")
    assert "it lost reward (0.08" in sides
    assert sides.endswith("So it is the trainer's rounding that breaks the run, not the engine's.")


def test_a_pair_of_broken_arms_is_compared_once_and_an_arm_that_is_flat_shows_no_cause() -> None:
    arms = sentences(e8m2_aligned=("flat", 0.6), coarse_engine=("flat", 0.6))
    assert sum("dual_clip" in sentence for sentence in arms[1:]) == 1
    assert not any("So " in sentence or "breaks the run" in sentence for sentence in arms)


def test_different_first_rewards_are_given_as_a_range() -> None:
    arms = collapse_summary()["arms"]
    arms["coarse_trainer"]["first_reward"] = 0.31
    assert comparison_sentences(arms)[0].startswith("Rewards began between 0.31 and 0.60 and ended: learned fp16")


def test_a_setting_that_does_not_prevent_the_collapse_is_not_credited() -> None:
    _, aligned, *_ = sentences(e8m2_aligned=("collapsed", 0.02))
    assert aligned.startswith("e8m2_aligned differs from e8m2 in engine.rounding=aligned alone and collapsed too (0.02")
    assert aligned.endswith("So engine.rounding is not what breaks it here.")
    sides = sentences(coarse_engine=("collapsed", 0.0))[-1]
    assert sides.endswith("So either side is enough to break the run.")


def test_nothing_follows_from_an_arm_that_was_too_short_or_is_fine_on_the_side_it_names() -> None:
    _, aligned, _, sides = sentences(e8m2_aligned=("short", 0.6), coarse_engine=("short", 0.6))
    assert aligned.endswith("was too short to tell (0.60 against 0.00; k3 2.0e-08 against 2.5e-01).")
    assert sides.endswith(").") and "So " not in sides
    arms = collapse_summary()["arms"]
    arms["coarse_trainer"]["changes"] |= {"precision.preset": "e8m2", "precision.compute_dtype": "fp32"}
    assert not any("the trainer alone is coarse" in sentence for sentence in comparison_sentences(arms))


def test_an_arm_without_a_verdict_is_left_out() -> None:
    arms = collapse_summary()["arms"]
    arms["coarse_trainer"] |= {"verdict": None, "final_reward": None, "first_reward": None}
    assert not any("coarse_trainer" in sentence for sentence in comparison_sentences(arms))


def test_changes_are_written_as_on_the_command_line() -> None:
    changes = {"precision.preset": "fp32", "precision.rollout_dtype": "e8m3", "precision.allow_difference": True}
    assert changes_text(changes) == "precision.preset=fp32, precision.rollout_dtype=e8m3 (emulated)"
    assert changes_text({}) == "nothing"
