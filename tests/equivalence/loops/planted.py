"""Faults that the package once had, planted again: the generator of loops must find each.

    python tests/equivalence/loops/planted.py --limit 500

tells after how many loops each was found, and in which one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # also as a script

from choices import Choices, draw, told  # noqa: E402
from test_loops import difference  # noqa: E402

from paceline.codecs.reducers import reducer  # noqa: E402
from paceline.errors import ConfigError  # noqa: E402
from paceline.strategies.base.strategy import TrainingStrategy  # noqa: E402
from paceline.train import evaluate, joining, preparation, random_state, replica  # noqa: E402
from paceline.train.attachment import Attachment  # noqa: E402
from paceline.train.calls.ranks import RankCalls  # noqa: E402
from paceline.train.calls.turns import Turns  # noqa: E402
from paceline.train.data import evaluation, map_loader, shard, streams  # noqa: E402
from paceline.train.data.batch_sizes import Measured  # noqa: E402
from paceline.train.data.following import Loaders  # noqa: E402
from paceline.train.data.loader import LoaderPass, ShardedLoader  # noqa: E402
from paceline.train.gradients.later_hooks import LaterHooks  # noqa: E402
from paceline.train.gradients.weights import GradientWeights  # noqa: E402
from paceline.train.job import Job  # noqa: E402
from paceline.train.modules import low_precision, sync_batch_norm  # noqa: E402
from paceline.train.modules.hooks import ModuleHook  # noqa: E402
from paceline.train.modules.low_precision import LowPrecisionForward  # noqa: E402
from paceline.train.optimizer_steps import OptimizerSteps  # noqa: E402
from paceline.train.replica import FlatReplica  # noqa: E402
from paceline.train.saving import checkpoint, persistence  # noqa: E402

RECORDED = Path(__file__).with_name("planted.json")
"""The loop that found each fault first."""
Fault = Callable[[], Any]
"""A context manager in which the fault is there."""


def instead(owner: Any, name: str, value: Any) -> Fault:
    """`owner.name` is something else."""
    return lambda: mock.patch.object(owner, name, value, create=True)


def after(owner: Any, name: str, change: Callable[[Any, Any], Any]) -> Fault:
    """The method does what it does, and then `change(self, its result)`; what that returns is the result."""
    original = getattr(owner, name)

    def method(self: Any, *arguments: Any, **named: Any) -> Any:
        return change(self, original(self, *arguments, **named))

    return instead(owner, name, method)


def nothing(*_: Any, **__: Any) -> None:
    """Does nothing."""


@contextlib.contextmanager
def seeds_differ_before_prepare() -> Iterator[None]:
    original = joining.random_state.seed_worker

    def seed_worker(seed: Any, rank: int) -> None:
        own = joining.current.provided().rank
        original(seed, own)

    with mock.patch.object(joining.random_state, "seed_worker", seed_worker):
        yield


@contextlib.contextmanager
def second_optimizers_pass() -> Iterator[None]:
    original = OptimizerSteps._find

    def find(self: Any, optimizer: Any) -> Any:
        return None if self._replica.optimizers else original(self, optimizer)

    with mock.patch.object(OptimizerSteps, "_find", find):
        yield


@contextlib.contextmanager
def wrappers_are_strangers() -> Iterator[None]:
    original = OptimizerSteps._find

    def find(self: Any, optimizer: Any) -> Any:
        if self._replica.optimizers:
            raise ConfigError("this optimizer was not given")
        return original(self, optimizer)

    with mock.patch.object(OptimizerSteps, "_find", find):
        yield


@contextlib.contextmanager
def scale_leaves_through_inputs() -> Iterator[None]:
    original = low_precision.pytree.tree_map

    def tree_map(function: Any, tree: Any) -> Any:
        return tree if getattr(function, "__name__", "") == "leaves" else original(function, tree)

    with mock.patch.object(low_precision.pytree, "tree_map", tree_map):
        yield


def mean_as_a_sum_of_shares(tensors: Any, comm: Any) -> None:
    for tensor in tensors:
        if tensor.is_floating_point():
            part = tensor.clone() / comm.size
            comm.all_reduce(part).wait()
            tensor.copy_(part)


def share_of_the_sampler(loader: Any, comm: Any, batch_size: Any) -> Any:
    return enumerate(loader)


def counts_twice(self: Any, optimizer: Any) -> None:
    own = self._own(optimizer)
    if own is not None:
        self._check(own)
        self._before(own)


def ends_each(self: Any, optimizer: Any) -> None:
    own = self._aliases.get(id(optimizer), optimizer)
    if id(own) in self._checked:
        self._after(own)


FAULTS: dict[str, Fault] = {
    "models share a message channel": instead(TrainingStrategy, "channel", property(lambda self: self.name)),
    "an optimizer made afterwards is not seen": instead(OptimizerSteps, "_find", nothing),
    "a second optimizer is not refused": second_optimizers_pass,
    "new and unfrozen parameters are not refused": instead(OptimizerSteps, "_check", nothing),
    "a subclass of an optimizer counts twice": lambda: _both(
        instead(OptimizerSteps, "begins", counts_twice), instead(OptimizerSteps, "ended", ends_each)
    ),
    "seeds differ before prepare": seeds_differ_before_prepare,
    "evaluation sees a sampler's share": instead(evaluation, "_of_loader", share_of_the_sampler),
    "own data is divided again in evaluation": instead(evaluation, "OwnLoader", type("Other", (), {})),
    "evaluation leaves buffers as it made them": instead(evaluate, "compact", lambda b: b.clone()),
    "loss scale leaves through inputs": scale_leaves_through_inputs,
    "a copy computes with the original's weights": instead(
        LowPrecisionForward, "__deepcopy__", lambda self, memo: self
    ),
    "all micro-batches count alike": instead(
        GradientWeights, "_scaled_share", lambda self: 1.0 if self._own else 0.0
    ),
    "an empty share counts": after(GradientWeights, "set", lambda self, _: _alike(self)),
    "only the model prepared last learns batch sizes": after(
        Loaders, "_following", lambda self, found: found[-1:]
    ),
    "a look ahead counts": after(LoaderPass, "__init__", lambda self, _: setattr(self, "is_counted", True)),
    "two iterators at once": after(Loaders, "_progress", lambda self, _: object()),
    "batch sizes are guessed": instead(Measured, "__call__", lambda self, batch: _first_length(batch)),
    "a stream's ends are not divided": instead(streams, "busy_ranks", lambda count, size: size - 1),
    "other data is not noticed": instead(shard, "check_same", nothing),
    "gaps between tensors are zeroed too far": instead(
        reducer, "zero_gaps", lambda flat, layout: flat[-1:].zero_()
    ),
    "constant buffers change": instead(preparation, "average_buffers", mean_as_a_sum_of_shares),
    "a kept gradient is overwritten": instead(
        FlatReplica, "place_of_gradient", lambda self, index, gradient: self.gradient_views[index]
    ),
    "a step inside backward is not refused": lambda: _both(
        instead(Attachment, "_before_step", nothing), instead(LaterHooks, "check", nothing)
    ),
    "a left-out step is not seen when backward begins": instead(Attachment, "_goes_on", nothing),
    "models are exchanged in any order": instead(Turns, "_are_taken", False),
    "max_norm is not refused": instead(preparation, "_check_module", nothing),
    "SyncBatchNorm is BatchNorm": instead(sync_batch_norm, "find", lambda model, converts: []),
    "a copy keeps the job's hooks": instead(ModuleHook, "__reduce__", lambda self: len),
    "NumPy's scalars are saved as they are": instead(checkpoint, "storable", lambda value, where: value),
    "expanded buffers are written to": lambda: _both(
        instead(replica, "compact", lambda t: t), instead(evaluate, "compact", lambda t: t)
    ),
    "a second prepare changes the strategy": after(
        Job,
        "_attach",
        lambda self, _: [setattr(a, "wanted", "local_sgd(period=2)") for a in self.attachments],
    ),
    "a second scheduler replaces the first in checkpoints": instead(
        persistence, "free_name", lambda registered, name, thing: name
    ),
    "tokens are not counted": instead(Attachment, "weigh", nothing),
    "sums are taken for means": instead(GradientWeights, "is_sum", property(lambda self: False)),
    "LBFGS decides by its own loss": instead(OptimizerSteps, "closure", lambda self, o, closure: closure),
    "LBFGS's own gradients": instead(GradientWeights, "mean_loss", lambda self, loss: loss),
    "wrappers are strangers": wrappers_are_strangers,
    "a resumed pass begins at its start": instead(ShardedLoader, "load_state_dict", nothing),
    "a resumed run forgets the optimizer": instead(
        persistence, "stateful", lambda optimizer: torch.optim.SGD([torch.zeros(1)], lr=0.1)
    ),
    "a sampler without an end is cut": instead(
        map_loader, "finite", lambda sampler, count: itertools.islice(sampler, 2 * count)
    ),
    "what rank 0 is to do, all ranks do": instead(RankCalls, "on_main", lambda self, function: function),
    "set_seed seeds ranks differently": instead(
        RankCalls, "set_seed", lambda self, seed: random_state.seed_worker(seed, self.comm.rank)
    ),
    "the batch that was fetched last has the weight": instead(Attachment, "take_up", nothing),
    "unused gradients are zero": after(FlatReplica, "return_unused", lambda self, _: _zeros(self)),
}


def _both(*faults: Fault) -> Any:
    stack = contextlib.ExitStack()
    for fault in faults:
        stack.enter_context(fault())
    return stack


def _alike(weights: Any) -> None:
    weights._own, weights._all = 1.0, float(weights._size)
    weights.weigh(is_alone=True)


def _first_length(batch: Any) -> int:
    first = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return (
        len(first)
        if (hasattr(first, "__len__") and not isinstance(first, torch.Tensor)) or first.dim()
        else 1
    )


def _zeros(replica: Any) -> None:
    for p in replica.trained:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


NEEDS: dict[str, dict[str, Any]] = {
    "an optimizer made afterwards is not seen": {"optimizer": "late"},
    "a second optimizer is not refused": {"habit": "second_optimizer"},
    "new and unfrozen parameters are not refused": {"habit": ("replaces", "unfreezes")},
    "a subclass of an optimizer counts twice": {"optimizer": "subclass"},
    "seeds differ before prepare": {"data": "split"},
    "evaluation sees a sampler's share": {"evaluate": ("epoch", "middle")},
    "own data is divided again in evaluation": {"evaluates": "own", "evaluate": ("epoch", "middle")},
    "evaluation leaves buffers as it made them": {"evaluate": ("epoch", "middle"), "model": "buffers"},
    "loss scale leaves through inputs": {"precision": "fp16", "loss": "penalty"},
    "a copy computes with the original's weights": {
        "evaluates": "copy",
        "evaluate": ("epoch", "middle"),
        "precision": ("fp16", "bf16"),
    },
    "other data is not noticed": {"habit": "other_data"},
    "gaps between tensors are zeroed too far": {"codec": "topk(density=1.0)"},
    "constant buffers change": {"model": ("buffers", "batch_norm", "expanded")},
    "a kept gradient is overwritten": {"between": "keep"},
    "a step inside backward is not refused": {"habit": "step_in_hook"},
    "a left-out step is not seen when backward begins": {"omits_steps": True, "zeroes": "between"},
    "models are exchanged in any order": {
        "omits_steps": ("first_model", "last_model"),
        "num_models": (2, 3),
        "strategy": ("local_sgd(period=2)", "diloco(period=2)", "bmuf(period=2)", "slowmo(period=2)"),
    },
    "max_norm is not refused": {"habit": "max_norm"},
    "SyncBatchNorm is BatchNorm": {"model": "batch_norm"},
    "a copy keeps the job's hooks": {"evaluates": "copy", "evaluate": ("epoch", "middle")},
    "NumPy's scalars are saved as they are": {"optimizer": "numpy_lr", "resume": ("epoch", "middle")},
    "expanded buffers are written to": {"model": "expanded"},
    "a second prepare changes the strategy": {"prepares_again": True},
    "a second scheduler replaces the first in checkpoints": {
        "resume": ("epoch", "middle"),
        "scheduler": ("step", "cosine", "epoch"),
        "prepares": "one_by_one",
    },
    "tokens are not counted": {"loss": "tokens"},
    "sums are taken for means": {"loss": "sum"},
    "LBFGS decides by its own loss": {"optimizer": "lbfgs"},
    "LBFGS's own gradients": {"optimizer": "lbfgs"},
    "wrappers are strangers": {"optimizer": ("wrapper", "lookahead")},
    "a resumed pass begins at its start": {"resume": ("epoch", "middle")},
    "a resumed run forgets the optimizer": {"resume": ("epoch", "middle")},
    "a sampler without an end is cut": {"habit": "endless"},
    "what rank 0 is to do, all ranks do": {"aside": "on_main"},
    "set_seed seeds ranks differently": {"aside": "set_seed"},
    "the batch that was fetched last has the weight": {"beside": ("other_loader", "again")},
    "unused gradients are zero": {"model": "unused"},
    "two iterators at once": {"habit": "zip"},
    "a look ahead counts": {"looks": True},
    "batch sizes are guessed": {"data": ("own", "stream")},
    "a stream's ends are not divided": {"data": "stream"},
}
"""Choices without which a fault changes nothing: other loops are counted, but not run."""


def found_in(name: str, seeds: Iterable[int]) -> int | None:
    """The first of these loops that is wrong with the fault; None if all are right."""
    with FAULTS[name]():
        return next((s for s in seeds if concerns(name, draw(s)) and difference(draw(s))), None)


def concerns(name: str, choices: Choices) -> bool:
    """Whether a fault can change anything in a loop with these choices."""
    needs = NEEDS.get(name, {})
    return all(choices[k] in (v if isinstance(v, tuple) else (v,)) for k, v in needs.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults whose names contain one of these")
    parser.add_argument("--limit", type=int, default=500, help="loops for each fault")
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name}, which the test reads")
    options = parser.parse_args()
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for name in FAULTS:
        if options.words and not any(word in name for word in options.words):
            continue
        seed = found_in(name, range(options.limit))
        said = "NOT FOUND" if seed is None else f"loop {seed + 1}: {told(draw(seed))}"
        print(f"{name}: {said}", flush=True)
        if seed is not None:
            recorded[name] = seed
    if options.record:
        RECORDED.write_text(json.dumps({n: recorded[n] for n in FAULTS if n in recorded}, indent=1) + "\n")


if __name__ == "__main__":
    main()
