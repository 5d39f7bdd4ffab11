"""A user-defined task: prompts from a file or a class, rewards from functions or the class."""

from __future__ import annotations

from betterhalf.config.schema import PythonTask
from betterhalf.tasks.data_problems import build_problems
from betterhalf.tasks.dataset import DatasetTask, Grader, Problems
from betterhalf.tasks.fingerprint import reward_source
from betterhalf.tasks.python_grader import PythonGrader
from betterhalf.tasks.task import Tokenizer
from betterhalf.tasks.templates import question_template, template_source
from betterhalf.tasks.user_task import UserGrader, UserProblems, create_user_task
from betterhalf.user_code import source_digest


def build_python(config: PythonTask, tokenizer: Tokenizer) -> DatasetTask:
    """Build the task; the workers of its rewards start when the rows are checked.

    Raises:
        ConfigError: the class of `task.task` does not exist, or lacks a method.
        InputError: the data cannot be read or is empty, or the tokenizer lacks the chat template that the task needs.
        MissingExtraError: the data set is on the hub and `datasets` is not installed.
    """
    problems, grader = _from_class(config, tokenizer) if config.task is not None else _from_data(config, tokenizer)
    return DatasetTask(problems=problems, grader=grader, reward_source=_reward_source(config, tokenizer))


def _from_class(config: PythonTask, tokenizer: Tokenizer) -> tuple[Problems, Grader]:
    assert config.task is not None
    task = create_user_task(config, tokenizer)
    name = config.task.rpartition(":")[2]
    template = question_template(config, tokenizer)
    problems = UserProblems(task=task, template=template, tokenizer=tokenizer, name=name)
    return problems, PythonGrader(config) if config.terms else UserGrader(task=task)


def _from_data(config: PythonTask, tokenizer: Tokenizer) -> tuple[Problems, Grader]:
    return build_problems(config, tokenizer), PythonGrader(config)


def _reward_source(config: PythonTask, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what determines prompts and rewards: template, and digests of the files with the rewards and the class.

    Modules that these files import are not covered.
    """
    settings = {"task": "python", **template_source(config, tokenizer)}
    if config.task is not None:
        settings[f"task {config.task}"] = source_digest(config.task)
    settings |= {f"reward {name}": source_digest(term.function) for name, term in config.terms.items()}
    return reward_source(settings, modules=_REWARD_MODULES, packages=())


_REWARD_MODULES = ("reward_values", "reward_replies", "reward_sum", "python_grader")
