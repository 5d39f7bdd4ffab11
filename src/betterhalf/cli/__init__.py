"""The command line: `main`, and the table of verbs."""

from betterhalf.cli.entry import main
from betterhalf.cli.verbs import VERBS

__all__ = ["VERBS", "main"]
