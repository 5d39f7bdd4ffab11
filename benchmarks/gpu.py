"""Time training and decoding on a GPU: FP16 against BF16, and both against the device's limits.

    python benchmarks/gpu.py --compile [--json] [--model qwen2.5-1.5b] [--tokens 8192] [--sequences 256]

The model has a real configuration and random weights, so nothing is downloaded. The formats alternate, twice each: a
trainer is built, warmed up and timed over whole steps (packs forward and backward, unscaling, clipping, fused AdamW);
its weights are sent to the native engine, which is timed per decoded token (a second call for one token gives the
prefill to subtract). A step with gradients that are not finite does less work, so it is an error here. `--compile`
compiles the trainer's layers, as `training.compile_layers` does; `--logits-mib` is `training.logits_mib`.

TFLOP/s count 6 operations for each weight and token, including the head's, and causal attention; recomputation does not
count. The floor of decoding is the time to read every weight and the cached keys and values once. Both are compared
with the datasheet if the device is known, else with a large product and a large copy that are measured first.

`--device cpu --model tiny --tokens 512 --sequences 16 --new-tokens 16` shows in seconds that the script works.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from packs import pack_of, random_ids
from side_by_side import Row, Table, parser, seconds_of

from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.models.loading import LoadedModel
from betterhalf.precision.roles import build_precision
from betterhalf.process import frozen_gc
from betterhalf.rollout.build import build_engine
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import DtypeName, GenerateRequest

SIBLINGS = 8
LEARNING_RATE = 1e-6
WARM_UP = 2
ROUNDS = 2
HALVES: tuple[DtypeName, DtypeName] = ("fp16", "bf16")

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # https://huggingface.co/Qwen/Qwen2.5-1.5B/blob/main/config.json
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}

DATASHEETS = {
    "NVIDIA H100 80GB HBM3": (989.4, 3350.0),
    "NVIDIA H200": (989.4, 4800.0),
    "NVIDIA A100-SXM4-80GB": (311.9, 2039.0),
}
"""Device name -> TFLOP/s of dense half products with FP32 sums, GB/s of its memory (NVIDIA's datasheets)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of the device."""

    tflops: float
    """TFLOP/s of half products."""
    gbs: float
    """GB/s of the device's memory."""
    source: str
    """`datasheet` or `measured`."""


@dataclass(slots=True)
class Times:
    """Times of one format, over all turns."""

    step: list[float] = field(default_factory=list)
    """Seconds of an optimizer step with its packs."""
    token: list[float] = field(default_factory=list)
    """Seconds per decoded token of all sequences."""
    peak_gib: float = 0.0
    """Peak device memory of training, in GiB."""


# -- the amount of work


def train_flops(hf: Any, *, sequences: int, length: int) -> float:
    """Return the operations of a forward and backward pass over some sequences, with every row through the head."""
    layers, width = hf.num_hidden_layers, head_dim(hf) * hf.num_attention_heads
    # Forward: two products of 2 * width for each of (length + 1) / 2 keys on average; backward twice that.
    attention = 6 * layers * width * (length + 1)
    return sequences * length * (6.0 * multiplied(hf) + attention)


def decode_bytes(hf: Any, *, sequences: int, length: float) -> float:
    """Return the bytes read for a token of each sequence, in half: weights, and keys and values of `length` tokens."""
    cached = 2 * hf.num_hidden_layers * hf.num_key_value_heads * head_dim(hf) * length
    return 2.0 * (multiplied(hf) + sequences * cached)


def multiplied(hf: Any) -> int:
    """Return the number of weights that a token is multiplied by: all matrices except the embedding, and the head."""
    width, kv_width = (head_dim(hf) * heads for heads in (hf.num_attention_heads, hf.num_key_value_heads))
    layer = hf.hidden_size * (2 * width + 2 * kv_width + 3 * hf.intermediate_size)
    return int(hf.num_hidden_layers * layer + hf.vocab_size * hf.hidden_size)


def head_dim(hf: Any) -> int:
    """Return the width of one head."""
    return int(hf.hidden_size // hf.num_attention_heads)


def limits_of(device: torch.device) -> Limits:
    """Return the limits from the datasheet, or measure them."""
    known = DATASHEETS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known:
        return Limits(tflops=known[0], gbs=known[1], source="datasheet")
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = (timed(action, device, 5) for action in (lambda: left @ right, lambda: target.copy_(source)))
    return Limits(tflops=2 * size**3 / product / 1e12, gbs=2 * source.numel() / copy / 1e9, source="measured")


def timed(action: Callable[[], Any], device: torch.device, repeats: int, warm_up: int = WARM_UP) -> float:
    """Return the median seconds until the device has finished an action."""

    def waited() -> None:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(warm_up):
        waited()
    return statistics.median(seconds_of(waited) for _ in range(repeats))


# -- the sides


def random_model(architecture: str, device: torch.device) -> LoadedModel:
    """Return the same random weights for every caller."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hf = Qwen2Config(**ARCHITECTURES[architecture])
    torch.manual_seed(0)
    with device:
        module = Qwen2ForCausalLM(hf).float().eval()
    context = hf.max_position_embeddings
    return LoadedModel(
        name=architecture, module=module, hf_config=hf, tokenizer=None, stop_token_ids=(), context_length=context
    )


def config_of(args: argparse.Namespace, dtype: DtypeName) -> RunConfig:
    return RunConfig.model_validate(
        {
            "precision": {"preset": dtype},
            "engine": {"type": "native", "max_concurrent": args.sequences},
            "training": {
                "compile_layers": args.compile,
                "activation_checkpointing": args.activation_checkpointing,
                "logits_mib": args.logits_mib,
            },
        }
    )


def trainer_for(args: argparse.Namespace, config: RunConfig, device: torch.device) -> PolicyTrainer:
    precision = build_precision(config.precision, device)
    return PolicyTrainer(random_model(args.model, device), config=config, precision=precision)


def time_steps(args: argparse.Namespace, trainer: PolicyTrainer) -> float:
    """Return the median seconds of an optimizer step."""
    device = trainer.precision.device
    ids = random_ids(trainer.module.config.vocab_size, args.tokens // args.length, args.length, device)
    pack = pack_of(ids)

    def step() -> None:
        for _ in range(args.packs):
            trainer.scaler.scale_loss(-trainer.score(pack).mean() / args.packs).backward()  # type: ignore[no-untyped-call]
        report = trainer.optim_step(LEARNING_RATE)
        if report.skipped:
            raise SystemExit(f"an optimizer step was skipped: {report.first_offender} was not finite")

    with frozen_gc():
        return timed(step, device, args.repeats)


def time_tokens(args: argparse.Namespace, trainer: PolicyTrainer) -> float:
    """Return the median seconds per decoded token of all sequences."""
    engine = build_engine(trainer.config, trainer.module.config, (), trainer.precision)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    ids = random_ids(trainer.module.config.vocab_size, args.sequences // SIBLINGS, args.prompt).tolist()
    requests = [
        GenerateRequest(token_ids=tuple(row), group_size=SIBLINGS, key=(0, 0, index)) for index, row in enumerate(ids)
    ]

    def sample(tokens: int) -> Callable[[], object]:
        return lambda: engine.generate(requests, SamplingConfig(max_tokens=tokens))

    device = trainer.precision.device
    with frozen_gc():
        # The longer one first: it makes the cache and the graphs that both use.
        whole, first = (timed(sample(tokens), device, args.repeats, warm_up=1) for tokens in (args.new_tokens, 1))
    engine.close()
    return (whole - first) / (args.new_tokens - 1)


def measure(args: argparse.Namespace, device: torch.device) -> dict[DtypeName, Times]:
    """Time both formats alternately; never are two trainers in memory."""
    found: dict[DtypeName, Times] = {dtype: Times() for dtype in HALVES}
    for _ in range(ROUNDS):
        for dtype, times in found.items():
            forget(device)
            trainer = trainer_for(args, config_of(args, dtype), device)
            times.step.append(time_steps(args, trainer))
            if device.type == "cuda":
                times.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
            times.token.append(time_tokens(args, trainer))
            del trainer
            print(f"{dtype}: step {times.step[-1]:.4g} s, token {1e3 * times.token[-1]:.4g} ms", flush=True)
    return found


def forget(device: torch.device) -> None:
    """Free the memory of the last turn, and reset the peak counter."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# -- the table


def rows_of(args: argparse.Namespace, hf: Any, limits: Limits, found: dict[DtypeName, Times]) -> list[Row]:
    """Return all comparisons."""
    fp16, bf16 = (found[dtype] for dtype in HALVES)
    step, token = (
        {dtype: statistics.median(getattr(times, what)) for dtype, times in found.items()} for what in ("step", "token")
    )
    sequences = args.tokens // args.length
    flops = args.packs * train_flops(hf, sequences=sequences, length=args.length)
    attended = args.prompt + args.new_tokens / 2
    floor = decode_bytes(hf, sequences=args.sequences, length=attended) / (limits.gbs * 1e9)
    training = f"train step, {args.packs} x {args.tokens} tokens{', compiled' if args.compile else ''}"
    decoding = f"decode, {args.sequences} sequences"
    rows = [
        lower(f"{training}: fp16 vs bf16, s", step["fp16"], step["bf16"], 0.98),
        lower(f"{decoding}: fp16 vs bf16, ms", 1e3 * token["fp16"], 1e3 * token["bf16"], 0.98),
    ]
    for dtype in HALVES:
        reached = flops / step[dtype] / 1e12
        rows += [
            Row(what=f"{dtype} {training}: TFLOP/s vs {limits.source}", ours=reached, peer=limits.tflops, target=0.45),
            Row(
                what=f"{dtype} {decoding}: tokens/s vs memory's floor",
                ours=args.sequences / token[dtype],
                peer=args.sequences / floor,
                target=0.5,
            ),
        ]
    if fp16.peak_gib:
        rows.append(lower("training, GiB at most: fp16 vs bf16", fp16.peak_gib, bf16.peak_gib, 0.98))
    return rows


def lower(what: str, ours: float, peer: float, target: float) -> Row:
    """Return a row of seconds or bytes."""
    return Row(what=what, ours=ours, peer=peer, target=target, better="lower")


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; try the script with --device cpu --model tiny --tokens 512")
    limits = limits_of(device)
    print(f"{limits.source}: {limits.tflops:.4g} TFLOP/s, {limits.gbs:.4g} GB/s", flush=True)
    from transformers import Qwen2Config

    rows = rows_of(args, Qwen2Config(**ARCHITECTURES[args.model]), limits, measure(args, device))
    table = Table("see each row")
    for row in rows:
        table.add(row)
    table.end(args.json)


def arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--model", default="qwen2.5-1.5b", choices=tuple(ARCHITECTURES))
    made.add_argument("--tokens", type=int, default=8192, help="tokens of a pack")
    made.add_argument("--length", type=int, default=512, help="tokens of each sequence in it")
    made.add_argument("--packs", type=int, default=4, help="packs of an optimizer step")
    made.add_argument("--sequences", type=int, default=256, help="sequences decoded together")
    made.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    made.add_argument("--new-tokens", type=int, default=256, help="tokens decoded after it")
    made.add_argument("--activation-checkpointing", action="store_true")
    made.add_argument("--compile", action="store_true", help="compile the trainer's layers")
    made.add_argument("--logits-mib", type=int, default=256, help="memory for FP32 logits")
    args = made.parse_args()
    if args.tokens % args.length or args.sequences % SIBLINGS or args.new_tokens < 2:
        made.error("--tokens must be a multiple of --length, --sequences one of 8, and --new-tokens at least 2")
    return args


if __name__ == "__main__":
    main()
