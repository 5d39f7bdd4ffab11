"""The paper's sanity test (arXiv 2510.26788, section 4): each prompt can be learned, so a correct system learns all.

base policy -> perfectible set -> one arm for each precision, otherwise identical -> verdict

An arm may change other settings as well, such as the engine's rounding; the configuration describes it in a table.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from betterhalf.config.load import arm_settings, config_difference, resolved_json
from betterhalf.config.schema import PerfectibleTask, RunConfig, SanityConfig
from betterhalf.diagnostics.course import FINAL_STEPS, reward_course
from betterhalf.environment import environment
from betterhalf.errors import (
    BetterhalfError,
    EngineNumericsError,
    InputError,
    LossScaleError,
    NumericsError,
    WatchdogError,
)
from betterhalf.metrics.console import progress as show_progress
from betterhalf.metrics.console import show_note
from betterhalf.metrics.several import SeveralRuns
from betterhalf.report.emulated import emulated_names
from betterhalf.report.page import write_report
from betterhalf.run_dir import RunDir, read_json, read_jsonl, write_json_atomic
from betterhalf.run_lock import run_lock
from betterhalf.runs.assembly import Parts, check_before_weights
from betterhalf.runs.data_check import without_permission
from betterhalf.runs.evaluation import average_reward, evaluate_prompts
from betterhalf.runs.perfect import build_perfectible
from betterhalf.runs.progress import Progress
from betterhalf.runs.side_by_side import Job, plan_runs, run_jobs
from betterhalf.runs.train import check_settings, recorded_threads, require_same_config, run_training, summarise
from betterhalf.setup.folder import run_folder
from betterhalf.setup.model_checks import check_roles

ARM_KEYS = ("passed", "final_accuracy", "mismatch_k3", "mismatch_max_abs", "skipped_steps", "seconds")
"""Keys of an arm's summary that the run's summary repeats."""


def sanity(config: RunConfig, run_dir: str | None, resume: bool = False) -> dict[str, Any]:
    """Build the perfectible set, train every arm on it, and compare.

    Args:
        config: task, model, sizes; `sanity.arms` names the arms.
        run_dir: the run folder; `runs/sanity-<name>-<time>` by default.
        resume: keep what the folder already holds: counted prompts, finished arms, an arm's checkpoints.

    Returns:
        `passed` (true if the first arm passed), `k3_ratio` (BF16 over FP16), `arms`, `run_dir`; also in `summary.json`.

    Raises:
        InputError: bad input, or nothing in the data set is perfectible.
        RunError: the disk is full, or a reward cannot be computed.
    """
    require_sound_arms(config)
    check_settings(config)
    with run_folder(run_dir, "sanity", config.name, resume=resume) as run:
        return _sanity_in(run, config)


def _sanity_in(run: RunDir, config: RunConfig) -> dict[str, Any]:
    started = time.perf_counter()
    if run.config.exists():
        require_same_config(run, config)
    kept, parameters = build_perfectible(config, run)
    # Written once the set is complete: a count that kept nothing can continue with other bounds.
    write_json_atomic(run.environment, environment())
    write_json_atomic(run.config, resolved_json(without_permission(config)))
    arms = _run_arms(run, config, kept, parameters)
    summary = {
        "verb": "sanity",
        "passed": arms[config.sanity.arms[0]]["passed"],
        "pass_accuracy": config.sanity.pass_accuracy,
        "k3_ratio": k3_ratio(arms),
        "arms": {
            name: {key: arm.get(key) for key in ARM_KEYS} | learning(run.arm(name)) | {"changes": changes(config, name)}
            for name, arm in arms.items()
        },
        "emulated": emulated_formats(config),
        "rows_left_out": len(read_jsonl(run.bad_rows)),
        "reasons": {name: arm["reason"] for name, arm in arms.items() if "reason" in arm},
        "seconds": time.perf_counter() - started,
        "run_dir": str(run.path),
    }
    write_json_atomic(run.summary, summary)
    write_report([run.path], run.report)
    return summary


def _run_arms(run: RunDir, config: RunConfig, kept: Path, parameters: int) -> dict[str, dict[str, Any]]:
    """Train the unfinished arms, side by side where that is faster, and return the summary of every arm, in order."""
    configs = {name: arm_config(config, name, kept) for name in config.sanity.arms}
    open_arms = [name for name in configs if not _finished(run.arm(name))]
    # Planned for all arms, not for those left on a resume: an arm keeps its number of threads, and so its bits.
    wanted = config.sanity.arms_at_once
    plan = plan_runs(config, len(configs), parameters, wanted=wanted, key="sanity.arms_at_once")
    if open_arms:
        show_note(plan.described(open_arms), mode=config.logging.console)
    threads: dict[str, int] = {name: recorded_threads(run.arm(name)) or plan.threads for name in open_arms}
    if plan.at_once == 1 and set(threads.values()) <= {plan.threads}:
        return {name: run_arm(configs[name], name, run.arm(name)) for name in configs}
    if open_arms:
        train_side_by_side(run, {name: configs[name] for name in open_arms}, threads, plan.at_once)
    return {name: read_json(run.arm(name).summary) for name in configs}


def train_side_by_side(run: RunDir, configs: Mapping[str, RunConfig], threads: Mapping[str, int], at_once: int) -> None:
    """Train arms in their own processes and show their progress; each leaves a run folder with a summary.

    Args:
        run: folder of the sanity run.
        configs: the arms to train by name, each with its own configuration.
        threads: number of threads of each.
        at_once: number of processes at a time.

    Raises:
        BetterhalfError: the error of an arm; the other arms are ended, and --resume continues all of them.
        RunError: an arm's process failed without reporting an error.
    """

    def stop(job: Job, error: Exception) -> None:
        raise error

    first = next(iter(configs.values()))
    jobs = [
        Job(kind="arm", name=name, config=config, folder=run.arm(name).path, threads=threads[name])
        for name, config in configs.items()
    ]
    with SeveralRuns(first.logging.console, labels=tuple(configs), total_steps=first.training.steps) as view:
        run_jobs(
            *(jobs, lambda job, event: view.show(job.name, event)),
            at_once=at_once,
            limit_key="sanity.arms_at_once",
            failed=stop,
        )


def _finished(arm: RunDir) -> bool:
    """Return whether an arm has a result; a stop by the watchdog is not one, because a resumed run may continue."""
    return arm.summary.exists() and "stopped" not in read_json(arm.summary)


def require_sound_arms(config: RunConfig) -> None:
    """Refuse arms that could not run, and two arms with the same settings, before hours of counting.

    Raises:
        ContractError: trainer and engine of an arm differ in precision without `precision.allow_difference`.
        InputError: the algorithm, the model or the engine of an arm cannot work as configured, or two arms are equal.
    """
    settings = {name: arm_settings(config, name) for name in config.sanity.arms}
    for name, arm in settings.items():
        _require_sound(name, arm, described=name in config.sanity.arm)
        twin = next(other for other in settings if settings[other] == arm)
        if twin != name:
            raise InputError(f"the arms {twin} and {name} have the same settings; change one of them, or leave it out")


def _require_sound(name: str, arm: RunConfig, *, described: bool) -> None:
    """Check the precision of an arm, and all that needs no weights if it has a table; name the arm in the error."""
    try:
        check_roles(arm)
        if described:
            check_settings(arm)
            check_before_weights(arm)
    except BetterhalfError as error:
        raise type(error)(f"in the arm {name}: {error}") from error


def changes(config: RunConfig, name: str) -> dict[str, Any]:
    """Return the precision of an arm and the settings that it changes, by dotted key."""
    arm = arm_settings(config, name)
    changed = {change.key: change.right for change in config_difference(config, arm)}
    return {"precision.preset": arm.precision.preset} | changed


def emulated_formats(config: RunConfig) -> list[str]:
    """Return the emulated formats among the roles of all arms."""
    roles = [arm_settings(config, name).precision.roles() for name in config.sanity.arms]
    return emulated_names(name for arm in roles for name in arm.model_dump().values())


def learning(arm: RunDir) -> dict[str, Any]:
    """Return first and final reward of an arm, and the verdict on its learning; None each if it recorded no step."""
    rewards = [row["rollout/reward/mean"] for row in (read_jsonl(arm.metrics) if arm.metrics.exists() else [])]
    if not rewards:
        return {"first_reward": None, "final_reward": None, "verdict": None}
    course = reward_course(rewards, FINAL_STEPS)
    return {"first_reward": course.first, "final_reward": course.final, "verdict": course.outcome}


def k3_ratio(arms: Mapping[str, dict[str, Any]]) -> float | None:
    """Return the mean k3 of the BF16 arm over that of the FP16 arm; None unless both are known and not zero."""
    pair = [arms.get(name, {}).get("mismatch_k3") for name in ("bf16", "fp16")]
    return pair[0] / pair[1] if pair[0] and pair[1] else None


def arm_config(config: RunConfig, name: str, perfectible: Path) -> RunConfig:
    """Return the configuration of one arm: the perfectible set as task, and its precision or the settings in its table.

    The tables of the other arms are left out: they describe changes of the whole run's settings, not of this arm's.
    """
    data = arm_settings(config, name).model_dump()
    if config.sanity.arm:
        data["sanity"] |= {"arms": SanityConfig().arms, "arm": {}}
    base = config.task.base if isinstance(config.task, PerfectibleTask) else config.task
    data["task"] = {"type": "perfectible", "path": str(perfectible), "base": base.model_dump()}
    return RunConfig.model_validate(data)


def run_arm(config: RunConfig, name: str, arm: RunDir) -> dict[str, Any]:
    """Train and evaluate one arm; a finished arm is read from its folder, an unfinished or stopped one continues.

    `config` is the arm's own, with the perfectible set as its task: see `arm_config`.

    An arm that ends because of its precision (the loss scale at its floor, logprobs that are not finite, a mismatch at
    which the watchdog stops) has failed the test: a result, recorded with its reason, and the other arms still run. Any
    other error, such as a crash of the engine beyond the allowed restarts, says nothing about the precision. It is
    raised, and the arm has no result.
    """
    if _finished(arm):
        return read_json(arm.summary)

    def final_accuracy(parts: Parts, progress: Progress) -> dict[str, Any]:
        accuracy = evaluate_arm(parts, name, progress.policy_version)
        return {"final_accuracy": accuracy, "passed": accuracy >= config.sanity.pass_accuracy}

    started = time.perf_counter()
    try:
        resume = arm.holds_run
        RunDir.create(arm.path, resume=resume)
        with run_lock(arm.path):
            return run_training(config, arm, resume=resume, label=name, kind="arm", after=final_accuracy)
    except (LossScaleError, EngineNumericsError, NumericsError, WatchdogError) as error:
        failed = {"passed": False, "final_accuracy": None, "reason": str(error)}
        measured = summarise(arm, config) if arm.metrics.exists() else {}
        if isinstance(error, WatchdogError):
            measured = read_json(arm.summary)
        write_json_atomic(arm.summary, measured | failed | {"seconds": time.perf_counter() - started})
        return read_json(arm.summary)


def evaluate_arm(parts: Parts, label: str, policy_version: int) -> float:
    """Return avg@k over the whole perfectible set at temperature 1, with the engine's weights after the last step."""
    config = parts.config
    sampling = config.sampling.model_copy(update={"temperature": 1.0})
    at_one = replace(parts, config=config.model_copy(update={"sampling": sampling}))
    prompts = [parts.task.prompt(index) for index in range(len(parts.task))]
    with show_progress(f"{label}: final accuracy", len(prompts), mode=config.logging.console) as bar:
        results = evaluate_prompts(
            at_one,
            prompts,
            config.sanity.evaluation_samples,
            policy_version=policy_version,
            keep=lambda results: bar.advance(len(results)),
        )
    return average_reward(results)
