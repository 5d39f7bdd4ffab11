"""Packing: the rollouts of a step are concatenated into micro-batches without padding.

A seeded shuffle of all rollouts is cut into one train batch for each optimizer step. Each train batch is cut into
micro-batches by a token budget; siblings are placed next to each other, so that they share one copy of their prompt.
Within a micro-batch, whole sequences and shared prompts come first, then the completions of siblings; each kind is
sorted by length, so that segments of equal length share an attention call.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from betterhalf.batches import Denominators, MicroBatch, PackedSegment, StepBatch, TrainBatch
from betterhalf.config.schema import RunConfig
from betterhalf.token_support import PackedSupport, TokenSupport, TopTokens, joined
from betterhalf.types import Rollout, TokenExperts

TokenIds = tuple[int, ...]


def pack_step(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    config: RunConfig,
    step: int,
    *,
    left_out: Sequence[Rollout] = (),
    epoch: int = 0,
    train_all: bool = False,
) -> StepBatch:
    """Pack one epoch of a step, in host memory.

    Args:
        rollouts: [S], groups in order, siblings in order.
        advantages: one for each rollout; those equal to 0 are measured but not trained on, unless `train_all` is set.
        config: sizes and seed.
        step: seeds the shuffle.
        left_out: rollouts that were sampled in the step but are not trained on; packed separately, to be measured.
        epoch: number of earlier passes over the same rollouts; seeds the shuffle too.
        train_all: train on rollouts without advantage too, because the loss has terms that do not depend on it, or
            because the advantages are still to be set by `with_advantages`.

    Returns:
        `config.training.optimizer_steps` train batches. Their denominators count zero-advantage rollouts too, so
        leaving those out of the backward pass changes nothing. Each train batch has at least one pack for each of the
        `config.cluster.trainers` ranks, if it has that many rollouts to train on.
    """
    shares = _shares(len(rollouts), config, step, epoch)
    budget = config.training.tokens_per_micro_batch
    packer = _Packer([*rollouts, *left_out], [*advantages, *[0.0] * len(left_out)], budget)
    masked = {i for i, r in enumerate(rollouts) if config.algorithm.mask_truncated and r.completion.truncated}
    trained = {i for i, advantage in enumerate(advantages) if train_all or advantage != 0.0} - masked
    packs: list[MicroBatch] = []

    def added(indices: Sequence[int], fewest: int = 1) -> tuple[int, ...]:
        """Pack some rollouts, and return the indices of their packs."""
        first = len(packs)
        packs.extend(packer.micro_batches(indices, fewest))
        return tuple(range(first, len(packs)))

    train_batches = tuple(
        TrainBatch(
            micro_batches=added([i for i in share if i in trained], config.cluster.trainers),
            measure_only=added([i for i in share if i not in trained | masked]),
            masked=added([i for i in share if i in masked]),
            denominators=_denominators([rollouts[i] for i in share], config.sampling.max_tokens),
        )
        for share in shares
    )
    left_out_packs = added(range(len(rollouts), len(rollouts) + len(left_out)))
    return StepBatch(packs=tuple(packs), train_batches=train_batches, left_out=left_out_packs)


def packs_of(rollouts: Sequence[Rollout], config: RunConfig, step: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Return the rollout indices of each pack of each train batch, if every rollout is trained on; see `pack_step`."""
    packer = _Packer(rollouts, [1.0] * len(rollouts), config.training.tokens_per_micro_batch)
    shares = _shares(len(rollouts), config, step, epoch=0)
    return tuple(tuple(map(tuple, packer.packs(share, config.cluster.trainers))) for share in shares)


def with_advantages(batch: StepBatch, advantages: Sequence[float]) -> StepBatch:
    """Return the batch with other advantages in the same packs; rollouts that are left out keep 0.

    Args:
        batch: packed with `train_all`, so that its packs do not depend on the advantages.
        advantages: one for each rollout that is not left out.
    """
    own = [index for train_batch in batch.train_batches for index in train_batch.packs]
    packs = list(batch.packs)
    for index in own:
        packs[index] = replace(
            packs[index], advantages_S=_floats([advantages[i] for i in packs[index].rollout_index_S])
        )
    return replace(batch, packs=tuple(packs))


