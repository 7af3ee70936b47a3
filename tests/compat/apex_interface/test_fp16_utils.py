"""Apex's `fp16_utils`: converted models, float32 masters, and loss scales that skip steps."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch import nn

from paceline.compat.apex import fp16_utils as f
from paceline.errors import ConfigError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False))


def dtypes(module: nn.Module) -> list[torch.dtype]:
    return [p.dtype for p in module.parameters()]


def test_batch_normalisation_with_a_weight_stays_float32() -> None:
    half, full = torch.float16, torch.float32
    expected = [half, half, full, full, half, half]
    model = f.network_to_half(network())
    assert isinstance(model[0], f.tofp16)
    assert dtypes(model) == expected
    assert model(torch.randn(5, 4)).dtype == half
    for dtype in (half, torch.bfloat16):
        converted = f.convert_network(network(), dtype)
        assert dtypes(converted) == [dtype if d is half else d for d in expected]
        assert converted[1].running_mean.dtype == full
        assert converted[3].running_mean.dtype == dtype
        assert converted[3].num_batches_tracked.dtype == torch.int64
    assert f.FP16Model(network())(torch.randn(5, 4)).dtype == half
    whole = f.BN_convert_float(network().half())
    assert dtypes(whole) == expected


def test_gradients_are_converted_with_their_parameters() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    f.convert_network(model, torch.bfloat16)
    assert model.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("flat", [False, True])
def test_masters_get_gradients_and_give_values(flat: bool) -> None:
    model = nn.Linear(3, 2).bfloat16()
    model_params, masters = f.prep_param_lists(model, flat_master=flat)
    assert [m.dtype for m in masters] == [torch.float32] * len(masters)
    assert len(masters) == (1 if flat else 2)
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer = torch.optim.SGD(masters, lr=1 / 1024)
    start = [p.detach().float() for p in model_params]
    for _ in range(8):  # a single step is too small for bfloat16
        f.model_grads_to_master_grads(model_params, masters, flat_master=flat)
        optimizer.step()
        f.master_params_to_model_params(model_params, masters, flat_master=flat)
    for p, q in zip(model_params, start, strict=True):
        assert torch.equal(p, (q - 8 / 1024).bfloat16())


def test_a_parameter_without_gradient_leaves_its_master_without_one() -> None:
    model_params, masters = f.prep_param_lists(nn.Linear(3, 2))
    masters[0].grad = torch.ones_like(masters[0])
    f.model_grads_to_master_grads(model_params, masters)
    assert masters[0].grad is None
    model_params, masters = f.prep_param_lists(nn.Linear(3, 2), flat_master=True)
    with pytest.raises(ConfigError, match="flat_master=False"):
        f.model_grads_to_master_grads(model_params, masters, flat_master=True)
    with pytest.raises(ConfigError, match="flat_master=False"):
        f.prep_param_lists(f.convert_network(network(), torch.bfloat16), flat_master=True)


def test_the_dynamic_scale_falls_on_overflow_and_rises_after_a_window() -> None:
    scaler = f.DynamicLossScaler(init_scale=8.0, scale_factor=2.0, scale_window=3)
    scales = []
    for overflow in (True, False, False, False, False, False, False, True):
        scaler.update_scale(overflow)
        scales.append(scaler.loss_scale)
    assert scales == [4, 4, 4, 8, 8, 8, 16, 8]
    scaler.cur_scale = 1.5
    scaler.update_scale(True)
    assert scaler.loss_scale == 1
    assert f.DynamicLossScaler().loss_scale == 2**32
    p = nn.Parameter(torch.ones(2))
    for value, expected in ((1.0, False), (float("inf"), True), (float("nan"), True)):
        p.grad = torch.tensor([1.0, value])
        assert scaler.has_overflow([p]) == expected
        assert not f.LossScaler(4).has_overflow([p])
    assert f.LossScaler(4).scale_gradient(None, (torch.ones(1),), None)[0].item() == 4


def make(dtype: torch.dtype = torch.bfloat16, **options: object) -> tuple[nn.Module, f.FP16_Optimizer]:
    torch.manual_seed(0)
    model = f.convert_network(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), dtype)
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, f.FP16_Optimizer(inner, verbose=False, **options)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    return model[1](model[0](x.to(model[0].weight.dtype)).float()).exp().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_training_equals_masters_by_hand(dtype: torch.dtype, scale: float) -> None:
    model, optimizer = make(dtype, static_loss_scale=scale)
    other, _ = make(dtype)
    params, masters = f.prep_param_lists(other)
    before = other[0].weight.detach().clone()
    inner = torch.optim.SGD(masters, lr=0.01, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        optimizer.backward(loss_of(model, step))
        optimizer.step()
        other.zero_grad()
        (loss_of(other, step) * scale).backward()
        f.model_grads_to_master_grads(params, masters)
        for m in masters:
            m.grad /= scale
        inner.step()
        f.master_params_to_model_params(params, masters)
    assert not torch.equal(before, other[0].weight)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_overflow_skips_the_step_and_lowers_the_scale(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = make(torch.float16, dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 16.0})
    optimizer.verbose = True
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.backward(loss_of(model, 0) * 1e30)
    assert optimizer.overflow
    assert optimizer.clip_master_grads(1.0) == -1
    assert optimizer.inspect_master_grad_data() is None
    assert optimizer.step() is None
    assert optimizer.loss_scale == 8
    assert "OVERFLOW" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad(set_grads_to_None=True)
    optimizer.backward(loss_of(model, 0))
    norm = optimizer.clip_master_grads(1e-3)
    clipped = torch.cat([g.flatten() for g in optimizer.inspect_master_grad_data()[0]])
    assert norm > 1e-3
    assert clipped.norm() == pytest.approx(1e-3, rel=1e-3)
    optimizer.step()
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_several_losses_and_a_closure() -> None:
    model, optimizer = make(static_loss_scale=4.0)
    optimizer.backward(loss_of(model, 0), update_master_grads=False)
    optimizer.backward(loss_of(model, 1), update_master_grads=False)
    optimizer.update_master_grads()
    once = [g.clone() for g in optimizer.inspect_master_grad_data()[0]]
    optimizer.zero_grad(set_grads_to_None=True)
    optimizer.backward(loss_of(model, 0) + loss_of(model, 1))
    for a, b in zip(once, optimizer.inspect_master_grad_data()[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        optimizer.backward(loss)
        return loss

    before = model[0].weight.detach().clone()
    optimizer.loss_scale = 2.0
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(before, model[0].weight)
    _, dynamic = make(dynamic_loss_scale=True)
    with pytest.raises(ConfigError, match="static"):
        dynamic.step(closure)


def test_a_checkpoint_continues_bit_for_bit_and_loads_as_plain_values() -> None:
    options = {"dynamic_loss_scale": True, "dynamic_loss_args": {"init_scale": 16.0, "scale_window": 2}}

    def train(model: nn.Module, optimizer: f.FP16_Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            optimizer.backward(loss_of(model, step))
            optimizer.step()

    model, optimizer = make(**options)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = make(**options)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert optimizer.loss_scale == resumed.loss_scale > 16
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match="dynamic_loss_scale"):
        make()[1].load_state_dict(saved["optimizer"])
    with pytest.raises(ConfigError, match="state_dict"):
        pickle.dumps(optimizer)


def test_other_dtypes_are_refused_and_small_functions_work() -> None:
    with pytest.raises(ConfigError, match="float64"):
        f.FP16_Optimizer(torch.optim.SGD([nn.Parameter(torch.ones(1).double())], lr=1.0))
    assert f.to_python_float(torch.tensor([2.5])) == 2.5
    assert f.to_python_float([3.0]) == 3.0
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    assert f.clip_grad_norm([p], 1.0).item() == 2.0
