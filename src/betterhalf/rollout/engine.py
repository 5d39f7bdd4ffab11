"""Interface between a run and its rollout engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from betterhalf.config.schema import SamplingConfig
from betterhalf.errors import EngineError
from betterhalf.precision.contract import SideReport
from betterhalf.types import Completion, GenerateRequest


class RolloutEngine(Protocol):
    """Sampler of completions from the behavior policy mu.

    Sampling is seeded: the same requests and weights give the same tokens.

    A new engine is awake. Between `sleep` and `wake` only `sleep`, `wake`, `restart` and `close` may be called: the
    caller wakes the engine, which need not wake by itself.

    `EngineCapabilities` declares what an engine can do beyond this, and which of these methods it lacks.
    """

    def generate(self, requests: Sequence[GenerateRequest], sampling: SamplingConfig) -> list[tuple[Completion, ...]]:
        """Sample `group_size` completions for each request, in request order and sibling order.

        Each completion carries the `policy_version` loaded last; the caller refuses any other (`require_version`).
        Where `sampling` truncates the distribution and a request asks for it (`with_support`), completions carry their
        `support`, if the engine declares `EngineCapabilities.reports_support`. Those of a mixture of experts carry
        their `experts` if a request asks for them (`with_experts`) and the engine declares `reports_experts`.

        Raises:
            InputError: a prompt is empty, leaves no room for one more token in the model's context, or holds a token
                outside the vocabulary.
            EngineNumericsError: a behavior logprob is not finite.
            EngineDiedError: the engine's process ended. After `restart` and `load_weights` the same requests give the
                same completions.
        """
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return log mu of each given token but the first, at temperature 1, as the engine's prefill computes it.

        Call it only if the engine declares `EngineCapabilities.scores`.

        Args:
            sequences: token ids, at least two in each sequence.

        Returns:
            For each sequence, the logprobs in nats of its tokens from the second on.

        Raises:
            InputError: a sequence has fewer than two tokens, is longer than the model's context, or holds a token
                outside the vocabulary.
            EngineNumericsError: a logprob is not finite.
        """
        ...

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, policy_version: int, partial: bool = False
    ) -> None:
        """Replace all weights in place, or some of them.

        Args:
            weights: (unfused Hugging Face name, tensor in the wire dtype), every weight once.
            policy_version: version of these weights, for `Completion.policy_version`.
            partial: True if some weights are left out, as by `wire.WeightStream.changed`; they keep the values of
                earlier loads. Weights that engines fuse, such as those of queries, keys and values, arrive together.

        Raises:
            EngineError: a name is unknown, missing or repeated, or a tensor has the wrong shape.
        """
        ...

    def digests(self) -> dict[str, str]:
        """Return unfused Hugging Face name -> digest of the weight that the engine holds, in the rollout dtype."""
        ...

    def report(self) -> SideReport:
        """Run the engine briefly and report what it really computes in; includes `digests`."""
        ...

    def sleep(self) -> None:
        """Free the device for the trainer, if both share it and the engine supports that.

        `generate`, `score`, `load_weights`, `digests` and `report` need `wake` first. The weights and their version
        are kept. Calling it twice is harmless.
        """
        ...

    def wake(self) -> None:
        """Undo `sleep`; harmless when awake.

        Raises:
            EngineDiedError: the engine's process ended during sleep.
        """
        ...

    def restart(self) -> None:
        """Replace the engine after an `EngineDiedError` by a new one, awake and without weights.

        Raises:
            EngineError: it cannot be started, or the engine has no process of its own (then its declared `max_restarts`
                is 0).
        """
        ...

    def close(self) -> None:
        """Release memory and end processes; calling it twice is harmless."""
        ...


@runtime_checkable
class SelfRestarting(Protocol):
    """Engine that restarts its own processes; `EngineCapabilities.max_restarts` is then 0."""

    def take_restarts(self) -> int:
        """Return the number of restarts since the last call."""
        ...


def take_restarts(engine: RolloutEngine) -> int:
    """Return the number of times that the engine restarted its processes by itself since the last call.

    Call it once in each step: it also resets the count to which the limit on restarts applies.
    """
    return engine.take_restarts() if isinstance(engine, SelfRestarting) else 0


def require_version(groups: Iterable[Iterable[Completion]], policy_version: int) -> None:
    """Refuse completions sampled by other weights than those they are compared with.

    Raises:
        EngineError: a completion has another policy version, so its staleness would be measured as mismatch.
    """
    versions = [completion.policy_version for group in groups for completion in group]
    stale = [version for version in versions if version != policy_version]
    if stale:
        raise EngineError(
            f"{len(stale)} of {len(versions)} completions were sampled by stale weights, of policy version {stale[0]}, "
            f"where the engine should hold version {policy_version}: it did not take the last weight sync; check "
            "that load_weights returns only when the new weights sample, then continue with --resume"
        )


def require_supports(groups: Iterable[Iterable[Completion]], sampling: SamplingConfig) -> None:
    """Refuse completions from a truncated distribution that lack the tokens they could have drawn.

    Raises:
        EngineError: a completion has no support although `sampling` truncates, or not one for each token.
    """
    if not sampling.truncates:
        return
    for completion in (completion for group in groups for completion in group):
        count = 0 if completion.support is None else len(completion.support.counts)
        if count != len(completion.token_ids):
            raise EngineError(
                f"a completion of {len(completion.token_ids)} tokens names the tokens that truncation kept for {count} "
                "of them, so the trainer cannot score the distribution that was sampled; fill Completion.support in "
                "the engine, or sample with engine=native"
            )


def require_experts(requests: Iterable[GenerateRequest], groups: Iterable[Iterable[Completion]]) -> None:
    """Refuse completions without the experts that the trainer is to replay.

    Args:
        requests: requests with `with_experts` set.
        groups: the completions of each request.

    Raises:
        EngineError: a completion has no experts, or not those of each token but its last.
    """
    for request, group in zip(requests, groups, strict=True):
        for completion in group:
            wanted = len(request.token_ids) + len(completion.token_ids) - 1
            count = 0 if completion.experts is None else int(completion.experts.experts_NLK.shape[0])
            if count != wanted:
                raise EngineError(
                    f"a completion names the experts of {count} tokens, and {wanted} were computed, so the trainer "
                    "cannot replay them; fill Completion.experts in the engine, sample with engine=native, or set "
                    "algorithm.routing_replay=false"
                )
