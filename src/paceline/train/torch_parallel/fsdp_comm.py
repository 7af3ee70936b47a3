"""Codecs for users of FSDP2 (`fully_shard`): fewer bytes for gradients, weights, and between replicas.

    comm = paceline.fsdp_comm("int8")
    comm.install(fully_shard(model))        # also model.layers, each with a call of fully_shard of its own

Gradients: each rank encodes the part of every other rank; the owner of a part adds what it receives to its
own exact values, in rank order. Weights: every rank encodes its shard, and all decode the same payloads, its
owner as well, so that all compute with equal weights; the optimizer keeps the exact ones. So do those of
ZeRO++ (Wang et al., arXiv 2306.10209); gradients may have error feedback besides.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from paceline import codecs, registry, spec
from paceline.codecs.kernel import ledger, payload
from paceline.codecs.kernel.codec import Codec
from paceline.codecs.kernel.random_stream import use_stream
from paceline.codecs.reducers.reducer import Reducer, payload_buffer
from paceline.comm import torch_fabric
from paceline.comm.torch_fabric import TorchCommunicator
from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.torch_versions import all_gather_single
from paceline.train.torch_parallel.shard_replicas import ShardReplicas, averaging
from paceline.types import Work

_Communicators = dict[int, TorchCommunicator]


def _connected(
    group: dist.ProcessGroup, device: torch.device, communicators: _Communicators
) -> TorchCommunicator:
    """The communicator over a group, made when first needed."""
    found = communicators.get(id(group))
    if found is None:
        found = communicators[id(group)] = torch_fabric.over(group, device)
    return found


class _Later(dist.Work):
    """An exchange whose result is decoded at the first wait."""

    def __init__(self, work: Work, decode: Callable[[], None]) -> None:
        super().__init__()
        self._work, self._decode, self._is_decoded = work, decode, False

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        self._work.wait(
            timeout.total_seconds() if timeout is not None and timeout.total_seconds() > 0 else None
        )
        if not self._is_decoded:
            self._is_decoded = True
            self._decode()
        return True

    def is_completed(self) -> bool:
        return self._work.is_done() and self._is_decoded


class _Exchange:
    """What the exchanges of one module share."""

    def __init__(self, codec: Codec, communicators: _Communicators, index: int) -> None:
        self.codec = codec
        self.states: list[dict[str, Any]] = []
        self._communicators, self._index = communicators, index

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Memory for a result or an input, as FSDP asks for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def _state(self, part: int, parts: int, what: str, rank: int) -> dict[str, Any]:
        if len(self.states) != parts:
            self.states = [{} for _ in range(parts)]
        state = self.states[part]
        use_stream(state, what, self._index, rank, part)
        return state


class ReduceScatterByCodec(_Exchange):
    """FSDP2's reduce-scatter of one module's gradients."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Called by FSDP in backward: `output_tensor` is this rank's part of the sum, or of the mean."""
        kind = hash(op)
        if kind not in (hash(dist.ReduceOp.SUM), hash(dist.ReduceOp.AVG)):
            raise ConfigError(
                f"fsdp_comm: sums and means of gradients can be encoded, not {op}: leave"
                " set_gradient_divide_factor unset, and divide the loss instead"
            )
        comm = _connected(group, input_tensor.device, self._communicators)
        size, rank, numel = comm.size, comm.rank, output_tensor.numel()
        parts = input_tensor.view(size, numel)
        own_bytes = self.codec.max_encoded_bytes(numel)
        sent = payload_buffer((size - 1) * own_bytes, input_tensor, comm)
        others = [r for r in range(size) if r != rank]
        for slot, r in zip(torch.split(sent, own_bytes), others, strict=True):
            self.codec.encode(parts[r], self._state(r, size, "part", rank), out=slot)
        counts = [own_bytes if r != rank else 0 for r in range(size)]
        received = payload_buffer((size - 1) * own_bytes, input_tensor, comm)
        comm.all_to_all_v(received, sent, output_counts=counts, source_counts=counts).wait()
        total = torch.zeros(numel, dtype=torch.float32, device=input_tensor.device)
        arrived = iter(torch.split(received, own_bytes))
        for r in range(size):
            if r == rank:
                total.add_(parts[rank])
            else:
                self.codec.decode(next(arrived), total, accumulate=True)
        output_tensor.copy_(total.div_(size) if kind == hash(dist.ReduceOp.AVG) else total)
        return None


