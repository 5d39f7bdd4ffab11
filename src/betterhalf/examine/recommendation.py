"""The doctor's recommendation as an experiment file: TOML with a reason beside each setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from betterhalf.config.render import toml_value
from betterhalf.config.schema import LoraConfig
from betterhalf.diagnostics.numerics import Census
from betterhalf.diagnostics.verdict import Verdict
from betterhalf.examine.islands import Islands
from betterhalf.examine.subject import Subject
from betterhalf.types import DtypeName


def config_text(
    subject: Subject,
    recommended: DtypeName | None,
    verdicts: Mapping[DtypeName, Verdict],
    censuses: Mapping[DtypeName, Census],
    islands: Islands | None,
) -> str:
    """Return the settings of model, adapters, precision, FP32 islands and loss scale.

    `betterhalf train` accepts the file as it is, or as the base of another experiment. The text is empty without a
    recommendation, as for a model that the trainer refuses.
    """
    if recommended is None:
        return ""
    needed = islands is not None and islands.cures and recommended == "fp16" and verdicts["fp16"].verdict != "ok"
    census = islands.census if islands and needed else censuses[recommended]
    return "\n".join(_lines(subject, recommended, verdicts, census, islands if needed else None)) + "\n"


def _lines(
    subject: Subject,
    recommended: DtypeName,
    verdicts: Mapping[DtypeName, Verdict],
    census: Census,
    islands: Islands | None,
) -> Iterator[str]:
    config = subject.config
    yield f"# Recommended by betterhalf doctor: {_summary(verdicts)}."
    yield "[model]"
    yield _line("name", config.model.name, "the model that was examined")
    if config.model.revision:
        yield _line("revision", config.model.revision, "its revision")
    yield ""
    if config.lora.active:
        yield "[lora]"
        yield from _adapter_lines(config.lora)
        yield ""
    yield "[precision]"
    verdict = islands.verdict if islands else verdicts[recommended]
    yield _line("preset", recommended, f"{verdict.verdict}: {verdict.reasons[0]}")
    modules = islands.modules if islands else config.precision.fp32_modules
    if modules and recommended != "fp32":
        why = verdicts[recommended].reasons[0] if islands else "as given"
        yield _line("fp32_modules", modules, f"FP32 islands: {why}")
    safe = census.largest_safe_loss_scale
    if recommended == "fp16" and safe:
        yield ""
        yield "[precision.loss_scale]"
        why = f"the largest that kept every gradient finite is 2^{math.log2(safe):.0f}; the rest is headroom"
        yield _line("initial", census.loss_scale, why)


def _adapter_lines(lora: LoraConfig) -> Iterator[str]:
    """Yield the settings of the adapters; an adapter to start from sets its own rank, scale and targets."""
    given = {"adapter", "merge"} if lora.adapter else set(LoraConfig.model_fields)
    for key, value in lora.model_dump(mode="json", include=given, exclude_defaults=True).items():
        yield _line(key, value, "as examined")


def _line(key: str, value: object, why: str) -> str:
    """Return `key = value  # why` on one line."""
    return f"{key} = {toml_value(value)}  # {' '.join(why.split())}"


def _summary(verdicts: Mapping[DtypeName, Verdict]) -> str:
    return ", ".join(f"{name} is {verdict.verdict}" for name, verdict in verdicts.items())
