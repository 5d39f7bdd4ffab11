"""Rows of numbers that Python code reads: a list, a column, or a pandas frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from betterhalf.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import pandas


class Rows(list[dict[str, Any]]):
    """List of rows with names, such as the steps of a run."""

    def column(self, name: str) -> list[Any]:
        """Return the value of `name` in every row; None where a row does not have it.

        Raises:
            InputError: no row has it.
        """
        if self and not any(name in row for row in self):
            known = ", ".join(sorted({key for row in self for key in row}))
            raise InputError(f"no row has {name!r}. The names are {known}.")
        return [row.get(name) for row in self]

    def frame(self) -> pandas.DataFrame:
        """Return the rows as a pandas frame.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError(
                "a frame needs pandas, which is not installed. Install it with pip install 'betterhalf[notebook]'."
            ) from error
        return pandas.DataFrame(list(self))
