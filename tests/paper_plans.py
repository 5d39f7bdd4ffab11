"""Plan the paper's experiments from the models' config.json alone, for the rows of experiments/README.md.

    python -m tests.paper_plans    # print the sentence of every file

The folders in tests/configs/paper hold the published configurations. Prompts are as long as the paper allows at most.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from betterhalf.config.load import load_config
from betterhalf.config.schema import MathTask
from betterhalf.diagnostics.sizes import GIB
from betterhalf.examine.plan import RunPlan, plan

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "tests" / "configs" / "paper"
FILES = sorted((ROOT / "experiments" / "paper").rglob("*.toml"))

GPU_GIB = 80
BYTES = 3 * 1024
"""Length of a problem: 1,024 estimated tokens, the longest prompts of the paper's sanity test."""


def paper_plan(file: Path, folder: Path) -> RunPlan:
    """Plan an experiment on its own `[cluster]` with GPUs of 80 GiB; `folder` takes the data."""
    config = load_config(file)
    data = folder / "problems.jsonl"
    rows = [
        {"problem": f"{index:04}".ljust(BYTES, "x"), "answer": "1"} for index in range(config.training.prompts_per_step)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = config.model.model_copy(update={"name": str(MODELS / config.model.name.rpartition("/")[2])})
    task = MathTask(path=str(data), template="none")
    return plan(config.model_copy(update={"model": model, "task": task}), GPU_GIB)


def sentence(found: RunPlan) -> str:
    """Return a plan in the words of a row: GPUs, and the memory of a rank and of an engine."""
    rank, engine = found.memory.processes
    gpus = sum(device.count for device in found.memory.devices)
    sizes = f"a rank {rank.total_bytes / GIB:.0f} GiB, an engine {engine.total_bytes / GIB:.0f} GiB"
    return f"plan: {gpus} GPUs of {GPU_GIB} GiB; {sizes}"


if __name__ == "__main__":
    for path in FILES:
        with tempfile.TemporaryDirectory() as temporary:
            print(path.relative_to(ROOT / "experiments"), sentence(paper_plan(path, Path(temporary))), sep=" | ")
