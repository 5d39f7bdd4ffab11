"""Measure the controller's share of a step against the number of ranks, with ranks that sleep instead of computing.

    python benchmarks/ranks.py [--ranks 1 2 4 ... 64] [--packs 256] [--tokens 1024] [--seconds 0.02]

The real `TrainerGroup` splits packs, sends them, and combines the answers; each rank is a thread that unpickles what it
is sent, sleeps for `--seconds` a pass, and answers with records of the right shapes. Time is the processor time of the
controller's thread, pickling included, so the sleeping and other processes do not count. The first table varies the
ranks at a constant number of tokens, the second the tokens at a constant number of ranks: linear if the last column is
constant. Ray's own cost for each call is not part of it.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from packs import pack_of, random_ids

from betterhalf.algorithms.loss_stats import LossStats
from betterhalf.algorithms.presets import PRESETS
from betterhalf.batches import Denominators, MicroBatch
from betterhalf.cluster.placement import Slot
from betterhalf.cluster.rank_process import RankFacts
from betterhalf.cluster.session import Session
from betterhalf.cluster.trainer_group import TrainerGroup
from betterhalf.config.load import configuration_of
from betterhalf.training.trainer import OptimReport, TokenScores

SLOT = Slot(bundle=0, cpus=1, gpus=0, threads=1)
REPORT = OptimReport(
    skipped=False,
    first_offender=None,
    grad_norm=1.0,
    subnormal_fraction=0.0,
    zero_fraction=0.0,
    overflow_fraction=0.0,
    loss_scale=1.0,
    policy_version=1,
)


class SleepingRank:
    """A process of the session, in a thread of this one."""

    ended = False

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds = name, seconds
        self._pool = ThreadPoolExecutor(1)

    def call(self, method: str, *arguments: Any, seconds: float | None = None) -> Future[Any]:
        """Pickle the arguments in the caller's thread, and answer from another one."""
        return self._pool.submit(self._answer, method, pickle.dumps(arguments, protocol=5))

    def _answer(self, method: str, sent: bytes) -> Any:
        arguments = pickle.loads(sent)
        if method in ("measure", "forward_backward"):
            packs, passes = arguments[:2]
            time.sleep(passes * self.seconds)
            return LossStats.empty() if method == "forward_backward" else list(map(scores, packs))
        answers = {
            "load": RankFacts(machine={}, model_config=None, notes=(), parameters=1),
            "address": ("127.0.0.1", 1),
            "optim_step": REPORT,
        }
        return answers.get(method)

    def end(self) -> None:
        """End the thread."""
        self._pool.shutdown()


class SleepingSession:
    """A session whose processes sleep."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(
        self, build: Callable[..., object], slot: Slot, name: str, died: object, **arguments: Any
    ) -> SleepingRank:
        """Start a rank."""
        return SleepingRank(name, self.seconds)


def scores(pack: MicroBatch) -> TokenScores:
    """Return scores of the right shape."""
    return TokenScores(logprobs_C=torch.zeros(len(pack.target_ids_C)), entropies_C=torch.zeros(len(pack.target_ids_C)))


def group_of(ranks: int, seconds: float) -> TrainerGroup:
    """Return a group of sleeping ranks."""
    config = configuration_of({"cluster.backend": "ray", "cluster.trainers": ranks})
    session = cast(Session, SleepingSession(seconds))
    return TrainerGroup(config, session, [SLOT] * ranks, keep_reference=False)


def controller_seconds(group: TrainerGroup, packs: Sequence[MicroBatch]) -> tuple[float, float]:
    """Return the processor seconds of this thread, and the seconds that pass, in one step of four calls."""
    tokens = sum(pack.num_tokens for pack in packs)
    start, passed = time.thread_time(), time.perf_counter()
    group.measure(packs)
    group.forward_backward(packs, PRESETS["grpo"], Denominators(sequences=1, tokens=tokens, max_tokens=tokens))
    group.optim_step(1e-6)
    return time.thread_time() - start, time.perf_counter() - passed


def row(ranks: int, packs: int, tokens: int, seconds: float, repeats: int) -> str:
    """Return a line of a table: the least of some repetitions."""
    # Packs of their own: pickle would send equal objects once.
    step = [pack_of(random_ids(1000, 1, tokens)) for _ in range(packs)]
    group = group_of(ranks, seconds)
    try:
        used, passed = min(controller_seconds(group, step) for _ in range(repeats))
    finally:
        group.close()
    total = packs * tokens
    cells = (ranks, total, f"{1e3 * used:.2f}", f"{1e3 * passed:.0f}", f"{1e9 * used / total:.1f}")
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    made.add_argument("--packs", type=int, default=256)
    made.add_argument("--tokens", type=int, default=1024, help="tokens of each pack")
    made.add_argument("--seconds", type=float, default=0.02, help="duration of a pass")
    made.add_argument("--repeats", type=int, default=3)
    args = made.parse_args()
    torch.set_num_threads(1)
    heads = "| ranks | tokens | controller, ms | step, ms | controller, ns a token |\n|---|---|---|---|---|"
    print(heads)
    for ranks in args.ranks:
        print(row(ranks, args.packs, args.tokens, args.seconds, args.repeats), flush=True)
    print(f"\n{heads}")
    for factor in (1, 2, 4, 8):
        print(row(max(args.ranks), factor * args.packs // 4, args.tokens, args.seconds, args.repeats), flush=True)


if __name__ == "__main__":
    main()
