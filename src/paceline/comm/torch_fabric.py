"""The torch fabric: any c10d process group (Gloo on CPUs, NCCL on GPUs, MPI, …).

c10d chooses the algorithms; wire bytes are not visible here. Object collectives, which
pickle, are never used.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the default group as it is when they are imported. Imported after the group exists (as
# optimizers do, by way of the compiler), they would hold it until the interpreter ends, with Gloo's threads
# running: about one exit in twenty then aborts ("terminate called without an active exception").
import torch.distributed.nn
from torch._C._distributed_c10d import PrefixStore

from paceline import torch_versions
from paceline.comm import device_messages, reference
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.rendezvous.interfaces import interface_of
from paceline.comm.rendezvous.meeting import Meeting
from paceline.comm.roll_call import RollCall
from paceline.errors import CommError, ConfigError, PeerLost, Timeout
from paceline.types import DEFAULT_OPTIONS, CallOptions, Handler, Message, Rank, ReduceOp, Reply, Work

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.MEAN: dist.ReduceOp.SUM,  # divided on arrival: Gloo has no average
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
    ReduceOp.BAND: dist.ReduceOp.BAND,
    ReduceOp.BOR: dist.ReduceOp.BOR,
    ReduceOp.BXOR: dist.ReduceOp.BXOR,
}


def connect(meeting: Meeting, *, timeout_s: float, device: torch.device | None = None) -> TorchCommunicator:
    """Join the job's ranks in a c10d group; uses the default group if the script already made one."""
    device = device or torch.device("cpu")
    if dist.is_initialized():
        if dist.get_world_size() != meeting.size:
            raise ConfigError(
                f"torch.distributed has {dist.get_world_size()} ranks, the job {meeting.size};"
                " call paceline.init() before init_process_group, or leave that call out"
            )
        return TorchCommunicator(meeting.hosts, device=device, meeting=meeting)
    # Counts and sums for the log are CPU tensors on GPU jobs too.
    needs_nccl = device.type == "cuda" and not _share_a_gpu(meeting, device, timeout_s=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if needs_nccl else "gloo"
    if meeting.address and "GLOO_SOCKET_IFNAME" not in os.environ:
        # Gloo would bind to whatever the host's name resolves to, which other hosts often cannot reach.
        interface = interface_of(meeting.address)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("c10d", meeting.store),
            rank=meeting.rank,
            world_size=meeting.size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        raise CommError(f"rank {meeting.rank}: cannot connect the {backend} group: {error}") from error
    return TorchCommunicator(meeting.hosts, device=device, owns_group=True, meeting=meeting)


def _share_a_gpu(meeting: Meeting, device: torch.device, *, timeout_s: float) -> bool:
    """Whether two ranks use one GPU, which NCCL refuses; Gloo then moves the tensors through the hosts."""
    properties: Any = torch.cuda.get_device_properties(device)
    own = [meeting.hosts[meeting.rank], str(properties.uuid)]
    every = meeting.exchange("gpu", own, timeout_s=timeout_s)
    return len({tuple(one) for one in every}) < meeting.size


def _default_group() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()  # noqa: SLF001  torch has no public query


def _backend_name(group: dist.ProcessGroup | None, device: torch.device) -> str:
    found: Any = group or _default_group()
    return str(found._get_backend(device).name()).lower()  # noqa: SLF001  torch has no public query


def _payload_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """The CPU, from where bytes enter a network; the GPU for a group that has no backend for the CPU."""
    if device.type == "cpu":
        return device
    known = (group or _default_group())._device_types  # noqa: SLF001  torch has no public query
    return torch.device("cpu") if torch.device("cpu") in known else device


def over(group: dist.ProcessGroup | None, device: torch.device) -> TorchCommunicator:
    """A communicator over a group that the user made; each rank stands for a host of its own."""
    hosts = [f"rank {r}" for r in range(dist.get_world_size(group))]
    return TorchCommunicator(hosts, group=group, device=device)


class TorchCommunicator(FabricCommunicator):
    """A communicator over one c10d process group (None: the default group)."""

    fabric = "torch"

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
        owns_group: bool = False,
        meeting: Meeting | None = None,
        name: str = "paceline",
        roll_call: RollCall | None = None,
        job_ranks: Sequence[Rank] | None = None,
    ) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), hosts)
        self.meeting = meeting
        self._job_ranks = range(self.size) if job_ranks is None else job_ranks
        self._roll_call = roll_call
        if meeting is not None and self.size > 1:
            self._roll_call = RollCall(self.mailbox(), hosts)
        self.group = group
        self.device = device or torch.device("cpu")
        is_gloo = self.device.type != "cpu" and _backend_name(self.group, self.device) == "gloo"
        self._stages_messages = is_gloo  # its send and recv end the process when given CUDA tensors
        self.payload_device = _payload_device(self.group, self.device)
        """Where reducers put the encoded bytes of this device's tensors."""
        self._owns_group = owns_group
        self._name = name
        self._num_splits = 0

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed 1-D tensor in ordinary memory of this communicator's device."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.perf_counter()

    def register_handler(self, channel: str, handler: Handler) -> None:
        is_here = self.device.type == "cpu"
        super().register_handler(
            channel, handler if is_here else device_messages.handler_on(handler, self.device)
        )

    def send_call(self, peer: Rank, channel: str, message: Message) -> Reply:
        reply = super().send_call(peer, channel, message)
        is_here = self.device.type == "cpu"
        return reply if is_here else device_messages.ReplyOnDevice(reply, self.device)

    def start_all_reduce(
        self, tensor: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        finish = self._divide(tensor) if op is ReduceOp.MEAN else None
        return self._start("all_reduce", dist.all_reduce, tensor, _OPS[op], finish=finish)

    def start_reduce(
        self, tensor: torch.Tensor, root: Rank, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        finish = self._divide(tensor) if op is ReduceOp.MEAN and self.rank == root else None
        return self._start("reduce", dist.reduce, tensor, op=_OPS[op], group_dst=root, finish=finish)

    def start_broadcast(
        self, tensor: torch.Tensor, root: Rank, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self._start("broadcast", dist.broadcast, tensor, group_src=root)

    def start_all_gather(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self._start("all_gather", torch_versions.all_gather_single, output.view(-1), source.view(-1))

    def start_all_gather_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        # c10d's Gloo wants equal shares: pad to the longest, and cut on arrival.
        longest = max(counts)
        padded = source.new_zeros(longest)
        padded[: source.numel()] = source.view(-1)
        gathered = source.new_empty(longest * self.size)

        def finish() -> None:
            parts = [gathered[r * longest : r * longest + n] for r, n in enumerate(counts)]
            torch.cat(parts, out=output.view(-1))

        return self._start("all_gather_v", torch_versions.all_gather_single, gathered, padded, finish=finish)

    def start_reduce_scatter(
        self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self.start_reduce_scatter_v(output, source, [output.numel()] * self.size, op)

    def start_reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        op: ReduceOp,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        # As c10d does it for Gloo: reduce everything, keep our share.
        whole = source.reshape(-1).clone()
        start = sum(counts[: self.rank])
        divide = self._divide(output) if op is ReduceOp.MEAN else None

        def finish() -> None:
            output.view(-1).copy_(whole[start : start + counts[self.rank]])
            if divide is not None:
                divide()

        return self._start("reduce_scatter", dist.all_reduce, whole, _OPS[op], finish=finish)

    def start_gather(
        self,
        output: torch.Tensor | None,
        source: torch.Tensor,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        parts = None if output is None else list(output.view(-1).chunk(self.size))
        return self._start("gather", dist.gather, source.view(-1), parts, group_dst=root)

    def start_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor | None,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        parts = None if source is None else list(source.view(-1).chunk(self.size))
        return self._start("scatter", dist.scatter, output.view(-1), parts, group_src=root)

    def start_all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self._start("all_to_all", dist.all_to_all_single, output.view(-1), source.view(-1))

    def start_all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        return self._start(
            "all_to_all_v",
            dist.all_to_all_single,
            output.view(-1),
            source.view(-1),
            list(output_counts),
            list(source_counts),
        )

    def start_barrier(self, options: CallOptions = DEFAULT_OPTIONS) -> Work:
        return self._start("barrier", dist.barrier)

    def start_send(
        self, tensor: torch.Tensor, dst: Rank, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        sent = tensor.cpu() if self._stages_messages else tensor
        work = dist.isend(sent, group=self.group, tag=tag, group_dst=dst)
        return _TorchWork(self, work, sent.numel, "send")  # keeps it until then

    def start_recv(
        self, tensor: torch.Tensor, src: Rank | None, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        if not self._stages_messages:
            work = dist.irecv(tensor, group=self.group, tag=tag, group_src=src)
            return _TorchWork(self, work, None, "recv")
        received = torch.empty_like(tensor, device="cpu")
        work = dist.irecv(received, group=self.group, tag=tag, group_src=src)
        return _TorchWork(self, work, lambda: tensor.copy_(received), "recv")

    def make_part(self, ranks: list[Rank]) -> FabricCommunicator | None:
        self._num_splits += 1
        if self.rank not in ranks:
            return None
        name = f"{self._name}.{self._num_splits}[{','.join(map(str, ranks))}]"
        members = ranks
        if self.group is not None:
            members = [dist.get_global_rank(self.group, r) for r in ranks]
        # dist.new_group(use_local_synchronization=True) names groups by how many this process has made
        # before, which members of different groups disagree about: then they wait for each other for ever.
        c10d: Any = dist.distributed_c10d
        backend = dist.get_backend(self.group)
        group, _ = c10d._new_process_group_helper(  # noqa: SLF001  as below
            len(ranks),
            ranks.index(self.rank),
            members,
            dist.Backend(backend),
            c10d._get_default_store(),  # noqa: SLF001  torch offers no public way to name a group
            name,
            timeout=c10d._get_default_timeout(backend),  # noqa: SLF001  as above
        )
        ranks_of_groups = c10d._world.pg_group_ranks  # noqa: SLF001  as above
        ranks_of_groups[group] = {member: r for r, member in enumerate(members)}
        return TorchCommunicator(
            [self.hosts[r] for r in ranks],
            group=group,
            device=self.device,
            owns_group=True,
            name=name,
            roll_call=self._roll_call,
            job_ranks=[self._job_ranks[r] for r in ranks],
        )

    def release(self) -> None:
        if self._owns_group and dist.is_initialized():
            dist.destroy_process_group(self.group)

    def _divide(self, tensor: torch.Tensor) -> Callable[[], None]:
        def divide() -> None:
            mean = reference.divided(tensor, self.size)
            if mean is not tensor:
                tensor.copy_(mean)

        return divide

    def _start(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        finish: Callable[[], None] | None = None,
        **keywords: Any,
    ) -> Work:
        call = 0 if self._roll_call is None else self._roll_call.begin(self._name)
        try:
            work = function(*arguments, group=self.group, async_op=True, **keywords)
        except RuntimeError as error:
            raise self.translate(name, error, call) from error
        return _TorchWork(self, work, finish, name, call)

    def translate(self, name: str, error: BaseException, call: int = 0) -> CommError:
        """c10d's RuntimeError as ours; the communicator is unusable from now on.

        Args:
            name: Of the operation.
            error: What c10d raised.
            call: The operation's number among all ranks' calls; 0: unknown, as for send and recv.
        """
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        number = self.ledger.operations[name].calls if name in self.ledger.operations else 0
        head = f"{self.who()}: {name} #{number} over {dist.get_backend(self.group)}"
        self.unusable = f"{name} #{number} failed: {text}"
        culprit = "" if self._roll_call is None else self._roll_call.blame(self._name, call, self._job_ranks)
        if "imed out" in text or "imeout" in text:
            who = culprit or "a rank did not arrive in time"
            return Timeout(f"{head}: {who} ({text}). Is every rank alive and calling it?")
        if any(
            sign in text for sign in ("onnection closed", "onnection reset", "roken pipe", "onnection ref")
        ):
            who = culprit or "a peer is gone"
            return PeerLost(f"{head}: {who} ({text}). Look at the rank that failed first.")
        return CommError(f"{head}: {text}" + (f"; {culprit}" if culprit else ""))


class _TorchWork:
    """A c10d Work, what remains to be done on arrival, and the time spent waiting for it."""

    __slots__ = ("_call", "_comm", "_error", "_finish", "_name", "_work")

    def __init__(
        self,
        comm: TorchCommunicator,
        work: Any,
        finish: Callable[[], object] | None,
        name: str,
        call: int = 0,
    ) -> None:
        self._comm = comm
        self._work = work
        self._finish = finish
        self._name = name
        self._call = call
        self._error: BaseException | None = None

    def wait(self, timeout_s: float | None = None) -> None:
        if self._error is not None:
            raise self._error
        if self._work is None:
            return
        start = time.perf_counter()
        try:
            if timeout_s is None:
                self._work.wait()
            else:
                self._work.wait(datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            self._error = self._comm.translate(self._name, error, self._call)
            raise self._error from error
        finally:
            self._comm.ledger.wait_s += time.perf_counter() - start
        self._work = None
        if self._finish is not None:
            self._finish()
            self._finish = None

    def is_done(self) -> bool:
        return self._error is not None or self._work is None or bool(self._work.is_completed())

    def exception(self) -> BaseException | None:
        if self._error is None and self._work is not None and self._work.is_completed():
            try:
                self.wait()
            except CommError as error:
                return error
        return self._error
