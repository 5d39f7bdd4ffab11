"""Write the tables of docs/scaling.md: memory, traffic and packing of three models on 8 and 64 GPUs.

    python benchmarks/plan_table.py          # print the tables
    python benchmarks/plan_table.py --write  # replace them in docs/scaling.md

The sizes are those of the models' published configurations; nothing is downloaded. `tests/unit/test_benchmarks.py`
checks that the page holds what this prints.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from betterhalf.config.load import configuration_of
from betterhalf.diagnostics.sizes import GIB, Machine
from betterhalf.examine.plan import RunPlan, plan_model
from betterhalf.types import Prompt

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- plan_table.py -->", "<!-- end of plan_table.py -->"

EXPERIMENT = "experiments/base/paper_r1d_1.5b.toml"
MEMORY = 80 * GIB
PROMPT_TOKENS = 100

_QWEN = {"vocab_size": 151_936, "max_position_embeddings": 40_960, "tie_word_embeddings": False}
MODELS: dict[str, PretrainedConfig] = {
    "1.5B": Qwen2Config(
        **_QWEN,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "14B": Qwen3Config(
        **_QWEN,
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "30B-A3B": Qwen3MoeConfig(
        **_QWEN,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
}
"""DeepSeek-R1-Distill-Qwen-1.5B, Qwen3-14B and Qwen3-30B-A3B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row: a model on a number of GPUs."""

    model: str
    ranks: int
    engines: int
    shards: int = 1
    """GPUs of each engine; vLLM samples if there are several, or if the native engine lacks the architecture."""
    vllm: bool = False

    @property
    def gpus(self) -> int:
        return self.ranks + self.engines * self.shards

    def settings(self) -> dict[str, Any]:
        """Return what the row changes in `EXPERIMENT`."""
        engine: dict[str, Any] = {"engine.max_concurrent": 64}
        if self.vllm:
            engine = {
                "engine": {"type": "vllm", "gpu_memory_utilization": 0.9, "tensor_parallel_size": self.shards},
            }
        return {
            "cluster": {
                "backend": "ray",
                "address": "auto",
                "trainers": self.ranks,
                "engines": self.engines,
                "trainer": {"gpus": 1},
                "engine": {"gpus": self.shards},
            },
            **engine,
        }


CASES = (
    Case(model="1.5B", ranks=4, engines=4),
    Case(model="1.5B", ranks=32, engines=32),
    Case(model="14B", ranks=6, engines=2, vllm=True),
    Case(model="14B", ranks=48, engines=16, vllm=True),
    Case(model="30B-A3B", ranks=6, engines=1, shards=2, vllm=True),
    Case(model="30B-A3B", ranks=48, engines=8, shards=2, vllm=True),
)


def planned(case: Case) -> RunPlan:
    """Plan one row."""
    prompts = [
        Prompt(prompt_id=str(index), text="", token_ids=(index,) + (0,) * (PROMPT_TOKENS - 1), answer="")
        for index in range(64)
    ]
    config = configuration_of(EXPERIMENT, case.settings())
    return plan_model(config, MODELS[case.model], prompts, Machine(gpu=True, memory_bytes=MEMORY), case.model)


def tables() -> str:
    """Return the tables in Markdown."""
    return "\n".join(_lines([(case, planned(case)) for case in CASES]))


def _lines(rows: list[tuple[Case, RunPlan]]) -> Iterator[str]:
    yield "| model | GPUs | ranks + engines | GPU of a rank | of it lasting | GPU of an engine | fits 80 GiB |"
    yield "|---|---|---|---|---|---|---|"
    for case, plan in rows:
        rank, engine = plan.memory.processes
        engines = f"{case.engines} of {case.shards} GPUs" if case.shards > 1 else f"{case.engines}"
        used = [f"{size / GIB:.1f} GiB" for size in (rank.total_bytes, rank.lasting_bytes, engine.total_bytes)]
        cells = (case.model, case.gpus, f"{case.ranks} + {engines}", *used, "yes" if plan.fits else "no")
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield "| model | GPUs | weight sync, all engines | optimizer step, sent by a rank | passes of it | balance, mixed |"
    yield "|---|---|---|---|---|---|"
    for case, plan in rows:
        traffic, mixed = plan.memory.traffic, plan.packings[-1]
        yield (
            f"| {case.model} | {case.gpus} | {traffic.sync_bytes / GIB:.1f} GiB | "
            f"{traffic.optimizer_step_bytes / GIB:.1f} GiB | {plan.packings[0].passes} | {mixed.balance:.2f} |"
        )


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--write", action="store_true", help="replace the tables of the page")
    args = made.parse_args()
    found = tables()
    print(found)
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replaced(text, found), encoding="utf-8")


def replaced(page: str, found: str) -> str:
    """Return the page with other tables between the two marks."""
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}\n).*(?=\n{re.escape(END)})", lambda _: f"\n{found}\n", page)


if __name__ == "__main__":
    main()
