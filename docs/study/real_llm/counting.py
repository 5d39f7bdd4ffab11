"""Write counting.jsonl, and a model that counts on by a step, sometimes without an error: SmolLM2 after a short SFT.

    python counting.py SMOLLM2.gguf smollm2-counting [--device cuda] [--enough 0.5]

Training stops when half of the completion's tokens come before the first token that is not the most likely one.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NUMBERS = 80  # of four digits, a comma and a space: six tokens each, so a completion has 480


def row(draw: random.Random) -> dict[str, str]:
    first, step = draw.randrange(1000, 2500), draw.randrange(3, 98)
    numbers = [str(first + step * k) for k in range(1, NUMBERS + 1)]
    return {"question": f"Start at {first} and count on by {step}.", "answer": " ".join(numbers)}


def batch(tokenizer, rows, device):
    """Return ids and labels (rows, longest); labels are -100 on the prompt and on padding."""
    pairs = []
    for one in rows:
        chat = [{"role": "user", "content": one["question"]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = one["answer"].replace(" ", ", ")
        pairs.append((prompt, tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for at, (prompt, answer) in enumerate(pairs):
        ids[at, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[at, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids.to(device), labels.to(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--enough", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=75.0)
    options = parser.parse_args()
    draw = random.Random(0)
    with open("counting.jsonl", "w") as file:
        for _ in range(2000):
            file.write(json.dumps(row(draw)) + "\n")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    where = {"pretrained_model_name_or_path": options.gguf.parent, "gguf_file": options.gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, betas=(0.9, 0.95), weight_decay=0.0)
    began, share = time.monotonic(), 0.0
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-5 * min(1.0, (step + 1) / 10)
        ids, labels = batch(tokenizer, [row(draw) for _ in range(options.rows)], options.device)
        logits = model(input_ids=ids).logits[:, :-1]
        targets = labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = (logits.argmax(-1) == targets) | (targets < 0)
        before = right.long().cumprod(1).bool() & (targets >= 0)
        share += 0.1 * ((before.sum() / (targets >= 0).sum()).item() - share)
        if step % 10 == 0 or share >= options.enough:
            print(f"step {step} loss {loss.item():.4f} right {share:.3f} {time.monotonic() - began:.1f} s", flush=True)
        if share >= options.enough or time.monotonic() - began > options.seconds:
            break
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


main()
