"""Time a training pass of SmolLM2-135M on a CPU: ours in FP16, BF16 and FP32 against transformers with torch.

    python benchmarks/train_pass.py [--json]

Ours is the trainer's own pass: packed attention, FP32 logprobs in chunks, half gradients added to FP32 masters. The
peers are the plain transformers module in one dtype, with its own loss. Weights and tokens are the same, and every
token has a loss; the sides alternate after a warm-up, and medians are compared. Weights are not updated between passes,
so the numbers do not include the widening of the weights after each update.

The last row compares our FP16 pass with its matrix products alone, in FP32, each with the faster of torch's library and
ours for its shape in the same run: the share of the peak.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from typing import Any

import torch
from packs import pack_of, random_ids
from side_by_side import Action, Row, Table, parser, seconds_of, take_turns
from torch import Tensor

from betterhalf.config.schema import ModelConfig, PrecisionConfig, RunConfig
from betterhalf.models.loading import LoadedModel, load_model
from betterhalf.precision.formats import torch_dtype
from betterhalf.precision.products import product
from betterhalf.precision.roles import build_precision
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import DtypeName

LOSS_SCALE = 2.0**16

PAIRS: tuple[tuple[DtypeName, DtypeName, float], ...] = (
    ("fp16", "fp16", 20.0),
    ("fp16", "fp32", 0.90),
    ("bf16", "bf16", 1.0),
    ("fp32", "fp32", 0.95),
)
"""(our format, the peer's, target ratio) of each row."""


def our_pass(model: LoadedModel, token_ids_T: Tensor, dtype: DtypeName) -> Action:
    """Return the trainer's forward and backward pass."""
    config = RunConfig(precision=PrecisionConfig(preset=dtype))
    precision = build_precision(config.precision, torch.device("cpu"))
    copied = replace(model, module=duplicate(model))
    trainer = PolicyTrainer(copied, config=config, precision=precision)
    micro = pack_of(token_ids_T.unsqueeze(0))

    def run() -> None:
        (-trainer.score(micro).mean() * LOSS_SCALE).backward()

    return run


def peer_pass(model: LoadedModel, token_ids_T: Tensor, dtype: DtypeName) -> Action:
    """Return a pass of the plain transformers module with its own loss, in one dtype."""
    module = duplicate(model)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch_dtype(dtype))
    ids = token_ids_T.unsqueeze(0)

    def run() -> None:
        (module(input_ids=ids, labels=ids, use_cache=False).loss * LOSS_SCALE).backward()
        module.zero_grad(set_to_none=True)

    return run


def duplicate(model: LoadedModel) -> Any:
    """Return the module with a separate copy of the weights."""
    return copy.deepcopy(model.module)


def products(model: LoadedModel, tokens: int) -> dict[tuple[int, int, int], int]:
    """Return (m, k, n) -> number of [m, k] x [k, n] products in a forward and backward pass over all weights."""
    shapes: dict[tuple[int, int, int], int] = {}
    embedding = model.module.get_input_embeddings().weight
    weights = [p for p in model.module.parameters() if p.ndim == 2 and p is not embedding]
    for out, into in [tuple(weight.shape) for weight in (*weights, model.module.get_output_embeddings().weight)]:
        for shape in ((tokens, into, out), (tokens, out, into), (out, tokens, into)):
            shapes[shape] = shapes.get(shape, 0) + 1
    return shapes


def peak_seconds(shapes: dict[tuple[int, int, int], int], repeats: int) -> float:
    """Return the seconds of all products in FP32, each with the faster library at its median speed."""
    total = 0.0
    for (m, k, n), count in shapes.items():
        left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        torch.mm(left, right, out=out)
        product(left, right.t())
        times = [seconds_of(lambda: torch.mm(left, right, out=out)) for _ in range(2 * repeats + 1)]  # noqa: B023
        times_onednn = [seconds_of(lambda: product(left, right.t())) for _ in range(2 * repeats + 1)]  # noqa: B023
        total += count * min(statistics.median(times), statistics.median(times_onednn))
    return total


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--tokens", type=int, default=512, help="tokens of a pass")
    made.add_argument("--fp16-tokens", type=int, default=128, help="tokens of a pass against torch's slow FP16")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(ModelConfig(name="smollm2"))
    table = Table("tokens/s")
    for ours, peer, target in PAIRS:
        tokens = args.fp16_tokens if peer == "fp16" else args.tokens
        ids = random_ids(model.hf_config.vocab_size, 1, tokens)[0]
        sides = our_pass(model, ids, ours), peer_pass(model, ids, peer)
        mine, theirs = take_turns(*sides, repeats=args.repeats)
        what = f"{ours} pass vs transformers {peer}, {tokens} tokens"
        table.add(Row(what=what, ours=tokens / mine, peer=tokens / theirs, target=target))
    ids = random_ids(model.hf_config.vocab_size, 1, args.tokens)[0]
    shapes = products(model, args.tokens)
    ours_fp16 = our_pass(model, ids, "fp16")
    ours_fp16()
    turns = [(seconds_of(ours_fp16), peak_seconds(shapes, args.repeats)) for _ in range(args.repeats)]
    mine, peak = (statistics.median(times) for times in zip(*turns, strict=True))
    what = f"fp16 pass vs its FP32 matrix products alone, {args.tokens} tokens"
    table.add(Row(what=what, ours=args.tokens / mine, peer=args.tokens / peak, target=0.75))
    table.end(args.json)


if __name__ == "__main__":
    main()
