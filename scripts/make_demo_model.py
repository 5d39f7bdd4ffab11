#!/usr/bin/env python
"""Make the models inside the package: they add up digits step by step, and slip at random.

    .venv/bin/python scripts/make_demo_model.py [FOLDER]                                demo
    .venv/bin/python scripts/make_demo_model.py --model demo-small [FOLDER]             demo-small
    .venv/bin/python scripts/make_demo_model.py --model demo-small --length 100 FOLDER  longer completions
    .venv/bin/python scripts/make_demo_model.py --model demo-moe FOLDER                 a mixture of experts

It writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors (FP32) to
FOLDER, by default the one inside the package. `demo` takes about two minutes, `demo-small` and `demo-moe` 40
seconds.

`demo` (half a million parameters) learns `2+7+9+1+5+5+4+9=` -> `7=09,9=18,1=19,5=24,5=29,4=33,9=42.` from solutions in
which every running total is wrong with probability 0.07, by a random last digit, and the sum continues from the wrong
total. So it knows the arithmetic, and imitates slips that do not depend on the problem: it solves almost every prompt
0.93^7 = 60% of the time, and reinforcement learning has something to remove from all of them.

`demo-small` (84,288 parameters) adds five digits and slips with probability 0.12: 0.88^4 = 60%. A completion has 20
tokens. With `--length N`, a block of N - 21 random digits and a comma precedes the sum: `94310385,7=09,...,5=24.`. Each
of these digits has an entropy of ln 10 nats, and the reward does not read them. So the same problem has completions of
any length, made in at most two minutes (200 tokens). (Digits between the totals would do so as well, but from about 60
tokens on, a model of this size does not learn to find the last total among them.)

`demo-moe` is a Qwen3-MoE that solves the problems of `demo-small`: two layers of eight experts, of which two compute
each token. It is not in the package, so FOLDER is required. With `--untrained` its weights are random and twice as
large, so that its experts differ and a changed choice shows.

The same machine gives the same file: seed, number of steps and algorithms are fixed, and one thread runs all sums in
one order. Another processor or another version of torch may sum in another order; after 1,500 steps the weights then
differ, but not their ability.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from betterhalf.tasks.arithmetic import END_MARK

Model = LlamaForCausalLM | Qwen3MoeForCausalLM

MODELS_FOLDER = Path(__file__).parents[1] / "src/betterhalf/models"
PAD, UNKNOWN = "<pad>", "<unk>"
VOCABULARY = (PAD, UNKNOWN, *"0123456789", "+", "=", ",", END_MARK)
IGNORED = -100
"""Target of a token that does not count in the loss."""
ID = {token: index for index, token in enumerate(VOCABULARY)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Shape of a model, its task, and the settings of its training; by default those of `demo`."""

    terms: int = 8
    """Number of digits in a problem."""
    block_length: int = 0
    """Number of tokens before the sum of a solution: random digits and a comma; 0 for none."""
    slip_probability: float = 0.07
    """Probability that a running total is wrong."""
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    experts: int = 0
    """Number of experts in each layer, of which two compute each token; 0 for a Llama."""
    context_length: int = 128
    initializer_range: float = 0.08
    """About 1 / sqrt(hidden_size). The usual 0.02 is meant for wider models: at this width the sums take twice as long
    to learn, and the small weights that result make reinforcement learning at 3e-4 erratic."""
    seed: int = 0
    threads: int = 1
    """Number of threads: one is nearly as fast as two at this size, and its sums have one order."""
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.0

    @property
    def prompt_length(self) -> int:
        """Number of tokens of a problem."""
        return 2 * self.terms

    @property
    def completion_length(self) -> int:
        """Number of tokens of a solution."""
        return self.block_length + 5 * (self.terms - 1)


RECIPES = {
    "demo": Recipe(),
    "demo-small": Recipe(
        terms=5,
        slip_probability=0.12,
        hidden_size=64,
        layers=2,
        heads=2,
        context_length=256,
        initializer_range=0.125,
        learning_rate=3e-3,
    ),
    "demo-moe": Recipe(
        terms=5,
        slip_probability=0.12,
        hidden_size=64,
        layers=2,
        heads=2,
        experts=8,
        context_length=256,
        initializer_range=0.125,
        learning_rate=3e-3,
    ),
}
"""Recipes by the name of the model."""

COUNTED_SHARE = 0.1
"""Share of the block's digits that count in the loss: nothing predicts them, so most of their gradient is noise."""


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character; characters outside the vocabulary are <unk>."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=recipe.context_length,
        clean_up_tokenization_spaces=False,
    )