def pack_measured(rollouts: Sequence[Rollout], config: RunConfig) -> tuple[MicroBatch, ...]:
    """Pack rollouts that are only scored, in the layout that training uses.

    Packs are filled from the shortest sequence to the longest, siblings together.

    Args:
        rollouts: [S], in the order that `rollout_index_S` of the packs refers to.
        config: gives `training.tokens_per_micro_batch`.
    """
    packer = _Packer(rollouts, [0.0] * len(rollouts), config.training.tokens_per_micro_batch)
    return packer.micro_batches(sorted(range(len(rollouts)), key=packer.length))


def pack_sequence(token_ids: Sequence[int]) -> MicroBatch:
    """Return a pack of one sequence, to be scored from its second token on.

    Its behavior logprobs and advantages are 0: nothing was sampled.
    """
    tokens, positions = _ints(list(token_ids)), torch.arange(len(token_ids))
    return MicroBatch(
        token_ids_T=tokens,
        position_ids_T=positions,
        segments=(PackedSegment(length=len(token_ids)),),
        loss_rows_C=positions[:-1],
        target_ids_C=tokens[1:],
        sequence_index_C=torch.zeros_like(positions[:-1]),
        behavior_logprobs_C=torch.zeros(len(token_ids) - 1),
        advantages_S=torch.zeros(1),
        rollout_index_S=(0,),
    )


def _shares(rollouts: int, config: RunConfig, step: int, epoch: int) -> list[list[int]]:
    """Return the rollout indices of each train batch, shuffled."""
    order = list(range(rollouts))
    random.Random(f"pack-{config.seed}-{step}{f'-{epoch}' if epoch else ''}").shuffle(order)
    return _split_evenly(order, config.training.optimizer_steps)


