"""A worked example of an environment: a running sum with one digit that is not in the question.

The prompt has the question and the steps of its solution up to the last total but one, which the model writes in its
first turn. The environment then gives another digit in place of the question's last one, and in its second turn the
model has to add that digit:

    prompt `2+7+9+1+5=7=09,9=18,1=`   turn `19,`   observation `3=`   turn `22.`

The demo model knows running sums, but takes the question's own digit a third of the time. Run it with
`experiments/smoke/two_turns.toml`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from betterhalf.tasks.arithmetic import running_sum_digits, running_sum_question, running_sum_solution
from betterhalf.tasks.draw import draw_int


class SurpriseDigit:
    """The environment; docs/environments.md walks through it."""

    def __init__(self, terms: int = 8, num_prompts: int = 1024, seed: int = 0) -> None:
        """Make `num_prompts` sums of `terms` digits; `seed` determines all of them."""
        self.terms, self.num_prompts, self.seed = terms, num_prompts, seed

    def prompts(self) -> Iterator[dict[str, Any]]:
        """Yield questions with their first steps; `digit` and `totals` are for the two methods below."""
        for index in range(self.num_prompts):
            digits = running_sum_digits(self.seed, index, self.terms)
            surprise = draw_int(1, 9, self.seed, index, self.terms)
            total = list(accumulate(digits))[-2]
            steps = running_sum_solution(digits[:-1]).rpartition("=")[0]
            yield {
                "problem": f"{running_sum_question(digits)}{steps}=",
                "digit": surprise,
                "totals": [total, total + surprise],
            }

    def respond(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> str | None:
        """Return the digit after the first turn; the episode ends after the second."""
        return f"{metadata['digit']}=" if len(turns) == 1 else None

    def reward(self, prompt: str, turns: Sequence[str], metadata: Mapping[str, Any]) -> float:
        """Return 1 if both totals are right; each turn ends with a comma or a period, which is not checked."""
        wanted = [f"{total:02d}" for total in metadata["totals"]]
        return float([turn[:-1] for turn in turns] == wanted)
