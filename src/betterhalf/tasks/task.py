"""What the loop needs of a task: prompts in a fixed order, and a reward for each completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from betterhalf.types import FinishReason, Prompt

if TYPE_CHECKING:
    from betterhalf.tasks.fingerprint import DataRecord
    from betterhalf.tasks.row import BadRow


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tasks use."""

    chat_template: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids."""
        ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True, return_attention_mask: bool = True
    ) -> Mapping[str, Any]:
        """Several texts to token ids, under `input_ids`."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any:
        """Messages to the text the model reads."""
        ...


class Task(Protocol):
    """A data set of prompts with a reward."""

    def __len__(self) -> int:
        """Prompts in the data set; at least 1."""
        ...

    @property
    def left_out(self) -> Sequence[BadRow]:
        """Rows of the data that cannot be used and were skipped, in order."""
        ...

    def prompt(self, index: int) -> Prompt:
        """The prompt at `index` of the data set, in its fixed order."""
        ...

    def prompts(self, position: int, count: int, seed: int) -> list[Prompt]:
        """`count` prompts from `position` on, of an endless stream: one seeded shuffle of the data set after another.

        Deterministic in its arguments. `position` counts the prompts consumed since the start of the run. Where two
        shuffles meet, no prompt comes twice, unless `count` exceeds the data set; a smaller `count` gives the first
        prompts of a larger one.
        """
        ...

    def rewards(
        self, prompts: Sequence[Prompt], texts: Sequence[str], finish_reasons: Sequence[FinishReason]
    ) -> list[float]:
        """One reward for each completion. A time-out scores 0 and is counted in `timeouts`."""
        ...

    @property
    def timeouts(self) -> int:
        """Rewards that ran out of time so far."""
        ...

    def record(self) -> DataRecord:
        """Digests of the rows, in order, and of what the reward is computed by: what a resumed run must find again."""
        ...

    def place(self, index: int) -> str:
        """Name of row `index` for people: its file and row number, or its prompt id."""
        ...

    @property
    def unparsed_answers(self) -> int:
        """Answers that could not be read so far; they count as wrong."""
        ...

    def close(self) -> None:
        """End worker processes; calling it twice is harmless."""
        ...
