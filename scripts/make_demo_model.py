#!/usr/bin/env python
"""Make the demo model: half a million parameters that add up eight digits and slip at random.

    .venv/bin/python scripts/make_demo_model.py [FOLDER]

It writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors (FP32) to
FOLDER, by default the one inside the package. It takes about two minutes.

The model learns `2+7+9+1+5+5+4+9=` -> `7=09,9=18,1=19,5=24,5=29,4=33,9=42.` from solutions in which every running
total is wrong with probability 0.07, by a random last digit, and the sum continues from the wrong total. So it knows
the arithmetic, and imitates slips that do not depend on the problem: it solves almost every prompt 0.93^7 = 60% of the
time, and reinforcement learning has something to remove from all of them.

The same machine gives the same file: seed, number of steps and algorithms are fixed, and one thread runs all sums in
one order. Another processor or another version of torch may sum in another order; after 1,500 steps the weights then
differ, but not their ability.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from betterhalf.tasks.arithmetic import END_MARK

PACKAGE_FOLDER = Path(__file__).parents[1] / "src/betterhalf/models/demo"
PAD, UNKNOWN = "<pad>", "<unk>"
VOCABULARY = (PAD, UNKNOWN, *"0123456789", "+", "=", ",", END_MARK)
ID = {token: index for index, token in enumerate(VOCABULARY)}
CONTEXT_LENGTH = 128
TERMS = 8
PROMPT_LENGTH = 2 * TERMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of the training."""

    seed: int = 0
    threads: int = 1
    """Number of threads: one is nearly as fast as two at this size, and its sums have one order."""
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    slip_probability: float = 0.07
    """Probability that a running total is wrong."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character; characters outside the vocabulary are <unk>."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_config() -> LlamaConfig:
    """Return the configuration of a Llama with four heads of 32 and three layers."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        # About 1 / sqrt(hidden_size). The usual 0.02 is meant for wider models: at this width the sums take twice as
        # long to learn, and the small weights that result make reinforcement learning at 3e-4 erratic.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=ID[END_MARK],
        pad_token_id=ID[PAD],
        attn_implementation="sdpa",
        dtype="float32",
    )


def sample_totals(digits_BN: Tensor, slip_probability: float, generator: torch.Generator) -> Tensor:
    """Return running totals from the second digit on, [B, N] -> [B, N - 1]; each may slip to another last digit."""
    total_B = digits_BN[:, 0]
    totals = []
    for digit_B in digits_BN[:, 1:].unbind(1):
        total_B = total_B + digit_B
        slips_B = torch.rand(len(total_B), generator=generator) < slip_probability
        shift_B = torch.randint(1, 10, (len(total_B),), generator=generator)
        wrong_B = total_B // 10 * 10 + (total_B % 10 + shift_B) % 10
        total_B = torch.where(slips_B, wrong_B, total_B)
        totals.append(total_B)
    return torch.stack(totals, 1)


def encode(digits_BN: Tensor, totals_BM: Tensor) -> Tensor:
    """Return prompt and completion as token ids: [B, N], [B, N - 1] -> [B, 2 N + 5 (N - 1)]."""
    zero = ID["0"]
    plus = torch.full_like(digits_BN, ID["+"])
    prompt = torch.stack([digits_BN + zero, plus], 2).flatten(1)
    prompt[:, -1] = ID["="]
    equals, comma = torch.full_like(totals_BM, ID["="]), torch.full_like(totals_BM, ID[","])
    steps = [digits_BN[:, 1:] + zero, equals, totals_BM // 10 + zero, totals_BM % 10 + zero, comma]
    completion = torch.stack(steps, 2).flatten(1)
    completion[:, -1] = ID[END_MARK]
    return torch.cat([prompt, completion], 1)


def sample_batch(recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return token ids [B, T] of solutions with slips."""
    digits_BN = torch.randint(1, 10, (recipe.batch_size, TERMS), generator=generator)
    return encode(digits_BN, sample_totals(digits_BN, recipe.slip_probability, generator))


def completion_loss(model: LlamaForCausalLM, token_ids_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of the completion, in nats."""
    logits = model(input_ids=token_ids_BT[:, :-1], use_cache=False).logits[:, PROMPT_LENGTH - 1 :]
    targets = token_ids_BT[:, PROMPT_LENGTH:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(recipe: Recipe) -> LlamaForCausalLM:
    """Pre-train from scratch; deterministic in the recipe on one machine."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(make_config())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / recipe.steps)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        loss = completion_loss(model, sample_batch(recipe, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


def save(model: LlamaForCausalLM, folder: Path) -> str:
    """Write the folder; return the SHA-256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=ID[END_MARK], pad_token_id=ID[PAD], do_sample=True)
    disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Train, save, and print the digest of the weights."""
    parser = argparse.ArgumentParser(description="Make the demo model.")
    parser.add_argument("folder", nargs="?", type=Path, default=PACKAGE_FOLDER)
    folder = parser.parse_args().folder
    print(f"{save(train(Recipe()), folder)}  {folder / 'model.safetensors'}")


if __name__ == "__main__":
    main()
