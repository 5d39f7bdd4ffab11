"""Generated arithmetic problems: running sums for the demo model, word problems for a chat model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from betterhalf.config.schema import ArithmeticTask
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.draw import draw_int
from betterhalf.tasks.fingerprint import reward_source, text_digest
from betterhalf.tasks.prompting import Draft, chat_draft, plain_draft, require_chat_template
from betterhalf.tasks.rewards import TextGrader
from betterhalf.tasks.row import Row
from betterhalf.tasks.task import Tokenizer

END_MARK = "."
"""Last character of a running sum; the demo model's stop token."""


def running_sum_digits(seed: int, index: int, terms: int) -> tuple[int, ...]:
    """Return the digits (1 to 9) of problem `index`."""
    return tuple(draw_int(1, 9, seed, index, place) for place in range(terms))


def running_sum_question(digits: tuple[int, ...]) -> str:
    """Return the question, such as `2+7+9=` for (2, 7, 9)."""
    return "+".join(map(str, digits)) + "="


def running_sum_solution(digits: tuple[int, ...]) -> str:
    """Return the worked solution, such as `7=09,9=18.` for (2, 7, 9).

    Each step is the next digit and the total so far, in two digits (three beyond 99).
    """
    steps = [f"{digit}={total:02d}" for digit, total in zip(digits[1:], list(accumulate(digits))[1:], strict=True)]
    return ",".join(steps) + END_MARK


def solves_running_sum(text: str, answer: str) -> bool:
    """Return whether the text ends with the right total and the end mark; the steps before it are not checked."""
    final = re.search(r"=([0-9]{1,9})\.\s*$", text)
    return final is not None and int(final[1]) == int(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSums:
    """Running sums: the question `2+7+9+1+5+5+4+9=` has the solution `7=09,9=18,1=19,5=24,5=29,4=33,9=42.`"""

    config: ArithmeticTask
    tokenizer: Tokenizer

    def __len__(self) -> int:
        """Return the number of problems."""
        return self.config.num_prompts

    def row(self, index: int) -> Row:
        """Return problem `index`, which depends on the task's seed and `index` alone."""
        digits = running_sum_digits(self.config.seed, index, self.config.terms)
        name = f"running_sum/{index}"
        question = running_sum_question(digits)
        return Row(prompt_id=name, place=f"prompt {name!r}", question=question, answer=str(sum(digits)))

    def draft(self, index: int) -> Draft:
        """Return problem `index` as plain text, without a chat template."""
        row = self.row(index)
        return plain_draft(row.prompt_id, row.question, answer=row.answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """Template of a word problem."""

    text: str
    """Text with the placeholders name, item, a, b and, for two steps, c."""
    bounds: tuple[tuple[int, int], ...]
    """Smallest and largest value of a, b and, for two steps, c; chosen so that no answer is negative."""
    answer: Callable[..., int]
    """Function that computes the answer from the numbers."""


STORIES = (
    Story(
        text="{name} has {a} {item} and buys {b} more. How many {item} does {name} have now?",
        bounds=((2, 9), (2, 9)),
        answer=lambda a, b: a + b,
    ),
    Story(
        text="{name} has {a} {item} and gives {b} of them away. How many {item} does {name} have left?",
        bounds=((6, 10), (1, 5)),
        answer=lambda a, b: a - b,
    ),
    Story(
        text="{name} has {a} boxes. Each box holds {b} {item}. How many {item} are there in total?",
        bounds=((2, 5), (2, 5)),
        answer=lambda a, b: a * b,
    ),
    Story(
        text="{name} has {a} {item}, finds {b} more, and then loses {c}. How many {item} does {name} have now?",
        bounds=((5, 10), (2, 9), (1, 4)),
        answer=lambda a, b, c: a + b - c,
    ),
    Story(
        text="{name} buys {a} bags with {b} {item} each and eats {c} of the {item}. How many {item} are left?",
        bounds=((2, 4), (2, 5), (1, 3)),
        answer=lambda a, b, c: a * b - c,
    ),
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
ITEMS = ("apples", "oranges", "cookies", "nuts", "plums", "candies", "pears", "cherries")
INSTRUCTION = "Answer in one short sentence."
"""Instruction that keeps a small model's completions short: most of SmolLM2-135M's then end within 40 tokens."""


def word_problem(seed: int, index: int) -> tuple[str, int]:
    """Return the text and the answer of word problem `index`."""
    pick = draw_int(0, len(STORIES) * len(NAMES) * len(ITEMS) - 1, seed, index, -1)
    story = STORIES[pick % len(STORIES)]
    name = NAMES[pick // len(STORIES) % len(NAMES)]
    item = ITEMS[pick // (len(STORIES) * len(NAMES))]
    numbers = [draw_int(low, high, seed, index, place) for place, (low, high) in enumerate(story.bounds)]
    fields = dict(zip("abc", numbers, strict=False))
    return f"{story.text.format(name=name, item=item, **fields)} {INSTRUCTION}", story.answer(*numbers)


_NUMBER = re.compile(r"(?<![\d.])(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""Pattern of numbers such as 1,234 and 12.50 and -3; the minus in `5-3` is not a sign."""


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def solves_word_problem(text: str, answer: str) -> bool:
    """Return whether the last number in the text is the answer."""
    return last_number(text) == float(answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblems:
    """Word problems of one or two steps, in the model's chat template."""

    config: ArithmeticTask
    tokenizer: Tokenizer

    def __len__(self) -> int:
        """Return the number of problems."""
        return self.config.num_prompts

    def row(self, index: int) -> Row:
        """Return problem `index`, which depends on the task's seed and `index` alone."""
        question, answer = word_problem(self.config.seed, index)
        name = f"word_problem/{index}"
        return Row(prompt_id=name, place=f"prompt {name!r}", question=question, answer=str(answer))

    def draft(self, index: int) -> Draft:
        """Return problem `index`, rendered in the chat template."""
        row = self.row(index)
        return chat_draft(self.tokenizer, row.prompt_id, row.question, answer=row.answer)


def build_arithmetic(config: ArithmeticTask, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task in the style `config.style`.

    Raises:
        InputError: the style is `word_problem` and the tokenizer has no chat template.
    """
    style = config.style
    if style == "auto":
        style = "word_problem" if tokenizer.chat_template else "running_sum"
    source = reward_source({"task": "arithmetic", "style": style}, modules=("arithmetic", "rewards"), packages=())
    if style == "running_sum":
        return DatasetTask(
            problems=RunningSums(config=config, tokenizer=tokenizer),
            grader=TextGrader(solves=solves_running_sum),
            reward_source=source,
        )
    require_chat_template(tokenizer)
    return DatasetTask(
        problems=WordProblems(config=config, tokenizer=tokenizer),
        grader=TextGrader(solves=solves_word_problem),
        reward_source=source | {"chat template": text_digest(str(tokenizer.chat_template))},
    )
