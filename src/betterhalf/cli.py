"""The command line: one visible table of verbs, each a function imported when it is called.

Exit status: 0 success, 1 failed verdict, 2 bad input, 3 failure at run time, 130 interrupted. Results go to standard
output, progress and errors to standard error; with --json the last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from betterhalf import __version__
from betterhalf.errors import BetterhalfError, InputError

if TYPE_CHECKING:
    from betterhalf.config.schema import RunConfig

DEMO = "experiments/sanity/demo.toml"
"""What `sanity` runs unless told otherwise; it comes with the package."""

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_RUN, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

_SETTING = re.compile(r"[\w.-]+=", re.ASCII)
"""What tells `training.steps=3` from a path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line, taken apart."""

    words: tuple[str, ...]
    """Experiments, models, run folders."""
    overrides: tuple[str, ...]
    """`key=value` settings, `run_dir` excepted."""
    run_dir: str | None
    """Where to write, if given."""
    resume: bool
    """Continue what the run folder holds."""

    def config(self, experiment: str | Path | None) -> RunConfig:
        """The experiment's configuration with the overrides applied."""
        from betterhalf.config.load import load_config

        return load_config(experiment, self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a verb has to say."""

    result: dict[str, Any]
    """For machines."""
    show: Callable[[], None]
    """Prints the same for people."""
    passed: bool = True
    """False for a failed verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One row of the table."""

    run: Callable[[Request], Answer]
    words: str
    """The words it takes, as its usage shows them."""
    num_words: tuple[int, int]
    """Fewest and most of them."""
    help: str
    """One line."""
    settings: bool = True
    """Takes `key=value` of the configuration."""
    resume: bool = False
    """Takes --resume."""


def _sanity(request: Request) -> Answer:
    config = request.config(request.words[0] if request.words else DEMO)
    from betterhalf.runs.sanity import sanity

    result = sanity(config, request.run_dir, request.resume)
    return Answer(result=result, show=lambda: _show_sanity(result), passed=bool(result["passed"]))


def _train(request: Request) -> Answer:
    config = request.config(request.words[0])
    from betterhalf.runs.train import train

    result = train(config, request.run_dir, request.resume)
    return Answer(result=result, show=lambda: _show(result))


def _evaluate(request: Request) -> Answer:
    target = request.words[0]
    config = request.config(_run_config(target))
    from betterhalf.runs.evaluate import evaluate

    result = evaluate(target, config, request.run_dir)
    return Answer(result=result, show=lambda: _show(result))


def _report(request: Request) -> Answer:
    from betterhalf.report.page import write_report
    from betterhalf.run_dir import RunDir
    from betterhalf.runs.folder import default_run_dir

    runs = [RunDir.open(word) for word in request.words]
    folder = runs[0].path if len(runs) == 1 else default_run_dir("report", "comparison")
    path = write_report(runs, RunDir(Path(request.run_dir or folder)).report)
    result = {"verb": "report", "report": str(path)}
    return Answer(result=result, show=lambda: _show(result))


def _config(request: Request) -> Answer:
    from betterhalf.config.load import config_difference, resolved_json
    from betterhalf.config.render import toml_text

    left, *others = [request.config(word) for word in request.words]
    if not others:
        return Answer(result=resolved_json(left), show=lambda: print(toml_text(left).rstrip()))
    changes = config_difference(left, others[0])
    rows = [{"key": change.key, "left": change.left, "right": change.right} for change in changes]
    lines = [str(change) for change in changes] or ["no difference"]
    return Answer(result={"differences": rows}, show=lambda: print(*lines, sep="\n"))


def _export(request: Request) -> Answer:
    run, directory = request.words
    _run_config(run)
    from betterhalf.runs.export import export

    result = export(run, directory)
    return Answer(result=result, show=lambda: _show(result))


VERBS = {
    "sanity": Verb(
        run=_sanity,
        words="[EXPERIMENT]",
        num_words=(0, 1),
        help="the paper's sanity test: perfectible set, one arm for each precision, verdict and report",
        resume=True,
    ),
    "train": Verb(
        run=_train,
        words="EXPERIMENT",
        num_words=(1, 1),
        help="one RL fine-tuning run; with run_dir=RUN, --resume continues it",
        resume=True,
    ),
    "evaluate": Verb(
        run=_evaluate,
        words="MODEL|RUN",
        num_words=(1, 1),
        help="avg@k and pass@k, sampled by the rollout engine",
    ),
    "report": Verb(
        run=_report,
        words="RUN [RUN ...]",
        num_words=(1, sys.maxsize),
        help="one self-contained HTML page with plots, from run folders",
        settings=False,
    ),
    "config": Verb(
        run=_config,
        words="EXPERIMENT [OTHER]",
        num_words=(1, 2),
        help="the resolved configuration; with two, their difference",
    ),
    "export": Verb(
        run=_export,
        words="RUN DIR",
        num_words=(2, 2),
        help="a Hugging Face folder that transformers and vLLM load",
        settings=False,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; never raises but for `--help` and `--version`, which exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read when torch is first imported: threads that spin while they wait stall each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED, arguments)
    except BetterhalfError as error:
        return _complain(str(error), error.exit_code, arguments)
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough. Without this, Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        return _complain(_disk_words(error), EXIT_RUN, arguments)
    except Exception as error:
        # An error nobody foresaw: the traceback is what a bug report needs.
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}. Please report this, with the lines above."
        return _complain(message, EXIT_RUN, arguments)


def _run(arguments: list[str]) -> int:
    name, rest = _pick_verb(arguments)
    verb = VERBS[name]
    options = _parse(name, verb, rest)
    answer = verb.run(_request(name, verb, options))
    if options.json:
        print(_json_line(answer.result))
    else:
        answer.show()
    sys.stdout.flush()
    return EXIT_OK if answer.passed else EXIT_FAILED


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See `{self.prog} --help`.")


def _pick_verb(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb and what follows it; `--help`, `--version` and no argument at all end here."""
    first = arguments[0] if arguments else "--help"
    if first in VERBS:
        return first, arguments[1:]
    parser = _Parser(
        prog="betterhalf",
        usage="betterhalf VERB [ARGUMENT ...] [key=value ...] [--json]",
        description="Reinforcement-learning fine-tuning of language models in one proven precision.",
        epilog=_verb_list(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"betterhalf {__version__}")
    if first.startswith("-"):
        parser.parse_known_args([first])
        raise InputError(f"unknown option {first!r}. A command starts with its verb: {', '.join(VERBS)}.")
    cure = _did_you_mean(first, VERBS) or f"The verbs are {', '.join(VERBS)}."
    raise InputError(f"unknown verb {first!r}. {cure}")


def _verb_list() -> str:
    rows = [(f"{name} {verb.words}", verb.help) for name, verb in VERBS.items()]
    width = max(len(left) for left, _ in rows)
    listed = "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)
    return f"verbs:\n{listed}\n\n`betterhalf VERB --help` tells more; experiments/README.md lists the experiments."


def _parse(name: str, verb: Verb, rest: list[str]) -> argparse.Namespace:
    settings = " [key=value ...]" if verb.settings else ""
    parser = _Parser(
        prog=f"betterhalf {name}",
        usage=f"betterhalf {name} {verb.words}{settings} [run_dir=PATH]{' [--resume]' * verb.resume} [--json]",
        description=verb.help,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar=verb.words, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    if verb.resume:
        parser.add_argument("--resume", action="store_true", help="continue the run that run_dir holds")
    parser.set_defaults(resume=False)
    options, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        known = ["--json", "--help", *(["--resume"] if verb.resume else [])]
        setting = unknown[0].lstrip("-")
        written = f"Settings are written without dashes: {setting}." if "=" in setting else None
        cure = written or _did_you_mean(unknown[0], known) or f"See `{parser.prog} --help`."
        raise InputError(f"unknown option {unknown[0]!r}. {cure}")
    return options


def _request(name: str, verb: Verb, options: argparse.Namespace) -> Request:
    from betterhalf.config.overrides import split_overrides

    words = tuple(word for word in options.words if not _SETTING.match(word))
    run_dir, overrides = split_overrides([word for word in options.words if _SETTING.match(word)])
    fewest, most = verb.num_words
    if not fewest <= len(words) <= most:
        given = " ".join(words) or "nothing"
        raise InputError(f"{name} takes {verb.words}, got {given}. See `betterhalf {name} --help`.")
    if overrides and not verb.settings:
        raise InputError(f"{name} takes no settings, got {overrides[0]}. Leave it out.")
    return Request(words=words, overrides=tuple(overrides), run_dir=run_dir, resume=options.resume)


def _run_config(target: str) -> Path | None:
    """The configuration that a run folder was made with; None for a model.

    Raises:
        InputError: a sanity run, which holds several policies.
    """
    from betterhalf.run_dir import RunDir

    run = RunDir(Path(target))
    if run.arm_names():
        arm = run.arm(run.arm_names()[0])
        raise InputError(f"{target} holds a sanity run. Name one of its arms, such as {arm.path}.")
    return run.config if run.configured else None


def _show_sanity(result: dict[str, Any]) -> None:
    """The table of arms, what follows from it, and where to read on."""
    from betterhalf.report.verdict import print_verdict
    from betterhalf.run_dir import RunDir

    print_verdict(result)
    for name, reason in result.get("reasons", {}).items():
        print(f"{name}: {reason}")
    run = RunDir(Path(result["run_dir"]))
    _show({"run": run.path, "report": run.report})


def _show(result: dict[str, Any]) -> None:
    """Name and value of each plain entry, one to a line."""
    rows = {key: _brief(value) for key, value in result.items() if not isinstance(value, (dict, list))}
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


def _brief(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _did_you_mean(wrong: str, allowed: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(wrong, list(allowed), n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else None


def _json_line(result: dict[str, Any]) -> str:
    from betterhalf.run_dir import plain_json

    return json.dumps(plain_json(result), allow_nan=False)


def _disk_words(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}. Free some space; what was written before is intact, and --resume continues."
    return f"{error.strerror or error}{where}. Check the path and its permissions."


def _complain(message: str, status: int, arguments: Sequence[str]) -> int:
    """Say what went wrong, also to a machine that reads the last line."""
    if os.environ.get("BETTERHALF_TRACEBACK") == "1" and status != EXIT_INTERRUPTED:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "--json" in arguments:
        print(json.dumps({"error": message, "exit_status": status}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
