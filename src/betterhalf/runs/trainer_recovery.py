"""Recovery from the death of a rank of the trainer: restart all ranks, and repeat the steps since the checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from betterhalf.errors import TrainerDiedError
from betterhalf.runs.progress import Progress
from betterhalf.words import counted


class TrainerRestarts:
    """Counter of the restarts of the trainer in one step, which tells the user about each.

    A restart goes back to the last checkpoint. Only a step that no attempt has reached before resets the count, so a
    crash that comes back in every attempt ends the run.
    """

    def __init__(self, limit: int, tell: Callable[[str], None]) -> None:
        """Start at 0.

        Args:
            limit: maximum number of restarts in one step, `cluster.max_restarts`.
            tell: receives the notes.
        """
        self.limit = limit
        self.count = 0
        self._step = 0
        self._by_step = Counter[int]()
        self._tell = tell

    def note(self, error: TrainerDiedError, step: int) -> None:
        """Count a restart after `error` in `step`.

        Raises:
            TrainerDiedError: the limit is exceeded.
        """
        if step > self._step:
            self._step, self.count = step, 0
        if self.count >= self.limit:
            raise TrainerDiedError(
                f"the trainer died {counted(self.count + 1, 'time')} up to step {self._step} "
                f"(cluster.max_restarts={self.limit}); {error}"
            ) from error
        self.count += 1
        self._by_step[step] += 1
        self._tell(
            f"note: {error}\nStarting the trainer again ({self.count} of {self.limit}) from the last checkpoint; no "
            "step is lost."
        )

    def count_in(self, step: int) -> int:
        """Return the number of restarts because the trainer died in this step, for its metrics."""
        return self._by_step[step]


def retry_on_trainer_death(
    train: Callable[[Progress], Progress],
    progress: Progress,
    begin_again: Callable[[], Progress],
    step: Callable[[], int],
    restarts: TrainerRestarts,
) -> Progress:
    """Return the result of `train`; after each death of the trainer, call `begin_again` and continue from there.

    A death during `begin_again` counts as another one.

    Args:
        train: runs the steps after a position, to the end of the run.
        progress: position at which it starts.
        begin_again: restarts the trainer, loads the last checkpoint, and returns its position.
        step: returns the step in progress, for the limit.
        restarts: limit on restarts, and their count.

    Raises:
        TrainerDiedError: the trainer died once more often than `restarts` allows.
    """
    dead = False
    while True:
        try:
            if dead:
                progress = begin_again()
                dead = False
            return train(progress)
        except TrainerDiedError as error:
            restarts.note(error, step())
            dead = True
