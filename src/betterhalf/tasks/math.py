"""Mathematics problems with verifiable answers, in the prompt templates of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from betterhalf.config.schema import MathTask
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.fingerprint import reward_source, text_digest
from betterhalf.tasks.math_data import MathRow, load_rows
from betterhalf.tasks.math_grader import MathGrader
from betterhalf.tasks.prompting import Draft, chat_draft, plain_draft, require_chat_template, templated_draft
from betterhalf.tasks.row import Row
from betterhalf.tasks.task import Tokenizer

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""Instruction of the paper (arXiv 2510.26788) and of the models' own cards."""

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
"""Prompt templates with special tokens: DeepSeek-R1-Distill (with <think> already opened) and Qwen2.5-Math."""


def render(template: str, problem: str) -> str:
    """Render a problem in one of TEMPLATES; braces in the problem are left as they are."""
    parts = TEMPLATES[template].replace("{instruction}", INSTRUCTION).split("{problem}")
    return problem.join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MathProblems:
    """Problems of a data set, in one prompt template."""

    source: str
    """File or data set, as named in messages."""
    rows: list[MathRow]
    template: str
    """`chat`, `r1_distill`, `qwen_math` or `none`."""
    tokenizer: Tokenizer

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self.rows)

    def row(self, index: int) -> Row:
        """Return row `index`, counted from 0 without blank lines."""
        row = self.rows[index]
        place = f"{self.source}, row {row.number}"
        return Row(prompt_id=f"math/{index}", place=place, question=row.problem, answer=row.answer, defect=row.defect)

    def draft(self, index: int) -> Draft:
        """Return the problem of row `index`, rendered in the template."""
        row = self.row(index)
        if self.template == "chat":
            return chat_draft(self.tokenizer, row.prompt_id, f"{row.question} {INSTRUCTION}", answer=row.answer)
        if self.template == "none":
            return plain_draft(row.prompt_id, row.question, answer=row.answer)
        return templated_draft(row.prompt_id, render(self.template, row.question), answer=row.answer)


def build_math(config: MathTask, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task of a data file or hub data set; its worker processes start when the first answers are checked.

    Raises:
        InputError: the data cannot be read or is empty, or the tokenizer lacks the chat template that the task needs.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    rows = load_rows(config.path, config.split)
    if config.template == "chat":
        require_chat_template(tokenizer)
    return DatasetTask(
        problems=MathProblems(source=config.path, rows=rows, template=config.template, tokenizer=tokenizer),
        grader=MathGrader(config.template, seconds=config.reward_seconds, workers=config.reward_workers),
        reward_source=_reward_source(config, tokenizer),
    )


def _reward_source(config: MathTask, tokenizer: Tokenizer) -> dict[str, str]:
    settings = {"task": "math", "template": config.template}
    text = str(tokenizer.chat_template) if config.template == "chat" else TEMPLATES.get(config.template, "")
    settings["template text"] = text_digest(text + INSTRUCTION)
    return reward_source(settings, modules=_REWARD_MODULES, packages=_REWARD_PACKAGES)


_REWARD_MODULES = ("math_markup", "math_answer", "math_equal", "math_exact", "math_units", "math_grader")
_REWARD_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")
