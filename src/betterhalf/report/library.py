"""The JavaScript of the page: Vega, Vega-Lite and Vega-Embed from the installed package, then the page's own script."""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from betterhalf.errors import RunError
from betterhalf.run_dir import write_text_atomic


def page_script() -> str:
    """Return all that the page runs, without a character that could end its `<script>`."""
    own = files("betterhalf.report").joinpath("page.js").read_text(encoding="utf-8")
    return f"{_vega()}\n{own}".replace("</script", "<\\/script")


def script_hash(script: str) -> str:
    """Return the source of a content security policy that allows this script alone."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _vega() -> str:
    """Return the libraries as one script; bundling them takes seconds, so the result is kept in the user's cache."""
    kept = _cache() / f"vega-{version('vl-convert-python')}.js"
    with suppress(OSError):
        return kept.read_text(encoding="utf-8")
    import vl_convert

    bundle = str(vl_convert.javascript_bundle(snippet="window.vegaEmbed=vegaEmbed;"))
    with suppress(OSError, RunError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(kept, bundle)
    return bundle


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "betterhalf"
