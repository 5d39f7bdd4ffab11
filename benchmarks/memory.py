"""Measure the peak memory of a training pass: does it grow with tokens x vocabulary?

    python benchmarks/memory.py [--json]

A two-layer decoder with a vocabulary of 150k, FP16, for 1k, 4k and 16k tokens. Each size runs in its own process, whose
peak resident memory is read at the end. The peer is the memory that FP32 logits of all tokens would add: tokens x
vocabulary x 4 bytes, once. The last row is the growth per token from the smallest to the largest pass, against the
activations of the layers alone.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from packs import pack_of, random_ids
from side_by_side import Row, Table, parser
from train_pass import LOSS_SCALE

VOCABULARY, HIDDEN, LAYERS = 150_000, 256, 2
SIZES = (1024, 4096, 16384)


def peak_gib() -> float:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def one_pass(tokens: int) -> None:
    """Run one pass and print the peak before and after it, in GiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from betterhalf.config.schema import RunConfig
    from betterhalf.models.loading import LoadedModel
    from betterhalf.precision.roles import build_precision
    from betterhalf.training.policy_trainer import PolicyTrainer

    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    module = LlamaForCausalLM(hf).eval()
    model = LoadedModel(
        name="wide head", module=module, hf_config=hf, tokenizer=None, stop_token_ids=(), context_length=32768
    )
    config = RunConfig()
    precision = build_precision(config.precision, torch.device("cpu"))
    trainer = PolicyTrainer(model, config=config, precision=precision)
    warm = pack_of(random_ids(VOCABULARY, 1, 64))
    (-trainer.score(warm).mean() * LOSS_SCALE).backward()
    before = peak_gib()
    micro = pack_of(random_ids(VOCABULARY, tokens // 256, 256))
    (-trainer.score(micro).mean() * LOSS_SCALE).backward()
    print(before, peak_gib())


def added_gib(tokens: int) -> float:
    """Return the GiB that a pass adds to the peak, in a new process."""
    command = [sys.executable, __file__, "--one-pass", str(tokens)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, after = map(float, done.stdout.split()[-2:])
    return after - before


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--one-pass", type=int, help="internal: run one pass of this number of tokens")
    args = made.parse_args()
    torch.set_num_threads(args.threads)
    if args.one_pass:
        one_pass(args.one_pass)
        return
    table = Table("GiB added by the pass, against FP32 logits of all tokens")
    added = {tokens: added_gib(tokens) for tokens in SIZES}
    for tokens, mine in added.items():
        logits = tokens * VOCABULARY * 4 / 2**30
        table.add(
            Row(what=f"{tokens} tokens, vocabulary {VOCABULARY}", ours=mine, peer=logits, target=0.0, better="lower")
        )
    small, large = SIZES[0], SIZES[-1]
    growth = (added[large] - added[small]) / (large - small) * 2**20
    logits_growth = VOCABULARY * 4 / 2**10
    table.add(
        Row(
            what=f"growth from {small} to {large}, KiB a token",
            ours=growth,
            peer=logits_growth,
            target=10,
            better="lower",
        )
    )
    table.end(args.json)


if __name__ == "__main__":
    main()
