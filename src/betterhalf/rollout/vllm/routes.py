"""Recording, inside vLLM's worker, of the experts that it chooses for each token of its requests.

vLLM's own option (`enable_return_routed_experts`) needs a model runner that a CPU does not have. Here each router
reports its choices to a function, and the rows of a pass are assigned to requests in the runner's order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from betterhalf.precision.routing import compact


class RouteRecorder:
    """Recorder of one worker's routing, from its construction until `stop`; the worker must run passes eagerly."""

    def __init__(self, runner: Any, model: Any) -> None:
        """Begin to record.

        Args:
            runner: vLLM's model runner.
            model: model of the runner.
        """
        self._runner = runner
        blocks = [part for part in model.modules() if hasattr(part, "routed_experts") and hasattr(part, "router")]
        self._routers = [block.router for block in blocks]
        self._experts = blocks[0].router.global_num_experts if blocks else 0
        self._found: dict[int, Tensor] = {}
        self._scheduled: Any = None
        self._rows: dict[str, list[tuple[int, Tensor]]] = {}
        """Request -> (position of the first token, choices [n, L, K]) of each pass over it."""
        self._execute, self._forward = runner.execute_model, runner._model_forward
        runner.execute_model, runner._model_forward = self._execute_model, self._model_forward
        for layer, router in enumerate(self._routers):
            router.set_capture_fn(partial(self._capture, layer))

    def _capture(self, layer: int, experts_TK: Tensor) -> None:
        self._found[layer] = experts_TK.detach().clone()

    def _execute_model(self, scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self._scheduled = scheduled
        return self._execute(scheduled, *args, **kwargs)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        self._found.clear()
        out = self._forward(*args, **kwargs)
        if len(self._found) == len(self._routers) and self._found:
            self._assign()
        return out

    def _assign(self) -> None:
        """Assign the rows of the pass that has just run to its requests."""
        batch, counts = self._runner.input_batch, self._scheduled.num_scheduled_tokens
        stacked = torch.stack([self._found[layer] for layer in range(len(self._routers))], 1)
        rows_TLK, start = compact(stacked, self._experts).cpu(), 0
        for index, request in enumerate(batch.req_ids):
            count = int(counts.get(request, 0))
            first = int(batch.num_computed_tokens_cpu[index])
            self._rows.setdefault(request, []).append((first, rows_TLK[start : start + count]))
            start += count

    def stop(self) -> dict[str, Any]:
        """Stop recording, and return request -> its choices, a NumPy array [N, L, K] of uint8 or int16.

        A token that was computed again, after a preemption, keeps the choice of its first pass.
        """
        for router in self._routers:
            router.set_capture_fn(None)
        del self._runner.execute_model, self._runner._model_forward
        return {request: _in_order(parts).numpy() for request, parts in self._rows.items()}


def _in_order(parts: list[tuple[int, Tensor]]) -> Tensor:
    known: list[Tensor] = []
    length = 0
    for first, rows in parts:
        if first + rows.shape[0] > length:
            known.append(rows[length - first :])
            length = first + rows.shape[0]
    return torch.cat(known)
