"""Operations that torch lists as nondeterministic on a GPU are used only where a reason shows that it is harmless."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch

SRC = Path(__file__).parents[2] / "src" / "betterhalf"

HARMLESS = {
    ("diagnostics/bootstrap.py", "bincount"): "without weights: counts",
    ("diagnostics/bootstrap.py", "cumsum"): "of integers, and of counts on the CPU",
    ("diagnostics/bootstrap.py", "scatter_add"): "of ones in float64: counts, exact in every order",
    ("diagnostics/bootstrap.py", "scatter_reduce"): "a maximum",
    ("diagnostics/experts.py", "bincount"): "without weights: counts",
    ("diagnostics/pair_report.py", "bincount"): "without weights: counts",
    ("integrations/trl/batch.py", "gather"): "of values from all processes, and of one token of each row",
    ("ops.py", "gather"): "one logit of each row: its gradient adds nothing to anything",
    ("api/tensors.py", "bincount"): "without weights: counts",
    ("padded.py", "bincount"): "without weights: counts",
    ("padded.py", "index_put"): "equal values at a place; other values are refused",
    ("precision/loss_scaler.py", "gather"): "of names, from all ranks",
    ("precision/coverage.py", "scatter"): "one value for each place, on the CPU",
    ("precision/cpu_embedding.py", "index_add"): "on a CPU only",
    ("precision/routing.py", "bincount"): "without weights: counts",
    ("precision/routing.py", "gather"): "different experts of each row: its gradient adds nothing to anything",
    ("rollout/native/attention.py", "repeat_interleave"): "without a gradient",
    ("rollout/native/decoder.py", "cumsum"): "of integers",
    ("rollout/native/kv_cache.py", "index_put"): "one row for each place",
    ("rollout/native/kv_cache.py", "repeat_interleave"): "without a gradient",
    ("rollout/native/slots.py", "scatter"): "one value for each place",
    ("rollout/sampler.py", "cumsum"): "of integers",
    ("training/weights/rows.py", "scatter"): "sends each rank its rows",
    ("rollout/sampler.py", "gather"): "without a gradient",
    ("rollout/sampler.py", "scatter"): "a permutation: each place once",
    ("runs/epochs.py", "bincount"): "without weights: counts",
    ("rollout/support.py", "cumsum"): "of integers",
    ("rollout/support.py", "scatter"): "one value for each place, but for a last column that is dropped",
    ("cluster/process.py", "put"): "of a queue",
    ("cluster/session.py", "put"): "into the object store",
    ("cluster/weight_versions.py", "put"): "into the object store",
    ("runs/side_by_side.py", "put"): "of a queue",
    ("examine/pairs.py", "repeat_interleave"): "without a gradient",
    ("tasks/reward_worker.py", "gather"): "of coroutines, whose results keep their order",
    ("tasks/worker_main.py", "put"): "of a queue",
    ("tasks/worker_pool.py", "put"): "of a queue",
    (
        "training/weights/sums.py",
        "index_add",
    ): "rows of a sparse gradient, of which only a CPU makes any, each once",
    ("tracking/feed.py", "put"): "of messages into queues",
    ("training/weights/sharded.py", "gather"): "of rows from all ranks",
    ("training/pack.py", "bincount"): "without weights: counts",
    ("training/support.py", "repeat_interleave"): "of integers, without a gradient",
    ("training/token_scores.py", "scatter_add"): "one value for each row",
    ("training/top_scores.py", "gather"): "in a forward pass whose backward pass is written out",
    ("training/top_scores.py", "scatter_add"): "different places of each row; those outside a chunk add 0",
    ("kernels/gradients.py", "repeat_interleave"): "of integers, without a gradient",
    ("kernels/vocabulary.py", "cumsum"): "Triton's, within one program",
}
"""(file, operation without its trailing underscore) -> reason why its result is the same in every run."""

UNSEEN = {"getitem"}
"""Not a call: `x[index]` is differentiated in no fixed order on a CPU with several threads. `tests/unit/test_ops.py`
looks for it in the graphs of the losses."""


def listed() -> set[str]:
    """Return the operations on torch's own list, without trailing underscore; layers by the name they are called."""
    text = torch.use_deterministic_algorithms.__doc__ or ""
    names = re.findall(r"\* :(?:func|class):`torch\.(?:Tensor\.|nn\.functional\.|nn\.)?(\w+)`", text)
    return {name.strip("_") for name in names}


def called(tree: ast.AST) -> Iterator[str]:
    """Return the names of all functions called, without trailing underscores."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            yield name.rstrip("_")


def found() -> set[tuple[str, str]]:
    """Return every use in the sources, without `bmm`, `resize` and `median`: torch lists those for rare cases only."""
    wanted = listed() - UNSEEN - {"bmm", "resize", "median"}
    return {
        (str(file.relative_to(SRC)), name)
        for file in sorted(SRC.rglob("*.py"))
        for name in called(ast.parse(file.read_text(encoding="utf-8")))
        if name in wanted
    }


def test_the_list_is_torchs_own() -> None:
    assert {"index_add", "scatter_add", "bincount", "cumsum", "put", "histc", "gather", "index_put"} <= listed()
    assert {"Conv1d", "NLLLoss", "EmbeddingBag", "interpolate", "getitem"} <= listed()
    assert sorted(called(ast.parse("x.index_add_(0, i, y)\ntorch.histc(x)\nbincount(x)"))) == [
        *("bincount", "histc", "index_add"),
    ]


def test_no_operation_leaves_an_order_of_additions_to_chance() -> None:
    uses = found()
    unexplained = uses - set(HARMLESS)
    assert not unexplained, "add in a fixed order (`ops.segment_sum`), or say above why this does"
    assert set(HARMLESS) <= uses, "what is no longer used needs no reason"
