"""Interface of a task to the training loop: prompts in a fixed order, and a reward for each completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from betterhalf.types import FinishReason, Prompt

if TYPE_CHECKING:
    from betterhalf.tasks.fingerprint import DataRecord
    from betterhalf.tasks.row import BadRow


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tasks use."""

    chat_template: Any
    """Source of the chat template; None without one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenize one text."""
        ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True, return_attention_mask: bool = True
    ) -> Mapping[str, Any]:
        """Tokenize several texts; the token ids are under `input_ids`."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of some tokens, special ones included."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool, **arguments: Any
    ) -> Any:
        """Render messages as the text that the model reads."""
        ...


class Task(Protocol):
    """A data set of prompts with a reward.

    A task with an attribute `turns`, as in `tasks.turns.Turns`, has episodes of several turns.
    """

    def __len__(self) -> int:
        """Return the number of prompts in the data set; at least 1."""
        ...

    @property
    def left_out(self) -> Sequence[BadRow]:
        """Unusable rows of the data that were skipped, in order."""
        ...

    def prompt(self, index: int) -> Prompt:
        """Return the prompt at `index` of the data set, in its fixed order."""
        ...

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        """Return `count` prompts, from `position` on, of an endless stream of seeded shuffles of the data set.

        The result depends on the arguments alone. `position` counts the prompts consumed since the start of the run. No
        prompt is repeated across the boundary of two shuffles, unless `count` exceeds the data set. The result for a
        smaller `count` is a prefix of the result for a larger one.
        """
        ...

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """Return one reward for each completion. A timeout gives 0, or the reward that the task sets for a failure."""
        ...

    @property
    def timeouts(self) -> int:
        """Number of rewards that timed out so far."""
        ...

    def record(self) -> DataRecord:
        """Return digests of the rows, in order, and of the code behind the rewards; a resumed run must match them."""
        ...

    def place(self, index: int) -> str:
        """Return the location of row `index` for messages: its file and row number, or its prompt id."""
        ...

    @property
    def unparsed_answers(self) -> int:
        """Number of answers that could not be parsed so far; they count as wrong."""
        ...

    def close(self) -> None:
        """Stop the worker processes; calling it twice is harmless."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A task or a grader that has metrics and warnings of its own."""

    def take_metrics(self) -> dict[str, float]:
        """Return its metrics since the last call, all named `task/...`; the catalogue need not list them."""
        ...

    def take_notes(self) -> list[str]:
        """Return warnings for the user since the last call."""
        ...
