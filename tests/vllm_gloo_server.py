"""Child process of a vLLM engine on a CPU whose workers receive weights over gloo in place of NCCL.

Everything but the communicator is vLLM's own: the calls of `LLM`, the worker, and layerwise reloading.
"""

from __future__ import annotations

from typing import Any

import torch

from betterhalf.distributed.broadcast import BroadcastGroup
from betterhalf.distributed.group import Membership
from betterhalf.rollout.vllm import server
from betterhalf.rollout.vllm.backend import VllmBackend


def register() -> None:
    """Register the stand-in under the name `gloo`."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    class GlooWeightTransferEngine(NCCLWeightTransferEngine):
        """vLLM's NCCL engine without CUDA streams."""

        def init_transfer_engine(self, init_info: Any) -> None:
            rank = init_info.rank_offset + self.parallel_config.rank
            place = Membership(
                rank=rank,
                world_size=init_info.world_size,
                host=init_info.master_address,
                port=init_info.master_port,
                seconds=60.0,
            )
            self.model_update_group = BroadcastGroup(place, self.device)  # type: ignore[assignment]

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: Any) -> None:
            group: Any = self.model_update_group
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                group.broadcast(weight)
                self.model.load_weights([(name, weight)])

        def shutdown(self) -> None:
            if self.model_update_group is not None:
                self.model_update_group.leave()  # type: ignore[attr-defined]
                self.model_update_group = None

    WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


def main() -> None:
    """Serve a vLLM engine that has the stand-in."""
    backend = VllmBackend()
    start = backend.start

    def started(options: dict[str, Any]) -> Any:
        register()
        return start({**options, "weight_transfer_config": {"backend": "gloo"}})

    server.main({**backend.handlers(), "start": started})


if __name__ == "__main__":
    main()
