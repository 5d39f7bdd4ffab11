"""Build the perfectible set: count how often the base policy solves each candidate prompt."""

from __future__ import annotations

from pathlib import Path

from betterhalf.config.schema import PerfectibleTask, PrecisionConfig, RunConfig
from betterhalf.environment import environment
from betterhalf.metrics.console import progress as show_progress
from betterhalf.precision.contract import folded_digest
from betterhalf.run_dir import RunDir, plain_json, truncate_jsonl
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.data_check import allows_changed_data, task_prefix
from betterhalf.runs.evaluation import evaluate_prompts
from betterhalf.runs.weight_sync import first_sync
from betterhalf.setup.data import write_left_out
from betterhalf.tasks.perfectible import (
    Provenance,
    SolvedRow,
    append_solved,
    open_perfectible,
    read_kept,
)
from betterhalf.tasks.perfectible_task import require_same_rows

PERFECTIBLE_STEP = 2**31 - 2
"""Step in the random key: counting never repeats a draw of training or evaluation."""

_PROMPTS_AT_ONCE = 16
"""Number of prompts counted between two writes, which is the most that a kill can lose."""


def build_perfectible(config: RunConfig, run: RunDir) -> tuple[Path, int]:
    """Build the perfectible set of `config.task`, counted by the base policy in FP32 so that it favours no arm.

    An interrupted count continues. A task that already is a perfectible set is used as it is.

    Returns:
        Path of the file, and the number of the model's parameters.

    Raises:
        InputError: nothing is perfectible, or the folder holds a count made with other settings.
    """
    if isinstance(config.task, PerfectibleTask):
        parts = assemble(config)  # so that an error in it shows before an arm starts
        parts.close()
        write_left_out(run, parts.task)
        return Path(config.task.path).expanduser().resolve(), parts.parameters
    path = run.perfectible.resolve()
    # FP32 has no islands, but a name among those of the arms that the model lacks must show before hours of counting.
    in_fp32 = PrecisionConfig(preset="fp32", fp32_modules=config.precision.fp32_modules)
    parts = assemble(config.model_copy(update={"precision": in_fp32}), rows=config.sanity.candidates)
    try:
        write_left_out(run, parts.task)
        _count(parts, path)
    finally:
        parts.close()
    read_kept(path)
    return path, parts.parameters


def _count(parts: Parts, path: Path) -> None:
    """Count the candidates that the file does not hold yet."""
    config = parts.config
    candidates = min(config.sanity.candidates, len(parts.task))
    version = first_sync(parts).policy_version
    provenance = _provenance(parts, candidates, folded_digest(parts.engine.digests()))
    rows = open_perfectible(path, provenance) if path.exists() else []
    if not allows_changed_data(config):
        require_same_rows(path, rows[:candidates], parts.data, parts.task.place, task_prefix(config))
    done = len(rows)
    if done < candidates:
        # Logits depend slightly on the other rows of a batch, so an interrupted block is repeated as a whole.
        done -= done % _PROMPTS_AT_ONCE
        truncate_jsonl(path, lambda row: row.get("index", -1) < done)
    label = f"perfectible set: {candidates} prompts x {config.sanity.samples}"
    with show_progress(label, candidates, mode=config.logging.console) as bar:
        bar.advance(done)
        for start in range(done, candidates, _PROMPTS_AT_ONCE):
            _count_some(parts, range(start, min(start + _PROMPTS_AT_ONCE, candidates)), path, provenance, version)
            bar.advance(min(_PROMPTS_AT_ONCE, candidates - start))


def _count_some(parts: Parts, indices: range, path: Path, provenance: Provenance, policy_version: int) -> None:
    """Count some candidates, then append them to the file, which is created with the first ones."""
    prompts = [parts.task.prompt(index) for index in indices]
    samples = parts.config.sanity.samples
    results = evaluate_prompts(
        parts, prompts, samples, policy_version=policy_version, step=PERFECTIBLE_STEP, first_index=indices.start
    )
    if not path.exists():
        open_perfectible(path, provenance)
    for index, result in zip(indices, results, strict=True):
        row = SolvedRow(
            index=index,
            prompt_id=result.prompt_id,
            solved=result.solved,
            samples=result.samples,
            digest=parts.data.row(index),
        )
        append_solved(path, row)


def _provenance(parts: Parts, candidates: int, digest: str) -> Provenance:
    config = parts.config
    packages = environment()["packages"]
    task = plain_json(config.task.model_dump())
    assert isinstance(task, dict)
    return Provenance(
        model=config.model.name,
        weights_digest=digest,
        task=task,
        seed=config.seed,
        candidates=candidates,
        samples=config.sanity.samples,
        lower=config.sanity.lower,
        upper=config.sanity.upper,
        temperature=config.sampling.temperature,
        max_tokens=config.sampling.max_tokens,
        engine_dtype=config.precision.roles().rollout_dtype,
        versions={name: packages[name] for name in ("betterhalf", "torch", "transformers") if name in packages},
    )