class AllGatherByCodec(_Exchange):
    """FSDP2's all-gather of one module's weights."""

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Called by FSDP before forward, and before backward where weights were freed."""
        if input_tensor.dtype not in payload.SOURCES:  # parameters of several dtypes travel as bytes
            work: dist.Work | None = all_gather_single(
                output_tensor, input_tensor, group=group, async_op=async_op
            )
            return work
        comm = _connected(group, input_tensor.device, self._communicators)
        num_bytes = self.codec.max_encoded_bytes(input_tensor.numel())
        own = payload_buffer(num_bytes, input_tensor, comm)
        self.codec.encode(input_tensor, self._state(0, 1, "weights", comm.rank), out=own)
        gathered = payload_buffer(comm.size * num_bytes, input_tensor, comm)
        exchange = comm.all_gather(gathered, own)

        def decode() -> None:
            parts = output_tensor.view(comm.size, -1)
            for encoded, part in zip(torch.split(gathered, num_bytes), parts, strict=True):
                self.codec.decode(encoded, part)

        later = _Later(exchange, decode)
        if async_op:
            return later
        later.wait()
        return None


class _AcrossReplicas:
    """FSDP2's hook after the reduce-scatter: the mean of the shards of one module over the replicas."""

    def __init__(
        self, reducer: Reducer, group: dist.ProcessGroup, communicators: _Communicators, index: int
    ) -> None:
        self.reducer = reducer
        self.state: dict[str, Any] = {"tensor": index}  # whose random stream it is
        self._group, self._communicators = group, communicators

    def __call__(self, shard: torch.Tensor) -> None:
        comm = _connected(self._group, shard.device, self._communicators)
        flat = shard.to(torch.float32).view(-1).contiguous() / comm.size
        self.reducer.reduce(flat, [], comm, self.state)
        shard.copy_(flat.view(shard.shape))


