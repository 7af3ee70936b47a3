"""Codecs for users of plain DistributedDataParallel, as a communication hook.

hook = paceline.ddp_hook("powersgd(rank=2)")
model = DistributedDataParallel(module)
model.register_comm_hook(None, hook)
…  checkpoint["hook"] = hook.state_dict();  hook.load_state_dict(checkpoint["hook"])
"""

# No postponed annotations: DDP compares the hook's annotations with its own types.
from typing import Any

import torch
import torch.distributed as dist

from paceline import codecs
from paceline.codecs.kernel import ledger
from paceline.codecs.reducers.reducer import Reducer, StagedWork, finish
from paceline.comm import torch_fabric
from paceline.comm.torch_fabric import TorchCommunicator
from paceline.errors import ConfigError


class DdpHook:
    """A DDP communication hook that averages gradients through a codec; equal bits on every rank.

    Buckets start their first exchange as they fill; the last bucket of a backward completes all of them. The
    first backward of a process travels uncompressed, because DDP rearranges its buckets after it. Residuals
    and factors are in `state_dict()`, one checkpoint per rank.
    """

    def __init__(self, reducer: Reducer, name: str, process_group: dist.ProcessGroup | None) -> None:
        self.__name__ = self.__qualname__ = f"paceline.ddp_hook({name})"
        self._reducer = reducer
        self._group = process_group
        self._comm: TorchCommunicator | None = None
        self._buckets: dict[str, dict[str, Any]] = {}
        self._is_first_backward = True
        self._running: list[tuple[StagedWork, torch.Tensor, torch.Tensor, Any]] = []

    def __call__(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """Called by DDP during backward; `state` is whatever register_comm_hook was given, and is ignored."""
        if self._comm is None:
            self._comm = torch_fabric.over(self._group, bucket.buffer().device)
        buffer = bucket.buffer()
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        buffer.div_(self._comm.size)
        if self._is_first_backward:
            self._comm.all_reduce(buffer).wait()
            future.set_result(buffer)
            self._is_first_backward = not bucket.is_last()
            return future
        flat = buffer if buffer.dtype == torch.float32 else buffer.to(torch.float32)
        layout = [
            ((g.data_ptr() - buffer.data_ptr()) // g.element_size(), list(g.shape))
            for g in bucket.gradients()
        ]
        try:
            work = self._reducer.start(flat, layout, self._comm, self._state_of(bucket.index(), flat, layout))
            self._running.append((work, flat, buffer, future))
            if bucket.is_last():
                self._finish()
        except BaseException:
            self._running.clear()
            raise
        return future

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of this rank."""
        return {"buckets": self._buckets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same model and number of ranks."""
        if set(state) != {"buckets"}:
            raise ConfigError(f"ddp_hook: not the state of a paceline hook: it has {sorted(state)}")
        self._buckets = dict(state["buckets"])

    def stats(self) -> dict[str, float]:
        """Bytes by cause, encode seconds and extra memory, summed over the buckets of this rank."""
        return ledger.total(self._reducer.stats(bucket["codec"]) for bucket in self._buckets.values())

    def _state_of(self, index: int, flat: torch.Tensor, layout: list[Any]) -> dict[str, Any]:
        shapes = [[offset, *shape] for offset, shape in layout]
        found = self._buckets.get(str(index))
        if found is None or found["layout"] != shapes:
            found = self._buckets[str(index)] = {"layout": shapes, "codec": {}}
        state: dict[str, Any] = found["codec"]
        state["tensor"] = index
        return state

    def _finish(self) -> None:
        running, self._running = self._running, []
        finish([work for work, _, _, _ in running])
        for _, flat, buffer, future in running:
            if flat is not buffer:
                buffer.copy_(flat)
            future.set_result(buffer)


def ddp_hook(codec: str, *, process_group: dist.ProcessGroup | None = None) -> DdpHook:
    """Make a communication hook for DistributedDataParallel that averages gradients through a codec.

    Args:
        codec: A codec with its options, e.g. `"powersgd(rank=2)"` or `"error_feedback(codec=onebit)"`.
        process_group: The group that the model was wrapped with; default: the default group.

    Raises:
        ConfigError: The codec is unknown or its options do not fit.

    Example:
        `model.register_comm_hook(None, paceline.ddp_hook("powersgd(rank=2)"))`
    """
    return DdpHook(codecs.make_reducer(codec), str(codec), process_group)
