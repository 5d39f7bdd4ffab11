"""Terminal view of a plan: memory of each process, devices, traffic, packing, and what does not fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from betterhalf.diagnostics.memory import DevicePlan, ProcessPlan
from betterhalf.diagnostics.sizes import GIB, count
from betterhalf.examine.plan import RunPlan

Row = tuple[str, ...]


def show_plan(plan: RunPlan, stream: TextIO | None = None) -> None:
    """Print a plan, on standard output if `stream` is absent."""
    print("\n".join(_lines(plan)), file=stream or sys.stdout)


def gib(num_bytes: int) -> str:
    """Format a size in GiB from 0.1 GiB on, else in MiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def _lines(plan: RunPlan) -> Iterator[str]:
    sizes = plan.sizes
    active = f", {count(sizes.active_parameters)} of them active" if sizes.experts_per_token else ""
    lora = f", LoRA of rank {plan.lora_rank} ({count(sizes.adapters)} trained)" if plan.lora_rank else ""
    yield f"{plan.model}: {count(sizes.parameters)} parameters{active}, {sizes.layers} layers{lora}; {plan.cluster}"
    for process in plan.memory.processes:
        yield from ("", *_process(process))
    yield from (
        "",
        *_table(("device", "count", "at most", "memory", ""), [_device(one) for one in plan.memory.devices]),
    )
    traffic = plan.memory.traffic
    rows = [
        ("path of the weights", traffic.path),
        ("one weight sync, all engines", gib(traffic.sync_bytes)),
        ("one pass, sent by each rank", gib(traffic.pass_bytes)),
        ("one optimizer step, sent by each rank", gib(traffic.optimizer_step_bytes)),
        ("object store, at most", gib(traffic.store_bytes)),
    ]
    yield from ("", *_table(("traffic", ""), rows))
    packed = [
        (
            *(one.completions, count(one.tokens), str(one.packs), str(one.passes), f"{one.balance:.3f}"),
            count(one.largest_pack),
        )
        for one in plan.packings
    ]
    heads = ("completions", "tokens", "packs", "passes", "balance", "largest pack")
    yield from ("", *_table(heads, packed), "packs and passes are those of one optimizer step")
    for sentence in (*plan.misfits, *plan.notes):
        yield from ("", sentence)
    if plan.fits:
        known = all(device.limit_bytes is not None for device in plan.memory.devices)
        yield from ("", "fits" if known else "the memory of the GPUs is unknown: give --gpu-gib GIB")


def _process(process: ProcessPlan) -> list[str]:
    rows = [(item.name, gib(item.num_bytes), item.formula) for item in process.items]
    rows.append(("together", gib(sum(item.num_bytes for item in process.items)), ""))
    rows += [(f"on the host: {item.name}", gib(item.num_bytes), item.formula) for item in process.host_items]
    title = process.kind if process.count == 1 else f"{process.kind}, each of {process.count}"
    return _table((title, "", ""), rows)


def _device(device: DevicePlan) -> Row:
    limit = "unknown" if device.limit_bytes is None else gib(device.limit_bytes)
    return device.name, str(device.count), gib(device.total_bytes), limit, "" if device.fits else "does not fit"


def _table(heads: Row, rows: Sequence[Row]) -> list[str]:
    """Return a table's lines: first column and last texts to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        cells = [
            text.ljust(width) if column == 0 or column == len(row) - 1 > 1 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