class FsdpComm:
    """Exchanges of FSDP2 through codecs; see `fsdp_comm` for the arguments."""

    def __init__(
        self,
        gradients: Codec,
        weights: Codec | None,
        across: Reducer | TrainingStrategy | None,
        replicas: dist.ProcessGroup | None,
        written: dict[str, str],
    ) -> None:
        self._written = written  # as which the codecs and the method were given
        self._gradients, self._weights, self._across, self._replicas = gradients, weights, across, replicas
        self._communicators: _Communicators = {}
        self._modules: dict[str, list[_Exchange | _AcrossReplicas]] = {}
        self._shards: ShardReplicas | None = None

    def install(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make every FSDP module of `model` send this way; call it once, after the last `fully_shard`.

        Args:
            model: The model, in which at least one module went through `fully_shard`.
            optimizer: The one that steps it: needed where `across` averages models, and unused otherwise.

        Raises:
            ConfigError: No module of the model did, or the model itself is still to; `install` was called
                before; the optimizer is missing; `replicas` is not the group of the same shard's ranks.
        """
        if self._modules:
            raise ConfigError(
                "fsdp_comm: install() was called before; make another fsdp_comm for another model"
            )
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, FSDPModule)]
        if not found:
            raise ConfigError(
                "fsdp_comm: no module of this model is sharded: call torch.distributed.fsdp.fully_shard first"
            )
        _check_sharded(model)
        if self._replicas is not None:
            _check_replicas(model, self._replicas)
        if isinstance(self._across, TrainingStrategy) and optimizer is None:
            raise ConfigError(
                "fsdp_comm: models are averaged after steps of the optimizer: install(model, optimizer)"
            )
        for index, (name, module) in enumerate(found):
            own: list[_Exchange | _AcrossReplicas] = []
            reduce_scatter = ReduceScatterByCodec(self._gradients, self._communicators, index)
            module.set_custom_reduce_scatter(reduce_scatter)  # type: ignore[arg-type]
            own.append(reduce_scatter)
            if self._weights is not None:
                all_gather = AllGatherByCodec(self._weights, self._communicators, index)
                module.set_custom_all_gather(all_gather)  # type: ignore[arg-type]
                own.append(all_gather)
            if isinstance(self._across, Reducer) and self._replicas is not None:
                hook = _AcrossReplicas(self._across, self._replicas, self._communicators, index)
                module.set_all_reduce_hook(hook)
                own.append(hook)
            self._modules[name] = own
        if isinstance(self._across, TrainingStrategy):
            assert self._replicas is not None and optimizer is not None
            first = next(model.parameters())
            comm = _connected(self._replicas, first.device, self._communicators)
            self._shards = ShardReplicas(self._across, comm, model.parameters(), optimizer)

    def synchronize(self) -> None:
        """Where models are averaged: afterwards all replicas hold the final one. All ranks call it."""
        if self._shards is not None:
            self._shards.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Residuals, random streams and the strategy's state of this rank: tensors and plain values.

        One checkpoint per rank, beside those of the model; all ranks call it.
        """
        exchanges = {
            name: [e.state if isinstance(e, _AcrossReplicas) else e.states for e in own]
            for name, own in self._modules.items()
        }
        across = None if self._shards is None else self._shards.state()
        return {"written": dict(self._written), "exchanges": exchanges, "across": across}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of the same model, codecs and number of ranks; after `install`.

        Raises:
            ConfigError: The state is of other modules or of other codecs.
        """
        if state.get("written") != self._written:
            raise ConfigError(
                f"fsdp_comm: the state is of {state.get('written')}, this is {self._written}; make it as the"
                " saved one was made, or begin without its state"
            )
        kept, given = sorted(self._modules), sorted(state["exchanges"])
        if kept != given:
            raise ConfigError(
                f"fsdp_comm: the state is of the modules {given}, this model has {kept}; call install(model)"
                " first"
            )
        for name, own in self._modules.items():
            for exchange, one in zip(own, state["exchanges"][name], strict=True):
                if isinstance(exchange, _AcrossReplicas):
                    exchange.state = one
                else:
                    exchange.states = list(one)
        if self._shards is not None:
            self._shards.restore(state["across"])

    def stats(self) -> dict[str, float]:
        """Bytes by cause, encode seconds and extra memory of this rank, summed over the modules."""
        return ledger.total(self._counted())

    def sent_bytes(self) -> float:
        """Bytes that this rank has handed to its groups since `install`."""
        return float(sum(c.ledger.payload_bytes for c in self._communicators.values()))

    def _counted(self) -> Iterator[dict[str, float]]:
        for own in self._modules.values():
            for exchange in own:
                if isinstance(exchange, _AcrossReplicas):
                    yield exchange.reducer.stats(exchange.state)
                else:
                    yield from (exchange.codec.stats(state) for state in exchange.states)


def fsdp_comm(
    gradients: str,
    *,
    weights: str | None = "int8",
    across: str | None = None,
    replicas: dist.ProcessGroup | None = None,
) -> FsdpComm:
    """Make what lets FSDP2 send fewer bytes; `install(model)` puts it in place.

    Args:
        gradients: Codec of the reduce-scatter, such as `"int8"` or `"error_feedback(codec=onebit)"`. Error
            feedback keeps the gradients of all ranks' parts, as much memory as the unsharded model. Codecs
            whose payload size depends on the values (`threshold`, `topk`) and `powersgd` cannot be used.
        weights: Codec of the all-gather; None: as FSDP does it. Default `"int8"`: the weights that are
            computed with are rounded, the optimizer's are not.
        across: What is done between replicas (hybrid sharding): a codec of the gradients' mean, any of them
            or `powersgd`; or a method that averages models, such as `"diloco(period=50)"`; None: nothing.
        replicas: With `across`, the group of the ranks that hold the same shard:
            `mesh.get_group("replicate")`. The model is sharded over the other dimension of the mesh alone.

    Raises:
        ConfigError: A codec is unknown or does not fit, or one of `across` and `replicas` is missing.

    Example:
        `paceline.fsdp_comm("int8").install(fully_shard(model))`

    Source: Wang et al., ZeRO++, arXiv 2306.10209; Tang et al., ICML 2021 (error feedback).
    """
    if (across is None) != (replicas is None):
        raise ConfigError(
            "fsdp_comm: across and replicas belong together: a codec, and the group of replicas"
        )
    return FsdpComm(
        _of_known_size(gradients, "gradients"),
        None if weights is None else _of_known_size(weights, "weights"),
        None if across is None else _between_replicas(across),
        replicas,
        {
            name: str(spec.parse(text))
            for name, text in (("gradients", gradients), ("weights", weights), ("across", across))
            if text is not None
        },
    )


def _check_sharded(model: nn.Module) -> None:
    """ConfigError if parts of the model went through `fully_shard`, and the model itself is still to."""
    whole = [n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if whole and not isinstance(model, FSDPModule):
        raise ConfigError(
            f"fsdp_comm: {len(whole)} parameters are not sharded, {whole[0]} for one: call fully_shard(model)"
            " for the model itself, and install(model) after it"
        )


def _check_replicas(model: nn.Module, group: dist.ProcessGroup) -> None:
    """ConfigError if these ranks hold other shards, or if FSDP sums over them itself."""
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    if mesh.ndim > 1:
        raise ConfigError(
            f"fsdp_comm: fully_shard got a mesh of {mesh.ndim} dimensions, and sums over replicas itself;"
            ' shard over one of them: fully_shard(model, mesh=mesh["shard"])'
        )
    shards, own = set(mesh.mesh.flatten().tolist()), dist.get_rank()
    both = sorted(shards & set(dist.get_process_group_ranks(group)) - {own})
    if both:
        raise ConfigError(
            f"fsdp_comm: rank {own} and {both} hold different shards and are both in the group of replicas;"
            ' give the group of the ranks with the same shard: replicas=mesh.get_group("replicate")'
        )


def _between_replicas(text: str) -> Reducer | TrainingStrategy:
    if spec.parse(text).name in registry.names("paceline.strategies"):
        return averaging(text)
    return codecs.make_reducer(text)


def _of_known_size(text: str, what: str) -> Codec:
    codec = codecs.make(text)
    if codec.is_sparse:
        raise ConfigError(
            f"fsdp_comm: {what}={text!r}: the size of a payload depends on the values; use one whose size"
            " does not: int8, int4, onebit, fp16 or bf16"
        )
    if what == "weights" and codec.keeps_residual:
        raise ConfigError(f"fsdp_comm: weights={text!r}: weights are not summed, error feedback has no use")
    return codec
