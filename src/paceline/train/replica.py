"""One worker's model as flat buffers with views. The module stays the truth; the views are a convenience.

Parameters and gradients of one (dtype, device) lie in one buffer each, in reverse order of registration, so
that backward fills it from the front; every parameter starts at a multiple of 64 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.types import Communicator

_ALIGN_BYTES = 64
_FIRST_BUCKET_BYTES = 1 << 20
_OWN_REFERENCES = 3  # of a gradient's view: the list's, a local variable's, and that of the count itself


class GradientBucket:
    """Gradients that are sent at once: see `paceline.types.Bucket`.

    Args:
        index: Number of the bucket; buckets are sent in this order.
        gradient: 1-D slice of a flat gradient buffer, with the used-flags behind it in the last bucket.
        num_flags: How many elements at the end of `gradient` are used-flags; 0 in all buckets but the last.
        members: Indices into `FlatReplica.trained`.
    """

    def __init__(self, index: int, gradient: torch.Tensor, num_flags: int, members: list[int]) -> None:
        self.index = index
        self.gradient = gradient
        self.values = gradient[: gradient.numel() - num_flags]
        self.used_flags = gradient[gradient.numel() - num_flags :] if num_flags else None
        self.members = members
        self.missing = len(members)
        """Members whose gradients have not arrived in this backward pass."""


class FlatReplica:
    """The trained parameters of a module, laid out flat in memory of the communicator.

    Raises ConfigError for parameters that cannot be laid out: uninitialised (lazy), sparse or overlapping
    layouts, two Parameter objects that share memory.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        needs_gradients: bool,
        bucket_bytes: int,
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        self.late_states: list[tuple[str, dict[str, Any]]] = []
        """Classes and states of a checkpoint for optimizers that are not known yet."""
        self.names = {id(p): name for name, p in module.named_parameters()}  # tied ones appear once
        everything = list(module.parameters())
        self.frozen = [p for p in everything if not p.requires_grad]
        self.trained = [p for p in reversed(everything) if p.requires_grad]
        self.weight = 1.0 / comm.size
        """What this rank's gradients count; those of all ranks add up to 1 (`gradients/weights.py`)."""
        self.has_samples = True
        """False when this rank ran out of data and repeats a batch with weight 0."""
        self.parameters: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.buckets: list[GradientBucket] = []
        self.bucket_of: dict[int, GradientBucket] = {}
        self.used: torch.Tensor | None = None
        self._where: dict[int, tuple[int, int]] = {}  # parameter → (buffer, offset in its own elements)
        self._views: list[torch.Tensor] = []
        self._gradient_addresses: list[int] = []
        self.gradient_views: list[torch.Tensor] = []
        self._check()
        self._lay_out(comm, needs_gradients, bucket_bytes)

    @property
    def model_bytes(self) -> int:
        """Size of the flat parameter buffers, alignment included."""
        return sum(flat.nbytes for flat in self.parameters)

    def buffers(self) -> list[torch.Tensor]:
        """The module's buffers (BatchNorm statistics and the like), each once, in order.

        Complex ones are seen as real, of expanded ones what they repeat.
        """
        return [real(compact(b)) for b in {id(b): b for b in self.module.buffers()}.values()]

    def adopt(self) -> None:
        """Put parameters whose memory was replaced (`p.data = …`) back into the flat buffers, value kept."""
        for parameter, view in zip(self.trained, self._views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                self._check_layout(parameter, view)
                with torch.no_grad():
                    view.copy_(parameter)
                    parameter.data = view

    def place_of_gradient(self, index: int, gradient: torch.Tensor | None) -> torch.Tensor:
        """The view of the flat buffer where a gradient belongs; a new object where the loop has the old one.

        What was `grad` in an earlier step, and is still held by the loop, keeps its values in memory of its
        own. So does a `grad` whose memory was replaced (`p.grad.data = …`).

        Args:
            index: Of the parameter in `trained`.
            gradient: What is in its `grad` now.
        """
        view = self.gradient_views[index]
        if gradient is not None and (gradient.dtype, gradient.device) != (view.dtype, view.device):
            self._check_layout(self.trained[index], view)
        is_moved = view.data_ptr() != self._gradient_addresses[index]
        if not is_moved and (gradient is view or sys.getrefcount(view) <= _OWN_REFERENCES):
            return view
        if not is_moved:
            view.data = view.detach().clone()
        self.gradient_views[index] = self._gradient_view(index)
        return self.gradient_views[index]

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State tensors of the optimizers, in an order that all ranks share: (key, tensor)."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    for key in sorted(state):
                        value = state[key]
                        if isinstance(value, torch.Tensor):
                            is_counter = key == "step" or parameter.ndim > 0 or value.ndim > 0
                            yield key, real(value) if is_counter else real(value).view(-1)

    def name(self, parameter: torch.Tensor) -> str:
        """The parameter's name in the module, for messages."""
        return self.names.get(id(parameter), "a parameter that is not in the model")

    def _check(self) -> None:
        seen: dict[tuple[int, torch.device], torch.Tensor] = {}
        for p in [*self.trained, *self.frozen]:
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ConfigError(
                    f"parameter {self.name(p)} is not initialised yet (a lazy module): run one forward pass"
                    " before prepare()"
                )
            if p.layout is not torch.strided:
                raise ConfigError(f"parameter {self.name(p)} has layout {p.layout}; a dense one is expected")
            other = seen.setdefault((p.data_ptr(), p.device), p) if p.numel() else p
            if other is not p:
                raise ConfigError(
                    f"parameters {self.name(other)} and {self.name(p)} share memory but are two Parameter"
                    " objects; tie them by assigning the same Parameter to both modules"
                )

    def _lay_out(self, comm: Communicator, needs_gradients: bool, bucket_bytes: int) -> None:
        kinds = list(dict.fromkeys((p.dtype, p.device) for p in self.trained))
        where = self._where
        sizes = [0] * len(kinds)
        for i, p in enumerate(self.trained):
            kind = kinds.index((p.dtype, p.device))
            where[i] = (kind, sizes[kind])
            step = max(1, _ALIGN_BYTES // p.element_size())
            sizes[kind] += -(-p.numel() // step) * step
        self.parameters = [_allocate(comm, n, kind[0]) for n, kind in zip(sizes, kinds, strict=True)]
        for flat, (_, device) in zip(self.parameters, kinds, strict=True):
            if flat.device != device:
                raise ConfigError(
                    f"the model lies on {device}, this job communicates from {flat.device}:"
                    f" model.to({str(flat.device)!r}) before prepare()"
                )
        with torch.no_grad():
            for i, p in enumerate(self.trained):
                view = self._view(self.parameters[where[i][0]], where[i][1], p)
                view.copy_(p)
                p.data = view
                self._views.append(view)
        if needs_gradients and self.trained:
            self._lay_out_gradients(comm, where, bucket_bytes)

    def _lay_out_gradients(
        self, comm: Communicator, where: dict[int, tuple[int, int]], bucket_bytes: int
    ) -> None:
        plans = _plan_buckets(self.trained, where, bucket_bytes)
        last_kind = where[plans[-1][0]][0]
        tails = [len(self.trained) if kind == last_kind else 0 for kind in range(len(self.parameters))]
        whole = [
            comm.allocate(flat.numel() + tail, flat.dtype)
            for tail, flat in zip(tails, self.parameters, strict=True)
        ]
        self.gradients = [flat[: own.numel()] for flat, own in zip(whole, self.parameters, strict=True)]
        self.used = whole[last_kind][self.parameters[last_kind].numel() :]
        self.gradient_views = [self._first_gradient(i, p.grad) for i, p in enumerate(self.trained)]
        self._gradient_addresses = [view.data_ptr() for view in self.gradient_views]
        for index, members in enumerate(plans):
            kind = where[members[0]][0]
            scale = 1 + self.trained[members[0]].is_complex()
            start = where[members[0]][1] * scale
            following = [
                where[j][1] * scale for j in range(members[-1] + 1, len(self.trained)) if where[j][0] == kind
            ]
            stop = following[0] if following else whole[kind].numel()
            num_flags = 0 if following else tails[kind]
            bucket = GradientBucket(index, whole[kind][start:stop], num_flags, members)
            self.buckets.append(bucket)
            self.bucket_of.update(dict.fromkeys(members, bucket))

    def _gradient_view(self, index: int) -> torch.Tensor:
        kind, offset = self._where[index]
        return self._view(self.gradients[kind], offset, self.trained[index])

    def _first_gradient(self, index: int, gradient: torch.Tensor | None) -> torch.Tensor:
        """The view for a parameter; a `grad` that there is already moves there and stays the same object."""
        view = self._gradient_view(index)
        kind = (view.dtype, view.device, view.layout)
        if (
            gradient is None
            or gradient.requires_grad
            or kind
            != (
                gradient.dtype,
                gradient.device,
                gradient.layout,
            )
        ):
            return view
        view.copy_(gradient)
        gradient.data = view
        return gradient

    def flag_used(self, unweighted: float) -> None:
        """Write into the last bucket which parameters have a gradient on this rank.

        Args:
            unweighted: The flag where this rank's weight is 0.
        """
        assert self.used is not None
        weight = self.weight or unweighted
        flags = [0.0 if p.grad is None else weight for p in self.trained]
        if all(flags):
            self.used.fill_(weight)
        else:
            self.used.copy_(torch.tensor(flags, dtype=self.used.dtype))

    def return_unused(self) -> None:
        """Give parameters their reduced gradients; None to those that no rank used."""
        assert self.used is not None
        if bool((self.used > 0).all()):
            for parameter, view in zip(self.trained, self.gradient_views, strict=True):
                if parameter.grad is not view:
                    parameter.grad = view
            return
        for parameter, view, flag in zip(self.trained, self.gradient_views, self.used.tolist(), strict=True):
            parameter.grad = view if flag > 0 else None

    def _view(self, flat: torch.Tensor, offset: int, parameter: torch.Tensor) -> torch.Tensor:
        """A view of `flat` with the parameter's own shape and strides (channels_last stays so)."""
        if not _is_dense(parameter):
            raise ConfigError(
                f"parameter {self.name(parameter)} has shape {tuple(parameter.shape)} and strides"
                f" {parameter.stride()}: its elements overlap or leave gaps; make it contiguous"
            )
        if parameter.is_complex():
            flat = torch.view_as_complex(flat.view(-1, 2))
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset() + offset)

    def _check_layout(self, parameter: torch.Tensor, view: torch.Tensor) -> None:
        if (parameter.shape, parameter.dtype, parameter.device) != (view.shape, view.dtype, view.device):
            raise ConfigError(
                f"parameter {self.name(parameter)} was {tuple(view.shape)} {view.dtype} on {view.device}"
                f" when prepare() saw it and is {tuple(parameter.shape)} {parameter.dtype} on"
                f" {parameter.device} now; change the model before prepare()"
            )


def _plan_buckets(
    trained: list[nn.Parameter], where: dict[int, tuple[int, int]], bucket_bytes: int
) -> list[list[int]]:
    """Cut each buffer into runs of parameters, ordered by when backward is expected to complete them."""
    plans: list[list[int]] = []
    open_runs: dict[int, list[int]] = {}
    for i in range(len(trained)):
        run = open_runs.setdefault(where[i][0], [])
        run.append(i)
        limit = min(bucket_bytes, _FIRST_BUCKET_BYTES) if not plans else bucket_bytes
        if sum(trained[j].nbytes for j in run) >= limit:
            plans.append(open_runs.pop(where[i][0]))
    plans.extend(open_runs.values())
    return sorted(plans, key=lambda members: members[-1])


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _allocate(comm: Communicator, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """1-D; two real elements for each complex one, since methods and codecs know real numbers."""
    if dtype.is_complex:
        return comm.allocate(2 * numel, dtype.to_real())
    return comm.allocate(numel, dtype)


def real(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers in the same memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """An expanded tensor without its repetitions, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
