"""Apex's optimizers against their published rules, written again in a few lines each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.compat.apex import optimizers
from paceline.errors import ConfigError

STEPS = 4


def adam(p: Tensor, g: Tensor, s: dict, t: int, *, l2: bool, correct: bool, decay: float) -> Tensor:
    b1, b2, lr, eps = 0.8, 0.95, 0.1, 1e-3
    if l2:
        g = g + decay * p
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    c1, c2 = (1 - b1**t, 1 - b2**t) if correct else (1, 1)
    update = (s["m"] / c1) / ((s["v"] / c2) ** 0.5 + eps)
    return p - lr * (update if l2 else update + decay * p)


def lamb(
    p: Tensor, g: Tensor, s: dict, t: int, *, clip: float, decay: float, nv: bool, average: bool, l2: bool
) -> Tensor:
    b1, b2, lr, eps = 0.8, 0.95, 0.1, 1e-3
    g = g / clip + (decay * p if l2 else 0)
    s["m"] = b1 * s.get("m", 0) + ((1 - b1) if average else 1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    update = (s["m"] / (1 - b1**t)) / ((s["v"] / (1 - b2**t)) ** 0.5 + eps)
    if not l2:
        update = update + decay * p
    ratio = p.norm() / update.norm() if (nv or decay) and p.norm() > 0 and update.norm() > 0 else 1.0
    return p - lr * ratio * update


def novograd(
    p: Tensor, g: Tensor, s: dict, t: int, *, inside: bool, norm: int, zero: bool, decay: float
) -> Tensor:
    b1, b2, lr, eps = 0.8, 0.95, 0.1, 1e-3
    n = g.norm() if norm == 2 else g.abs().max()
    old = s.get("n", torch.tensor(0.0) if zero else n)
    s["n"] = (b2 * old**2 + (1 - b2) * n**2) ** 0.5 if norm == 2 else b2 * old + (1 - b2) * n
    denominator = s["n"] / (1 - b2**t) ** 0.5 + eps
    if inside:
        s["m"] = b1 * s.get("m", 0) + (1 - b1) * (g / denominator + decay * p)
        return p - lr * s["m"] / (1 - b1**t)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    return p - lr * (s["m"] / (1 - b1**t) / denominator + decay * p)


def adagrad(p: Tensor, g: Tensor, s: dict, t: int, *, w_mode: bool, decay: float) -> Tensor:
    if not w_mode:
        g = g + decay * p
    s["h"] = s.get("h", 0) + g**2
    update = g / (s["h"] ** 0.5 + 1e-10)
    return p - 0.1 * (update + (decay * p if w_mode else 0))


def sgd(p: Tensor, g: Tensor, s: dict, t: int, *, after: bool, nesterov: bool, damp: float) -> Tensor:
    if not after:
        g = g + 0.2 * p
    s["m"] = g if t == 1 else 0.7 * s["m"] + (1 - damp) * g
    g = g + 0.7 * s["m"] if nesterov else s["m"]
    return p - 0.1 * (g + 0.2 * p if after else g)


SHARED = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}
CASES: dict[str, tuple[Callable[..., Any], dict, Callable[..., Tensor], dict]] = {}
for l2 in (False, True):
    for correct in (False, True):
        CASES[f"adam l2={l2} correct={correct}"] = (
            optimizers.FusedAdam,
            {**SHARED, "adam_w_mode": not l2, "bias_correction": correct, "weight_decay": 0.2},
            adam,
            {"l2": l2, "correct": correct, "decay": 0.2},
        )
    for nv, decay in ((False, 0.0), (True, 0.0), (False, 0.2)):
        CASES[f"lamb l2={l2} nv={nv} decay={decay}"] = (
            optimizers.FusedLAMB,
            {**SHARED, "adam_w_mode": not l2, "use_nvlamb": nv, "weight_decay": decay, "grad_averaging": nv},
            lamb,
            {"l2": l2, "nv": nv, "decay": decay, "average": nv},
        )
    for norm in (0, 2):
        CASES[f"novograd inside={l2} norm={norm}"] = (
            optimizers.FusedNovoGrad,
            {**SHARED, "reg_inside_moment": l2, "norm_type": norm, "init_zero": not l2, "weight_decay": 0.2},
            novograd,
            {"inside": l2, "norm": norm, "zero": not l2, "decay": 0.2},
        )
    CASES[f"adagrad w={l2}"] = (
        optimizers.FusedAdagrad,
        {"lr": 0.1, "weight_decay": 0.2, "adagrad_w_mode": l2},
        adagrad,
        {"w_mode": l2, "decay": 0.2},
    )
    for nesterov in (False, True):
        damp = 0.0 if nesterov else 0.3
        CASES[f"sgd after={l2} nesterov={nesterov}"] = (
            optimizers.FusedSGD,
            {
                "lr": 0.1,
                "momentum": 0.7,
                "weight_decay": 0.2,
                "dampening": damp,
                "nesterov": nesterov,
                "wd_after_momentum": l2,
            },
            sgd,
            {"after": l2, "nesterov": nesterov, "damp": damp},
        )


def values(count: int = STEPS) -> tuple[list[Tensor], list[list[Tensor]]]:
    torch.manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2)]
    start = [torch.randn(s) for s in shapes]
    start[2].zero_()  # a norm of zero
    return start, [[torch.randn(s) for s in shapes] for _ in range(count)]


def common_clip(gradients: list[Tensor]) -> float:
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    return float(norm) if norm > 1 else 1.0


@pytest.mark.parametrize("case", CASES)
def test_the_rule_is_the_published_one(case: str) -> None:
    make, options, rule, reference = CASES[case]
    start, gradients = values()
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = make(ours, **options)
    theirs, states = [p.clone() for p in start], [{} for _ in start]
    for t, step in enumerate(gradients, 1):
        step = [g * (0.01 if t == STEPS else 1) for g in step]  # at last a norm that is not clipped
        for p, g in zip(ours, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        given = {**reference, "clip": common_clip(step)} if rule is lamb else reference
        theirs = [rule(p, g, s, t, **given) for p, g, s in zip(theirs, step, states, strict=True)]
        for p, q, g in zip(ours, theirs, step, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)
            assert torch.equal(p.grad, g), "gradients are left as they are"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_updated_in_float32_and_rounded_once(case: str, dtype: torch.dtype) -> None:
    make, options, rule, reference = CASES[case]
    start, gradients = values(1)
    ours = [torch.nn.Parameter(p.to(dtype)) for p in start]
    optimizer = make(ours, **options)
    for p, g in zip(ours, gradients[0], strict=True):
        p.grad = g.to(dtype)
    given = {**reference, "clip": common_clip([p.grad.float() for p in ours])} if rule is lamb else reference
    theirs = [rule(p.detach().float(), p.grad.float(), {}, 1, **given).to(dtype) for p in ours]
    optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_continues_bit_for_bit(case: str, dtype: torch.dtype) -> None:
    make, options, _, _ = CASES[case]
    start, gradients = values()

    def train(parameters: list[Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for t in steps:
            for p, g in zip(parameters, gradients[t], strict=True):
                p.grad = g.to(dtype)
            optimizer.step()

    ours = [torch.nn.Parameter(p.to(dtype)) for p in start]
    optimizer = make(ours, **options)
    train(ours, optimizer, range(2))
    again = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    resumed = make(again, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(ours, optimizer, range(2, STEPS))
    train(again, resumed, range(2, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(ours, again, strict=True))


def test_adam_and_sgd_equal_torchs() -> None:
    start, gradients = values()
    pairs = [
        (optimizers.FusedAdam, {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        (
            optimizers.FusedAdam,
            {"adam_w_mode": False, "weight_decay": 0.1},
            torch.optim.Adam,
            {"weight_decay": 0.1},
        ),
        (optimizers.FusedSGD, {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (optimizers.FusedSGD, {"lr": 0.1}, torch.optim.SGD, {"lr": 0.1}),
        (optimizers.FusedAdagrad, {"lr": 0.1}, torch.optim.Adagrad, {"lr": 0.1}),
    ]
    for make, options, reference, others in pairs:
        ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
        both = (ours, make(ours, **options)), (theirs, reference(theirs, **others))
        for step in gradients:
            for parameters, optimizer in both:
                for p, g in zip(parameters, step, strict=True):
                    p.grad = g.clone()
                optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def parameter(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    p.grad = torch.ones(2, dtype=dtype)
    return p


REFUSED = {
    "amsgrad": lambda p: optimizers.FusedAdam([p], amsgrad=True),
    "lamb amsgrad": lambda p: optimizers.FusedLAMB([p], amsgrad=True),
    "capturable": lambda p: optimizers.FusedAdam([p], capturable=True),
    "master_weights": lambda p: optimizers.FusedAdam([p], master_weights=True),
    "old step": lambda p: optimizers.FusedAdam([p]).step(scale=2.0),
    "no clipping": lambda p: optimizers.FusedLAMB([p], max_grad_norm=0.0),
    "norm": lambda p: optimizers.FusedNovoGrad([p], norm_type=1),
    "no lr": lambda p: optimizers.FusedSGD([p]),
    "negative": lambda p: optimizers.FusedSGD([p], lr=-1.0),
    "nesterov": lambda p: optimizers.FusedSGD([p], lr=1.0, nesterov=True),
    "mixed lamb": lambda p: optimizers.FusedMixedPrecisionLamb([p]),
    "float64": lambda p: optimizers.FusedAdam([parameter(torch.float64)]).step(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_apex_does_not_do_either_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"use|expected|takes"):
        REFUSED[name](parameter())


def test_gradients_are_cleared_as_asked_and_a_closure_is_called() -> None:
    for none in (True, False):
        p = parameter()
        optimizer = optimizers.FusedAdagrad([p], set_grad_none=none)

        def closure(p: Tensor = p, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = p.square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 2.0
        optimizer.zero_grad()
        assert (p.grad is None) == none


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="SparseAdam"):
        optimizers.FusedAdam(table.parameters()).step()


def test_a_scaler_skips_steps_that_overflowed_and_a_schedule_is_followed() -> None:
    p = parameter()
    optimizer = optimizers.FusedLAMB([p], lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    scaler = torch.amp.GradScaler("cpu", 4.0)
    scaler.scale(p.sum() * float("inf")).backward()
    before = p.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(p, before)
    p.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    assert not torch.equal(p, before)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
