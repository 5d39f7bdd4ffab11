"""Measure a step of a run under Ray: the controller's own share, and the time that one step off saves.

    python benchmarks/ray_step.py [--model smollm2] [--trainers 1] [--engines 1] [--engine native] [--json]

One session serves both sides, whose turns alternate: `--steps` steps in which sampling and learning take turns, and as
many with `pipeline.max_staleness=1`. The first and the last step of each turn are left out, because nothing was sampled
ahead for the first, or is sampled ahead during the last.

* The controller's share is processor time of this process, all threads and pickling included, divided by the time of
  the turns without overlap. Ranks and engines are other processes; so are Ray's own.
* The possible speed-up is that of a step in which the shorter of sampling and learning costs nothing, from the turns
  without overlap. On two cores, one rank and one engine of one thread each leave room for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from side_by_side import Row, Table, parser
from whole_step import add_sizes, step_config, with_rewards

from betterhalf.config.schema import RunConfig
from betterhalf.runs import loop
from betterhalf.runs.assembly import Parts, assemble
from betterhalf.runs.progress import Progress
from betterhalf.runs.weight_sync import first_sync

SHARE = 0.05
"""Largest share of a step that the controller may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Consecutive steps of one side."""

    seconds: tuple[float, ...]
    """Wall-clock time of each step that counts."""
    generate: tuple[float, ...]
    """Part of it spent waiting for completions."""
    wall: float
    """Wall-clock time of the whole turn."""
    controller: float
    """Processor seconds of this process in the whole turn."""


def configured(
    model: str, dtype: str, trainers: int, engines: int, engine: str, sizes: tuple[int, int, int]
) -> RunConfig:
    """Return the configuration of a run under Ray without checkpoints."""
    prompts, siblings, tokens = sizes
    base = step_config(model, dtype, prompts=prompts, siblings=siblings, tokens=tokens)  # type: ignore[arg-type]
    data = base.model_dump(exclude_unset=True)
    data["engine"] = {"type": engine}
    data["cluster"] = {"backend": "ray", "trainers": trainers, "engines": engines}
    data["training"] |= {"checkpoint_every": 10**6}
    return RunConfig.model_validate(data)


def overlapping(parts: Parts, steps: int, staleness: int) -> Parts:
    """Return the same parts for a turn that ends after step `steps`."""
    data = parts.config.model_dump(exclude_unset=True)
    data["training"] |= {"steps": steps}
    data["pipeline"] = {"max_staleness": staleness}
    return replace(parts, config=RunConfig.model_validate(data))


def run_turn(parts: Parts, progress: Progress, steps: int, staleness: int) -> tuple[Turn, Progress]:
    """Run some steps, and return their times and the position after them."""
    results: list[loop.StepResult] = []
    parts = overlapping(parts, progress.step + steps, staleness)
    wall, controller = time.perf_counter(), time.process_time()
    progress = loop.train_steps(parts, progress, results.append)
    wall, controller = time.perf_counter() - wall, time.process_time() - controller
    counted = results[1:-1]
    return Turn(
        seconds=tuple(float(result.metrics["time/step_seconds"] or 0) for result in counted),
        generate=tuple(float(result.metrics["time/generate_seconds"] or 0) for result in counted),
        wall=wall,
        controller=controller,
    ), progress


def possible_speed_up(turns: Sequence[Turn]) -> float:
    """Return the speed-up of a perfect overlap, from turns without one: the sum of both parts over the longer one."""
    step = statistics.median(one for turn in turns for one in turn.seconds)
    generate = statistics.median(one for turn in turns for one in turn.generate)
    return step / max(generate, step - generate)


def controller_share(turns: Sequence[Turn]) -> float:
    """Return processor time of the controller over wall-clock time."""
    return sum(turn.controller for turn in turns) / sum(turn.wall for turn in turns)


def main() -> None:
    made = parser(__doc__)
    add_sizes(made)
    made.add_argument("--dtype", default="fp16")
    made.add_argument("--engine", default="native", choices=("native", "vllm"))
    made.add_argument("--trainers", type=int, default=1)
    made.add_argument("--engines", type=int, default=1)
    made.add_argument("--steps", type=int, default=5, help="steps of a turn, at least 3")
    args = made.parse_args()
    sizes = (args.prompts, args.siblings, args.tokens)
    config = configured(args.model, args.dtype, args.trainers, args.engines, args.engine, sizes)
    parts = with_rewards(assemble(config), equal_share=0.0)
    try:
        progress = Progress(policy_version=first_sync(parts).policy_version)
        _, progress = run_turn(parts, progress, 3, 0)  # warm-up
        turns: dict[int, list[Turn]] = {0: [], 1: []}
        for _ in range(args.repeats):
            for staleness, taken in turns.items():
                turn, progress = run_turn(parts, progress, args.steps, staleness)
                taken.append(turn)
                shown = ", ".join(f"{one:.2f}" for one in turn.seconds)
                print(f"  max_staleness={staleness}: {shown} s; generate {turn.generate[0]:.2f} s", flush=True)
        plain, ahead = (statistics.median(s for turn in turns[k] for s in turn.seconds) for k in (0, 1))
        table = Table(f"{args.model}, {args.trainers} ranks, {args.engines} engines")
        share = controller_share(turns[0])
        table.add(Row(what="controller's share of a step", ours=share, peer=SHARE, target=1.0, better="lower"))
        table.add(Row(what="seconds of a step, one step off", ours=ahead, peer=plain, target=1.0, better="lower"))
        print(f"possible speed-up of a perfect overlap: {possible_speed_up(turns[0]):.2f}")
        table.end(args.json)
    finally:
        parts.close()


if __name__ == "__main__":
    main()
