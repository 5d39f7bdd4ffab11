"""Time the first answer of the command line, and the import of each package.

    python benchmarks/startup.py [--json]

Numbers are median CPU seconds of whole processes, so other work on the machine does not count. Each peer is a bound.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

from side_by_side import Row, Table, parser

COMMANDS: tuple[tuple[str, list[str], float], ...] = (
    ("betterhalf --help", ["-m", "betterhalf.cli", "--help"], 0.5),
    ("betterhalf config demo", ["-m", "betterhalf.cli", "config", "experiments/base/demo.toml"], 1.0),
    ("import betterhalf.config.schema", ["-c", "import betterhalf.config.schema"], 0.5),
    ("import betterhalf.report.page", ["-c", "import betterhalf.report.page"], 0.5),
)
"""(name, arguments of Python, allowed seconds) of each row."""


def processor_seconds(arguments: list[str]) -> float:
    """Return the CPU seconds of one process, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    args = parser(__doc__).parse_args()
    table = Table("CPU seconds against the bound")
    for what, arguments, bound in COMMANDS:
        taken = statistics.median(processor_seconds(arguments) for _ in range(args.repeats))
        table.add(Row(what=what, ours=taken, peer=bound, target=1.0, better="lower"))
    table.end(args.json)


if __name__ == "__main__":
    main()
