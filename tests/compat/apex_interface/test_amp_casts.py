"""`amp`'s decorators and registries cast arguments under O1 only; loss scales travel in Apex's own form."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from paceline.compat.apex import amp
from paceline.errors import ConfigError

LOW, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def off_afterwards() -> Iterator[None]:
    yield
    amp.initialize(nn.Linear(1, 1), enabled=False)


def seen(*args: Any, **kwargs: Any) -> list[torch.dtype]:
    return [a.dtype for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]


A, B, N = torch.ones(2), torch.ones(2).to(LOW), torch.ones(2, dtype=torch.int64)


def test_arguments_are_cast_once_amp_is_on() -> None:
    half, full, promoted = amp.half_function(seen), amp.float_function(seen), amp.promote_function(seen)
    assert half(A, B, N) == full(A, B, N) == promoted(A, B, N) == [FULL, LOW, torch.int64]
    amp.initialize(nn.Linear(1, 1), opt_level="O1")
    assert half(A, x=A, n=N) == [LOW, LOW, torch.int64]
    assert full(B, x=B, n=N) == [FULL, FULL, torch.int64]
    assert promoted(A, x=B, n=N) == [FULL, FULL, torch.int64]
    assert promoted(B, x=B) == [LOW, LOW]
    assert amp.half_function(lambda pair: seen(*pair))([A, (A,)][:1]) == [LOW]
    with pytest.raises(ConfigError, match="cast them yourself"):
        promoted(A, A.double())
    assert half.__name__ == "seen"


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_other_levels_leave_arguments_alone(level: str) -> None:
    amp.initialize(nn.Linear(1, 1), opt_level=level)
    assert amp.half_function(seen)(A) == [FULL]
    amp.initialize(nn.Linear(1, 1), opt_level="O2", patch_torch_functions=True)
    assert amp.half_function(seen)(A) == [LOW]


def test_gradients_flow_through_a_cast() -> None:
    amp.initialize(nn.Linear(1, 1))
    x = torch.ones(2, requires_grad=True)
    amp.half_function(lambda a: (3 * a).sum())(x).backward()
    assert x.grad.tolist() == [3.0, 3.0]
    assert x.grad.dtype == FULL


def test_registered_functions_are_replaced_when_amp_starts() -> None:
    module = types.SimpleNamespace(half=seen, full=seen, both=seen)
    amp.register_half_function(module, "half")
    amp.register_float_function(module, "full")
    amp.register_promote_function(module, "both")
    assert module.half(A) == [FULL]
    amp.initialize(nn.Linear(1, 1))
    assert (module.half(A), module.full(B), module.both(A, B)) == ([LOW], [FULL], [FULL, FULL])
    amp.initialize(nn.Linear(1, 1), enabled=False)
    assert module.half(A) == [FULL]
    for register in (amp.register_half_function, amp.register_float_function, amp.register_promote_function):
        with pytest.raises(ConfigError, match="missing"):
            register(module, "missing")


def test_casts_can_be_disabled_for_a_while() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.dtypes = [self.part(x).dtype]
            with amp.disable_casts():
                self.dtypes += [self.part(x).dtype, *half(x)]
            self.dtypes += [self.part(x).dtype, *half(x)]
            return x

    half = amp.half_function(seen)
    model = amp.initialize(Keeps(), opt_level="O1")
    model(A)
    assert model.dtypes == [LOW, FULL, FULL, LOW, LOW]
    with amp.disable_casts():
        model(A)
    assert model.dtypes[0] == FULL
    with pytest.raises(ZeroDivisionError), amp.disable_casts():
        raise ZeroDivisionError
    assert half(A) == [LOW]


def test_loss_scales_are_saved_as_apex_saves_them() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"cast_model_type": torch.float16, "num_losses": 2}
    amp.initialize(model, optimizer, **options)
    with amp.scale_loss(model(torch.ones(1, 2)).sum() / 16, optimizer, loss_id=1) as scaled:
        scaled.backward()
    optimizer.step()
    saved = amp.state_dict()
    assert saved == {
        "loss_scaler0": {"loss_scale": 65536.0, "unskipped": 0},
        "loss_scaler1": {"loss_scale": 65536.0, "unskipped": 1},
    }
    given = {"loss_scaler0": {"loss_scale": 128.0, "unskipped": 7}, "loss_scaler1": saved["loss_scaler1"]}
    amp.load_state_dict(given)
    assert amp.state_dict() == given
    with amp.scale_loss(torch.ones(()), [], loss_id=0) as scaled:
        assert scaled == 128
    assert amp.state_dict({"other": 1})["other"] == 1
    with pytest.raises(ConfigError, match="nonsense"):
        amp.load_state_dict({"nonsense": {}})
    with pytest.warns(UserWarning, match="1 loss scales"):
        amp.load_state_dict({"loss_scaler0": {"loss_scale": 2.0, "unskipped": 0}})


def test_master_parameters_are_those_of_the_optimizer() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert [id(p) for p in amp.master_params(optimizer)] == [id(p) for p in model.parameters()]