def make_config(recipe: Recipe) -> LlamaConfig | Qwen3MoeConfig:
    """Return the configuration of a small Llama or Qwen3-MoE; every head has a width of 32."""
    experts = {
        "num_experts": recipe.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": recipe.hidden_size,
        "norm_topk_prob": True,
        "head_dim": 32,
    }
    kind, more = (Qwen3MoeConfig, experts) if recipe.experts else (LlamaConfig, {})
    return kind(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=recipe.initializer_range,
        bos_token_id=None,
        eos_token_id=ID[END_MARK],
        pad_token_id=ID[PAD],
        attn_implementation="sdpa",
        dtype="float32",
        **more,
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


def sample_batch(recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return token ids [B, T] of solutions with slips, and the targets of their completions [B, C]."""
    digits_BN = torch.randint(1, 10, (recipe.batch_size, recipe.terms), generator=generator)
    token_ids_BT = encode(digits_BN, sample_totals(digits_BN, recipe.slip_probability, generator))
    prompt_BP, solution_BC = token_ids_BT[:, : recipe.prompt_length], token_ids_BT[:, recipe.prompt_length :]
    if not recipe.block_length:
        return token_ids_BT, solution_BC
    size = (recipe.batch_size, recipe.block_length)
    block_BK = torch.randint(ID["0"], ID["9"] + 1, size, generator=generator)
    ignored_BK = torch.rand(size, generator=generator) >= COUNTED_SHARE
    block_BK[:, -1], ignored_BK[:, -1] = ID[","], False
    targets_BC = torch.cat([block_BK.masked_fill(ignored_BK, IGNORED), solution_BC], 1)
    return torch.cat([prompt_BP, block_BK, solution_BC], 1), targets_BC


def completion_loss(model: Model, token_ids_BT: Tensor, targets_BC: Tensor) -> Tensor:
    """Return the mean cross-entropy of the completion's targets, in nats."""
    logits = model(input_ids=token_ids_BT[:, :-1], use_cache=False).logits[:, -targets_BC.shape[1] :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BC.flatten(), ignore_index=IGNORED)


def at_step(recipe: Recipe, step: int) -> Recipe:
    """Return the recipe of one training step: the first half is without a block, because a model learns sums sooner."""
    return recipe if step > recipe.steps / 2 else replace(recipe, block_length=0)


def untrained(recipe: Recipe) -> Model:
    """Return the model with random weights; deterministic in the recipe."""
    torch.manual_seed(recipe.seed)
    config = make_config(recipe)
    return LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else Qwen3MoeForCausalLM(config)


def train(recipe: Recipe) -> Model:
    """Pre-train from scratch; deterministic in the recipe on one machine."""
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    model = untrained(recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / recipe.steps)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    started = time.perf_counter()
    for step in range(1, recipe.steps + 1):
        loss = completion_loss(model, *sample_batch(at_step(recipe, step), generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval()


def save(model: Model, recipe: Recipe, folder: Path) -> str:
    """Write the folder; return the SHA-256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(recipe).save_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=ID[END_MARK], pad_token_id=ID[PAD], do_sample=True)
    disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def longer(recipe: Recipe, length: int) -> Recipe:
    """Return the recipe with completions of `length` tokens; a block takes more steps to learn."""
    if length < recipe.completion_length:
        raise SystemExit(f"a solution has {recipe.completion_length} tokens; --length={length} is shorter")
    if length == recipe.completion_length:
        return recipe
    return replace(recipe, block_length=length - recipe.completion_length, steps=2000)


def main() -> None:
    """Train, save, and print the digest of the weights."""
    parser = argparse.ArgumentParser(description="Make a model of the package, or one with longer completions.")
    parser.add_argument("folder", nargs="?", type=Path, help="folder to write; by default the model's own")
    parser.add_argument("--model", choices=RECIPES, default="demo", help="recipe; default: demo")
    parser.add_argument("--length", type=int, help="tokens of a completion; random digits before the sum fill it up")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the training data; default: 0")
    parser.add_argument("--untrained", action="store_true", help="write random weights, twice as large; no training")
    arguments = parser.parse_args()
    recipe = replace(RECIPES[arguments.model], seed=arguments.seed)
    if arguments.length:
        recipe = longer(recipe, arguments.length)
    if recipe.experts and arguments.folder is None:
        parser.error(f"{arguments.model} is not in the package; name a folder")
    folder = arguments.folder or MODELS_FOLDER / arguments.model.replace("-", "_")
    if arguments.untrained and arguments.folder is None:
        parser.error("--untrained needs a folder, so that no model of the package is overwritten")
    model = untrained(replace(recipe, initializer_range=2 * recipe.initializer_range))
    print(f"{save(model if arguments.untrained else train(recipe), recipe, folder)}  {folder / 'model.safetensors'}")


if __name__ == "__main__":
    main()
