"""Mathematics problems with verifiable answers."""

from __future__ import annotations

from betterhalf.config.schema import MathTask
from betterhalf.tasks.data_problems import build_problems
from betterhalf.tasks.dataset import DatasetTask
from betterhalf.tasks.fingerprint import reward_source
from betterhalf.tasks.math_grader import MathGrader
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import template_source

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""Instruction of the paper (arXiv 2510.26788) and of the models' own cards."""


def build_math(config: MathTask, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task of a data set; its worker processes start when the first answers are checked.

    Raises:
        InputError: the data cannot be read or is empty, or the tokenizer lacks the chat template that the task needs.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    settings = {"task": "math", **template_source(config, tokenizer, INSTRUCTION)}
    return DatasetTask(
        # The grader reads question and answer alone; digests of earlier versions cover these two.
        problems=build_problems(config, tokenizer, default_instruction=INSTRUCTION, digest_fields=False),
        grader=MathGrader(config.template, seconds=config.reward_seconds, workers=config.reward_workers),
        reward_source=reward_source(settings, modules=_REWARD_MODULES, packages=_REWARD_PACKAGES),
    )


_REWARD_MODULES = (
    "math_markup",
    "math_answer",
    "math_equal",
    "math_exact",
    "math_units",
    "math_grader",
    "math_worker",
)
_REWARD_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy")
