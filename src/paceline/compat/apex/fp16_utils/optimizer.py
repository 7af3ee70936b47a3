"""`FP16_Optimizer`: any optimizer on float32 masters of a model's 16-bit parameters, with loss scaling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from paceline.compat.apex.fp16_utils.loss_scaler import DynamicLossScaler, LossScaler
from paceline.compat.apex.fp16_utils.masters import (
    master_of,
    master_params_to_model_params,
    model_grads_to_master_grads,
)
from paceline.errors import ConfigError

_HALF = (torch.float16, torch.bfloat16)


class FP16_Optimizer:
    """Gives an optimizer float32 masters of its 16-bit parameters; `backward(loss)` is for `loss.backward()`.

    A step whose gradients overflowed is skipped under a dynamic scale. With several workers, gradients must
    be reduced in `backward`, as DistributedDataParallel does: then all skip together.

    Args:
        init_optimizer: The optimizer, which is changed; parameters of float16, bfloat16 and float32.
        static_loss_scale: A scale that stays; default 1.
        dynamic_loss_scale: Use `DynamicLossScaler`; default no.
        dynamic_loss_args: Its arguments.
        verbose: Print skipped steps; default yes.

    Raises:
        ConfigError: A parameter of another dtype.
    """

    def __init__(
        self,
        init_optimizer: torch.optim.Optimizer,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
        dynamic_loss_args: Mapping[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        self.optimizer, self.verbose = init_optimizer, verbose
        self.dynamic_loss_scale = dynamic_loss_scale
        self.loss_scaler = (
            DynamicLossScaler(**(dynamic_loss_args or {}))
            if dynamic_loss_scale
            else LossScaler(static_loss_scale)
        )
        self.fp16_groups: list[list[Tensor]] = []
        self.fp32_from_fp16_groups: list[list[Tensor]] = []
        self.fp32_from_fp32_groups: list[list[Tensor]] = []
        for group in init_optimizer.param_groups:
            self._take(group)
        # Casts what the optimizer holds already to the masters' dtype.
        init_optimizer.load_state_dict(init_optimizer.state_dict())
        self.overflow = False

    def _take(self, group: dict[str, Any]) -> None:
        half: list[Tensor] = []
        masters: list[Tensor] = []
        full: list[Tensor] = []
        for i, parameter in enumerate(group["params"]):
            if not parameter.requires_grad:
                continue
            if parameter.dtype in _HALF:
                master = master_of(parameter)
                group["params"][i] = master
                if parameter in self.optimizer.state:
                    self.optimizer.state[master] = self.optimizer.state.pop(parameter)
                half.append(parameter)
                masters.append(master)
            elif parameter.dtype == torch.float32:
                full.append(parameter)
            else:
                raise ConfigError(
                    f"FP16_Optimizer: parameters of float16, bfloat16 or float32 expected, got "
                    f"{parameter.dtype}"
                )
        self.fp16_groups.append(half)
        self.fp32_from_fp16_groups.append(masters)
        self.fp32_from_fp32_groups.append(full)

    def __getstate__(self) -> NoReturn:
        raise ConfigError(
            "FP16_Optimizer: save what state_dict() returns, and load it with load_state_dict()"
        )

    def zero_grad(self, set_grads_to_None: bool = False) -> None:
        """Clear the gradients of model and masters: zeros, or None if asked."""
        self.optimizer.zero_grad(set_to_none=set_grads_to_None)
        for group in self.fp16_groups:
            for parameter in group:
                if set_grads_to_None:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.detach_().zero_()

    def backward(self, loss: Tensor, update_master_grads: bool = True, retain_graph: bool = False) -> None:
        """Run backward of the scaled loss, and give the masters their gradients.

        Args:
            loss: A scalar; it is scaled in float32.
            update_master_grads: False in all but the last of several losses; default yes.
            retain_graph: As in `Tensor.backward`.
        """
        self.loss_scaler.backward(loss.float(), retain_graph=retain_graph)
        if update_master_grads:
            self.update_master_grads()

    def update_master_grads(self) -> None:
        """Copy the model's gradients to the masters, without the scale; not if they overflowed."""
        models = [p for group in (*self.fp16_groups, *self.fp32_from_fp32_groups) for p in group]
        self.overflow = self.loss_scaler.has_overflow(models)
        if self.overflow:
            return
        for model, masters in zip(self.fp16_groups, self.fp32_from_fp16_groups, strict=True):
            model_grads_to_master_grads(model, masters)
        if self.loss_scale != 1.0:
            for gradient in self._master_gradients():
                gradient.mul_(1.0 / self.loss_scale)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # the closure's own
        """Update the masters, then the model; a step whose gradients overflowed is skipped.

        Args:
            closure: Clears gradients, calls `backward(loss)` of this object and returns the loss; only with a
                scale that stays.

        Raises:
            ConfigError: A closure with a dynamic scale.
        """
        if closure is not None and self.dynamic_loss_scale:
            raise ConfigError("FP16_Optimizer.step(closure): use a static loss scale, or no closure")
        scale = self.loss_scale
        self.loss_scaler.update_scale(self.overflow)
        if self.overflow:
            if self.verbose:
                print(
                    f"OVERFLOW! Skipping step. Attempted loss scale: {scale}, reducing to {self.loss_scale}"
                )
            return None
        if closure is None:
            result: Any = self.optimizer.step()
        else:
            result = self._step_with(closure)
        self._update_model()
        return result

    def _step_with(self, closure: Callable[[], Any]) -> Any:
        is_first_call = True

        def fresh() -> Any:
            nonlocal is_first_call
            if not is_first_call:  # the optimizer has moved the masters
                self._update_model()
            is_first_call = False
            return closure()

        return self.optimizer.step(fresh)

    def _update_model(self) -> None:
        for model, masters in zip(self.fp16_groups, self.fp32_from_fp16_groups, strict=True):
            master_params_to_model_params(model, masters)

    def _master_gradients(self) -> list[Tensor]:
        return [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]

    def clip_master_grads(self, max_norm: float, norm_type: float = 2) -> Tensor | float:
        """Clip the masters' gradients; returns their norm before, or −1 if they overflowed."""
        if self.overflow:
            return -1
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def inspect_master_grad_data(self) -> list[list[Tensor | None]] | None:
        """Return the masters' gradients by group, None if the last ones overflowed."""
        if self.overflow:
            return None
        return [
            [None if p.grad is None else p.grad.data for p in group["params"]]
            for group in self.optimizer.param_groups
        ]

    @property
    def loss_scale(self) -> float:
        """The scale of the next loss; it can be set."""
        return self.loss_scaler.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self.loss_scaler.cur_scale = value

    @property
    def state(self) -> Any:
        """The optimizer's own."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's own, with the masters; for instance to change the learning rate."""
        return self.optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        """Return loss scale, masters and the optimizer's state, as plain values and tensors."""
        return {
            "loss_scaler": dict(vars(self.loss_scaler)),
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "overflow": self.overflow,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_from_fp16": [[p.detach() for p in group] for group in self.fp32_from_fp16_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; the model loads its own parameters."""
        if bool(state_dict["dynamic_loss_scale"]) != self.dynamic_loss_scale:
            raise ConfigError(
                f"FP16_Optimizer: a checkpoint with dynamic_loss_scale={self.dynamic_loss_scale} expected, "
                f"got {state_dict['dynamic_loss_scale']}; make the optimizer as the saved one was made"
            )
        vars(self.loss_scaler).update(copy.deepcopy(state_dict["loss_scaler"]))
        self.overflow = bool(state_dict["overflow"])
        self.optimizer.load_state_dict(state_dict["optimizer_state_dict"])
        for group, saved in zip(self.fp32_from_fp16_groups, state_dict["fp32_from_fp16"], strict=True):
            for master, value in zip(group, saved, strict=True):
                master.copy_(value)