def _split_evenly(items: list[int], parts: int) -> list[list[int]]:
    """Split into contiguous shares whose sizes differ by at most one."""
    edges = [round(k * len(items) / parts) for k in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def _denominators(rollouts: Sequence[Rollout], max_tokens: int) -> Denominators:
    tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    return Denominators(sequences=len(rollouts), tokens=tokens, max_tokens=max_tokens)


class _Packer:
    """Builder of micro-batches from rollout indices."""

    def __init__(self, rollouts: Sequence[Rollout], advantages: Sequence[float], budget: int) -> None:
        self.rollouts = rollouts
        self.advantages = advantages
        self.budget = budget

    def length(self, index: int) -> int:
        """Return the number of tokens of prompt and completion, observations included."""
        rollout = self.rollouts[index]
        return len(rollout.prompt.token_ids) + len(rollout.completion.with_observations())

    def micro_batches(self, indices: Sequence[int], fewest: int = 1) -> tuple[MicroBatch, ...]:
        """Fill packs up to the budget, in the given order but with siblings next to each other.

        A prompt counts once in each pack. A sequence longer than the budget gets its own pack. If that makes fewer than
        `fewest` packs, the budget is lowered until there are as many, or one for each sequence.
        """
        return tuple(self.micro_batch(sorted(pack, key=self.length)) for pack in self.packs(indices, fewest))

    def packs(self, indices: Sequence[int], fewest: int) -> list[list[int]]:
        """Return the rollout indices of each pack of `micro_batches`."""
        packs = self._filled(indices, self.budget)
        if len(packs) < min(fewest, len(indices)):
            packs = self._spread(indices, min(fewest, len(indices)))
        return packs

    def _spread(self, indices: Sequence[int], fewest: int) -> list[list[int]]:
        """Fill at least `fewest` packs, and no more if packs of up to 1.5 times an equal share of the tokens allow it.

        Each further pack would be one more pass, in which the other ranks wait.
        """
        share = -(-sum(map(self.length, indices)) // fewest)
        budgets = [share + share * eighths // 8 for eighths in range(5)]
        exact = (packs for budget in budgets if len(packs := self._filled(indices, budget)) == fewest)
        found = next(exact, None)
        while found is None:
            share = share * 7 // 8
            packs = self._filled(indices, share)
            found = packs if len(packs) >= fewest else None
        return found

    def _filled(self, indices: Sequence[int], budget: int) -> list[list[int]]:
        """Return the rollout indices of each pack."""
        packs: list[list[int]] = []
        room = 0
        for prompt, siblings in _by_prompt(self.rollouts, indices).items():
            held = False
            for index in siblings:
                own = len(_inputs(self.rollouts[index]))
                needed = own if held else len(prompt) + own
                if not packs or needed > room:
                    packs.append([])
                    room, needed = budget, len(prompt) + own
                packs[-1].append(index)
                room -= needed
                held = True
        return packs

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Build one pack; S follows the order of `indices`, T that of the layout."""
        chosen = [self.rollouts[i] for i in indices]
        layout = _Layout(chosen)
        return MicroBatch(
            token_ids_T=_ints(layout.token_ids),
            position_ids_T=_ints(layout.positions),
            segments=tuple(layout.segments),
            loss_rows_C=_ints([row for rows in layout.loss_rows for row in rows]),
            target_ids_C=_ints([t for r in chosen for t in r.completion.token_ids]),
            sequence_index_C=_ints([k for k, r in enumerate(chosen) for _ in r.completion.token_ids]),
            behavior_logprobs_C=_floats([x for r in chosen for x in r.completion.behavior_logprobs]),
            advantages_S=_floats([self.advantages[i] for i in indices]),
            rollout_index_S=tuple(indices),
            **_top([r.completion.top for r in chosen]),
            experts_TLK=_packed_experts([r.completion.experts for r in chosen], layout.rows),
            support=_packed_support([r.completion.support for r in chosen]),
        )


class _Layout:
    """Layout of a pack: sequences without siblings and shared prompts, then completions of siblings, each by length.

    Siblings are sequences with equal prompt token ids. A completion's last token is left out: nothing is predicted
    after it, so its hidden state is never used. Observations are inputs without loss rows of their own.
    """

    def __init__(self, chosen: Sequence[Rollout]) -> None:
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[PackedSegment] = []
        self.loss_rows: list[list[int]] = [[] for _ in chosen]
        """Row before each completion token, for each sequence."""
        self.rows: list[tuple[int, slice]] = []
        """For each segment, the sequence whose tokens it has, and their positions in it."""
        self.inputs = [_inputs(rollout) for rollout in chosen]
        self.predictors = [_predictors(rollout) for rollout in chosen]
        groups = sorted(_by_prompt(chosen, range(len(chosen))).items(), key=self._head_length)
        for prompt, siblings in groups:
            self._add_head(prompt, siblings)
        tails = [
            (k, place, len(prompt))
            for place, (prompt, siblings) in enumerate(groups)
            for k in siblings
            if len(siblings) > 1 and self.inputs[k]
        ]
        for tail in sorted(tails, key=lambda tail: (len(self.inputs[tail[0]]), tail[2])):
            self._add_tail(*tail)
        for rows, rollout in zip(self.loss_rows, chosen, strict=True):
            del rows[len(rollout.completion.token_ids) :]

    def _head_length(self, group: tuple[TokenIds, list[int]]) -> int:
        prompt, siblings = group
        return len(prompt) + (len(self.inputs[siblings[0]]) if len(siblings) == 1 else 0)

    def _add_head(self, prompt: TokenIds, siblings: list[int]) -> None:
        """Add a whole sequence, or a prompt that several sequences share."""
        last = len(self.token_ids) + len(prompt) - 1
        for k in siblings:
            self.loss_rows[k].append(last)
        alone: TokenIds = ()
        if len(siblings) == 1:
            (k,) = siblings
            alone = self.inputs[k]
            self.loss_rows[k].extend(last + 1 + place for place in self.predictors[k])
        self._add((*prompt, *alone), 0, None, siblings[0])

    def _add_tail(self, k: int, prefix: int, prompt_length: int) -> None:
        """Add the completion of one of several siblings."""
        start = len(self.token_ids)
        self.loss_rows[k].extend(start + place for place in self.predictors[k])
        self._add(self.inputs[k], prompt_length, prefix, k)

    def _add(self, token_ids: TokenIds, first_position: int, prefix: int | None, sequence: int) -> None:
        self.rows.append((sequence, slice(first_position, first_position + len(token_ids))))
        self.token_ids.extend(token_ids)
        self.positions.extend(range(first_position, first_position + len(token_ids)))
        self.segments.append(PackedSegment(length=len(token_ids), prefix=prefix))


def _top(tops: Sequence[TopTokens | None]) -> dict[str, torch.Tensor]:
    """Return the fields of a pack with the engine's most likely tokens; empty unless all completions have them."""
    present = [top for top in tops if top is not None]
    if not present or len(present) < len(tops):
        return {}
    return {
        "top_ids_CK": torch.cat([top.token_ids_CK for top in present]),
        "behavior_top_logprobs_CK": torch.cat([top.logprobs_CK for top in present]),
    }


def _packed_experts(experts: Sequence[TokenExperts | None], rows: Sequence[tuple[int, slice]]) -> torch.Tensor | None:
    """Return the experts of a pack's tokens; None unless all completions have them."""
    present = [one.experts_NLK for one in experts if one is not None]
    if not present or len(present) < len(experts):
        return None
    return torch.cat([present[sequence][positions] for sequence, positions in rows])


def _packed_support(supports: Sequence[TokenSupport | None]) -> PackedSupport | None:
    """Put the supports of the sequences of a pack one after another; None if sampling was not truncated."""
    present = [support for support in supports if support is not None]
    if not present:
        return None
    assert len(present) == len(supports), "a pack mixes truncated sampling with whole distributions"
    support = joined(present)
    # torch does not read an empty buffer: every set may be the whole vocabulary.
    words = torch.frombuffer(bytearray(support.words or bytes(4)), dtype=torch.int32)[: len(support.words) // 4]
    return PackedSupport(vocabulary=support.vocabulary, counts_C=_ints(list(support.counts)), words_K=words)


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _floats(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _inputs(rollout: Rollout) -> TokenIds:
    """Return the tokens after the prompt that the trainer reads: all but the last, after which nothing is predicted."""
    return tuple(rollout.completion.with_observations()[:-1])


def _predictors(rollout: Rollout) -> list[int]:
    """Return the index in `_inputs` of the token before each sampled token but the first, which the prompt precedes."""
    lengths = {observation.before: len(observation.token_ids) for observation in rollout.completion.observations}
    shifts = accumulate(lengths.get(index, 0) for index in range(1, len(rollout.completion.token_ids)))
    return [index + shift for index, shift in enumerate(shifts)]


def _by_prompt(rollouts: Sequence[Rollout], indices: Iterable[int]) -> dict[TokenIds, list[int]]:
    """Group the indices of rollouts with equal prompts, in order of first appearance."""
    groups: dict[TokenIds, list[int]] = {}
    for index in indices:
        groups.setdefault(tuple(rollouts[index].prompt.token_ids), []).append(index)
    return groups


def by_rollout(pack: MicroBatch, values_C: torch.Tensor) -> dict[int, list[float]]:
    """Split the values of completion tokens by rollout index; each list is in token order."""
    counts = torch.bincount(pack.sequence_index_C, minlength=pack.num_sequences).tolist()
    parts = torch.split(values_C, counts)
    return {index: part.tolist() for index, part in zip(pack.rollout_index_S, parts, strict=True)}
