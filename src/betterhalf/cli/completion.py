"""Completion of the command line in bash and zsh, made by shtab from the table of verbs and the schema."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from betterhalf import __version__
from betterhalf.cli.request import Verb
from betterhalf.config.keys import all_keys
from betterhalf.errors import InputError, MissingExtraError

SHELLS = ("bash", "zsh")

_BASH = """\
_betterhalf_files() {{
  compgen -d -S / -- "$1"
  local found
  while read -r found; do [[ -d $found ]] || echo "$found"; done < <(compgen -f -- "$1")
}}
_betterhalf_words() {{
  compgen -W "{keys}" -- "$1"
  _betterhalf_files "$1"
}}
"""
"""Functions that print the candidates for the word `$1`."""

_BASH_END = """\
_betterhalf() {
  _shtab_betterhalf
  case ${COMPREPLY[0]-} in *=|*/) compopt -o nospace 2>/dev/null ;; esac
}
complete -o bashdefault -F _betterhalf betterhalf
"""
"""Wrapper of shtab's function: the value follows `key=` at once, and more of the path a folder."""

_ZSH = """\
_betterhalf_words() {{
  _alternative 'files:file:_files' 'settings:setting:compadd -S "" -- {keys}'
}}
"""

_WORDS = {"bash": "_betterhalf_words", "zsh": "_betterhalf_words"}
_FILES = {"bash": "_betterhalf_files", "zsh": "_files"}


def completion_script(verbs: Mapping[str, Verb], shell: str) -> str:
    """Return the script that `eval` in a shell's start file takes.

    Args:
        verbs: table of verbs.
        shell: `bash` or `zsh`.

    Raises:
        InputError: another shell.
        MissingExtraError: shtab is not installed.
    """
    if shell not in SHELLS:
        raise InputError(f"completion knows {' and '.join(SHELLS)}, but got {shell!r}. Write one of them.")
    try:
        import shtab
    except ImportError as error:
        raise MissingExtraError("completion needs shtab; install it with `pip install shtab`") from error
    keys = " ".join(f"{key}=" for key in all_keys())
    begin, end = {"bash": (_BASH, _BASH_END), "zsh": (_ZSH, "")}[shell]
    script = shtab.complete(_parser(verbs), shell=shell, preamble=begin.format(keys=keys))
    return f"{script}\n{end}"


def _parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """Return a parser of the whole command line; it is never asked to parse."""
    parser = argparse.ArgumentParser(prog="betterhalf")
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    added = parser.add_subparsers()
    for name, verb in verbs.items():
        one = added.add_parser(name, help=verb.help, description=verb.help)
        one.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        for option in verb.options:
            if option.value is None:
                one.add_argument(f"--{option.name}", action="store_true", help=option.help)
            else:
                valued = one.add_argument(f"--{option.name}", metavar=option.value, help=option.help)
                valued.complete = _FILES  # type: ignore[attr-defined]
        words = one.add_argument("words", nargs="*", help=verb.words)
        words.complete = _WORDS if verb.settings else _FILES  # type: ignore[attr-defined]
    return parser
