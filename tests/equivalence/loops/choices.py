"""What a generated training loop is made of: one value per dimension, the simplest one first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Choices = dict[str, Any]

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "model": (
        "mlp", "tied", "frozen", "shared", "heads", "embedding", "recurrent", "mixed_dtype", "unused",
        "empty", "scalar", "nested", "checkpointed", "twice", "buffers", "convolution", "lora", "complex",
        "batch_norm", "expanded",
    ),
    "num_models": (1, 2, 3),
    "optimizer": (
        "sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "lbfgs", "groups", "several", "shared",
        "late", "subclass", "wrapper", "sam", "lookahead", "numpy_lr",
    ),
    "samples": (24, 1, 2, 7, 23, 31),
    "batch_size": (6, 1, 4, 8, 40),
    "data": ("map", "split", "stream", "own", "by_hand"),
    "order": (
        "sequential", "shuffle", "subset", "numpy_subset", "weighted", "batch_sampler", "own_sampler",
    ),
    "batch": ("tuple", "dict", "named", "nested", "scalar_first", "time_first"),
    "looks": (False, True),
    "drop_last": (False, True),
    "epochs": (1, 2, 3),
    "accumulation": (1, 2, 3),
    "declares_accumulation": (True, False),
    "style": ("plain", "accumulate", "backward"),
    "zeroes": ("last", "first", "between"),
    "omits_steps": (False, True, "first_model", "last_model"),
    "clip": (None, "norm", "value"),
    "scheduler": (None, "step", "epoch", "cosine"),
    "ema": (False, True),
    "evaluate": (None, "epoch", "middle"),
    "evaluates": ("loader", "dataset", "distributed", "prepared", "own", "copy"),
    "leaves_early": (False, True),
    "skips": (False, True),
    "loss": (
        "one", "two_backwards", "retain_graph", "penalty", "scaled", "detached_part", "tokens", "sum",
        "create_graph",
    ),
    "between": (None, "read", "noise", "drop_one", "keep"),
    "zero": ("none", "zeros", "module", "by_hand"),
    "resume": (None, "epoch", "middle"),
    "skip_first": (0, 1, 3),
    "gathers": (False, True),
    "saves_model": (False, True),
    "prepares": ("together", "one_by_one"),
    "prepares_again": (False, True),
    "precision": (None, "fp16", "bf16"),
    "codec": (None, "topk(density=1.0)"),
    "habit": (
        None, "step_in_hook", "second_optimizer", "replaces", "unfreezes", "max_norm", "zip", "other_data",
        "endless",
    ),
    "strategy": (
        "all_reduce", "local_sgd(period=2)", "diloco(period=2)", "bmuf(period=2)", "slowmo(period=2)",
        "streaming_diloco(period=4, fragments=2)", "gossip(mode=synchronous)", "parameter_server",
        "decentralized_threshold(tau=0.01)",
    ),
    "aside": (None, "main_first", "on_main", "set_seed", "track"),
    "fetches": ("one", "ahead", "all"),
    "beside": (
        None, "validates_before", "validates_inside", "validates_after", "other_loader", "thrown_away",
        "again",
    ),
}  # fmt: skip
SIMPLEST = {
    "habit": 0.9, "codec": 0.6, "precision": 0.3, "data": 0.5, "prepares": 0.7, "loss": 0.3, "model": 0.2,
    "optimizer": 0.3, "evaluate": 0.15, "evaluates": 0.1, "resume": 0.5, "strategy": 0.7, "fetches": 0.6,
    "beside": 0.7, "omits_steps": 0.6,
}  # fmt: skip
"""The share of loops in which these dimensions have the simplest value."""
SERVED = ("gossip", "parameter_server", "decentralized_threshold")


def draw(seed: int) -> Choices:
    """A loop: most dimensions have the simplest value in half of the cases."""
    rng = random.Random(seed)
    drawn = {
        name: values[0] if rng.random() < SIMPLEST.get(name, 0.5) else rng.choice(values)
        for name, values in DIMENSIONS.items()
    }
    return sensible(drawn)


def sensible(choices: Choices) -> Choices:
    """Without combinations that mean nothing in one process either, or that documents exclude."""
    fixed = dict(choices)
    for rule in (_habit, _data, _optimizer, _model, _accumulation, _strategy, _beside, _fetches):
        rule(fixed)
    return fixed


def _habit(fixed: Choices) -> None:
    habit = fixed["habit"]
    if habit is None:
        return
    fixed.update(strategy="all_reduce", data="map", optimizer="sgd", resume=None, codec=None, samples=24)
    fixed["leaves_early"] = fixed["skips"] = False  # amid a window of `accumulate` steps have no effect
    if habit == "step_in_hook":
        fixed["loss"] = "one"  # torch itself refuses a second pass over a graph whose weights have changed
    if habit == "unfreezes":
        fixed["model"] = "frozen"
    if habit == "max_norm":
        fixed["model"] = "max_norm"
    if habit == "endless":
        fixed.update(order="sequential", scheduler=None)


def _data(fixed: Choices) -> None:
    if fixed["data"] == "stream" and fixed["order"] != "shuffle":
        fixed["order"] = "sequential"
    if fixed["data"] == "own":  # every rank has a share of every minibatch but the last
        fixed["batch_size"] = max(4, fixed["batch_size"])
        fixed["samples"] = max(7, fixed["samples"])
        fixed["order"] = "shuffle" if fixed["order"] == "shuffle" else "sequential"
        fixed["looks"] = False  # the ranks tell each other how much they have
    if fixed["data"] == "by_hand":
        fixed.update(order="sequential", batch="tuple", drop_last=False, declares_accumulation=False)
        fixed.update(looks=False, skip_first=0, gathers=False, style="plain")
        if fixed["model"] == "batch_norm":  # statistics are of all that passes through the model
            fixed.update(samples=24, batch_size=6)
        fixed["resume"] = "epoch" if fixed["resume"] == "middle" else fixed["resume"]
    count = fixed["samples"] - (fixed["samples"] // 3 if fixed["data"] == "split" else 0)
    if fixed["order"] in ("subset", "numpy_subset") and count > 2:
        count = (count + 1) // 2
    if fixed["drop_last"] and count < fixed["batch_size"]:
        fixed["drop_last"] = False  # no batch at all
    if fixed["order"] == "batch_sampler":
        fixed["drop_last"] = False


def _optimizer(fixed: Choices) -> None:
    kind = fixed["optimizer"]
    if fixed["omits_steps"] in ("first_model", "last_model"):
        fixed["num_models"] = max(2, fixed["num_models"])
    if kind == "lbfgs":  # a closure makes its own backward passes
        fixed.update(accumulation=1, loss="one", between=None, clip=None, resume=None)
    if kind == "sam":
        fixed.update(accumulation=1, loss="one", between=None, resume=None)
    if kind in ("lbfgs", "sam"):
        fixed["omits_steps"] = False
        fixed["zeroes"] = "first" if fixed["zeroes"] == "between" else fixed["zeroes"]
    if kind in ("late", "wrapper", "lookahead"):
        fixed["resume"] = None
    if fixed["num_models"] > 1 and kind in ("lbfgs", "sam", "subclass", "wrapper", "lookahead", "late"):
        fixed["num_models"] = 1
    if kind == "shared":
        fixed["num_models"] = max(2, fixed["num_models"])
    if kind in ("shared", "late"):
        fixed["prepares"] = "together"


def _model(fixed: Choices) -> None:
    if fixed["model"] in ("recurrent", "batch_norm") and fixed["loss"] in ("penalty", "create_graph"):
        fixed["loss"] = "one"  # these kernels have no second derivative
    if fixed["model"] == "expanded" and fixed["resume"]:
        fixed["ema"] = False  # torch cannot load into expanded buffers, which the loop would make it do
    if fixed["model"] == "batch_norm" and fixed["strategy"].startswith(SERVED):
        fixed["strategy"] = "all_reduce"
    if fixed["model"] in ("batch_norm", "mixed_dtype") and fixed["optimizer"] == "lbfgs":
        fixed["optimizer"] = "sgd"  # LBFGS magnifies the roundings of statistics and of float32


def _accumulation(fixed: Choices) -> None:
    if fixed["resume"]:
        fixed["epochs"] = max(2, fixed["epochs"])  # there is something to resume
        if fixed["between"] == "keep":  # what is kept is of the models before
            fixed["between"] = None
    if fixed["resume"] == "middle":  # what is counted from the pass' first batch is not to happen twice
        fixed["omits_steps"] = False  # a checkpoint amid a minibatch is refused
        fixed["leaves_early"] = False
        fixed["evaluate"] = "epoch" if fixed["evaluate"] == "middle" else fixed["evaluate"]
    if fixed["accumulation"] > 1 and fixed["style"] == "accumulate":
        fixed["declares_accumulation"] = True  # it is what says how many blocks a window has
        if fixed["optimizer"] == "late":
            fixed["optimizer"] = "momentum"  # refused: prepare must know what is held back
        if fixed["leaves_early"] or fixed["skips"]:  # the window goes on in the next pass
            fixed.update(resume=None, prepares_again=False)
    elif fixed["accumulation"] > 1:
        fixed["skips"] = False
        if fixed["leaves_early"]:  # a step before the declared number of passes: a warning says what holds
            fixed["declares_accumulation"] = False
    if fixed["accumulation"] > 1 and fixed["resume"] == "middle":
        fixed["resume"] = "epoch"


def _strategy(fixed: Choices) -> None:
    if fixed["strategy"].startswith(SERVED):
        fixed["resume"] = None  # their messages need a job of its own, which a thread has once
    if fixed["strategy"] != "all_reduce" or fixed["optimizer"] == "lbfgs":  # which magnifies roundings
        fixed["codec"] = None
    if fixed["model"] in ("mixed_dtype", "batch_norm"):  # statistics magnify the roundings of float32
        fixed["codec"] = None
    if fixed["codec"] and fixed["loss"] == "retain_graph":  # twice the gradient: too large for small batches
        fixed["loss"] = "one"
    if fixed["data"] == "by_hand" and fixed["strategy"] != "all_reduce":
        fixed["omits_steps"] = False  # without a loader, job.step counts the steps that this rank took
    if fixed["codec"]:  # it needs float32, of which autocast makes less; float64 it leaves alone
        fixed["precision"] = None


def _beside(fixed: Choices) -> None:
    beside = fixed["beside"]
    if fixed["habit"] or fixed["data"] in ("by_hand", "own") or fixed["optimizer"] in ("lbfgs", "sam"):
        fixed["beside"] = beside = None
    if fixed["model"] == "buffers" and fixed["evaluates"] == "copy" and str(beside).startswith("validates"):
        fixed["evaluates"] = "dataset"  # it counts its calls, and copies with other counts are refused
    if beside in ("other_loader", "thrown_away", "again"):
        fixed.update(accumulation=1, codec=None, resume=None)
        fixed["style"] = "plain" if fixed["style"] == "accumulate" else fixed["style"]
        if fixed["loss"] not in ("one", "scaled", "detached_part", "tokens", "sum"):
            fixed["loss"] = "one"


def _fetches(fixed: Choices) -> None:
    if fixed["data"] == "by_hand" or fixed["habit"] or fixed["resume"] == "middle":
        fixed["fetches"] = "one"
    # Refused: it is not known which batch is in hand before a model gets it, nor if it gets a copy.
    if (
        fixed["codec"]
        or fixed["loss"] == "penalty"
        or (fixed["style"] == "accumulate" and fixed["accumulation"] > 1)
    ):
        fixed["fetches"] = "one"


def is_exact(choices: Choices) -> bool:
    """Whether several ranks compute what one process does; else replicas and counters are equal."""
    return bool(choices["strategy"] == "all_reduce")


def shrunk(choices: Choices) -> Iterator[Choices]:
    """Loops that differ from `choices` in one dimension, towards the simplest."""
    for name, values in DIMENSIONS.items():
        at = values.index(choices[name])
        for simpler in values[:at][:2]:
            candidate = sensible({**choices, name: simpler})
            if candidate != choices:
                yield candidate


def told(choices: Choices) -> str:
    """What is not the simplest, as one line."""
    return ", ".join(f"{k}={v!r}" for k, v in choices.items() if v != DIMENSIONS[k][0]) or "the simplest loop"
