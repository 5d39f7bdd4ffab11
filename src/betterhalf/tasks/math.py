"""Problems with a checkable answer, in the prompt templates of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.config.schema import MathTask
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.math_data import MathRow, load_rows
from betterhalf.tasks.math_grader import MathGrader
from betterhalf.tasks.prompting import chat_prompt, plain_prompt, templated_prompt
from betterhalf.tasks.task import Tokenizer
from betterhalf.types import Prompt

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""As in the paper (arXiv 2510.26788) and the models' own cards."""

_BAR, _BLOCK = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"

TEMPLATES = {
    "r1_distill": (
        f"<{_BAR}begin{_BLOCK}of{_BLOCK}sentence{_BAR}><{_BAR}User{_BAR}>"
        + "{problem} {instruction}"
        + f"<{_BAR}Assistant{_BAR}><think>\n"
    ),
    "qwen_math": (
        "<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
"""Written out, special tokens included: of DeepSeek-R1-Distill (thinking already opened), and of Qwen2.5-Math."""


def render(template: str, problem: str) -> str:
    """The text of a problem in one of TEMPLATES; braces in the problem mean nothing."""
    parts = TEMPLATES[template].replace("{instruction}", INSTRUCTION).split("{problem}")
    return problem.join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MathProblems:
    """Rows of a data set, put to the model in one template."""

    rows: list[MathRow]
    template: str
    """`chat`, `r1_distill`, `qwen_math` or `none`."""
    tokenizer: Tokenizer

    def __len__(self) -> int:
        """Problems in the data set."""
        return len(self.rows)

    def prompt(self, index: int) -> Prompt:
        """The problem of row `index`."""
        row, name = self.rows[index], f"math/{index}"
        if self.template == "chat":
            return chat_prompt(self.tokenizer, name, f"{row.problem} {INSTRUCTION}", answer=row.answer)
        if self.template == "none":
            return plain_prompt(self.tokenizer, name, row.problem, answer=row.answer)
        return templated_prompt(self.tokenizer, name, render(self.template, row.problem), answer=row.answer)


def build_math(config: MathTask, tokenizer: Tokenizer) -> DatasetTask:
    """The task of a data file or hub name; its worker processes start with the first answers to grade.

    Raises:
        InputError: the data cannot be read, is empty, or lacks a field; or no chat template where one is needed.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    problems = MathProblems(rows=load_rows(config.path, config.split), template=config.template, tokenizer=tokenizer)
    problems.prompt(0)
    grader = MathGrader(config.template, seconds=config.reward_seconds, workers=config.reward_workers)
    return DatasetTask(problems=problems, grader=grader)
