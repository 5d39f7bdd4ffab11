"""The JavaScript of the page: Vega, Vega-Lite and Vega-Embed from the installed package, and the page's own script."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from betterhalf.errors import RunError
from betterhalf.run_dir import write_text_atomic


def own_script() -> str:
    """Return the script that unpacks libraries and figures, and draws."""
    return files("betterhalf.report").joinpath("page.js").read_text(encoding="utf-8")


@cache
def libraries() -> tuple[str, str]:
    """Return the libraries as one packed script, and the source of a policy that allows it."""
    script = _vega()
    return packed(script), script_hash(script)


def packed(content: object) -> str:
    """Return JSON that `DecompressionStream` of a browser and `unpacked` read, in letters that end no element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def unpacked(text: str) -> Any:
    """Return the content that was packed."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def script_hash(script: str) -> str:
    """Return the source of a content security policy that allows this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _vega() -> str:
    """Return the libraries as one script; bundling them takes seconds, so the result is kept in the user's cache."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "betterhalf"
    file = kept / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return file.read_text(encoding="utf-8")
    import vl_convert

    bundle = str(vl_convert.javascript_bundle(snippet="window.vegaEmbed=vegaEmbed;"))
    with suppress(OSError, RunError):
        kept.mkdir(parents=True, exist_ok=True)
        write_text_atomic(file, bundle)
    return bundle
