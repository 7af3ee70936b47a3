"""The loop that choices describe, written as its users write it; and what is compared afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from alongside import Beside
from asides import Asides
from choices import Choices, is_exact
from habits import at_epoch, at_step, once_prepared
from models import make, output
from plain import PlainJob
from runs import state
from sources import Samples, batch_size_of, collate, fetched, loader_of, parts
from stepping import optimizers_of, parameters_of
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

BY_LOOP = ("by_hand", "module")  # ways to clear gradients that nobody holds back amid a window


class Run:
    """One run of the loop on one rank."""

    def __init__(self, c: Choices, job: Any, folder: Path) -> None:
        self.c, self.job, self.folder = c, job, folder
        self.samples = Samples(c["samples"], c["batch"])
        # Codecs take float32; gradients in float64 are summed as they are.
        self.dtype = torch.float32 if c["codec"] else torch.float64
        self.weight = 1
        self.updates = 0
        self.blocks = 0  # of accumulate, since a window ended
        self.begins_window = True
        self.omits_step = False
        self.seen: list[Any] = []
        self.kept: list[Any] = []
        self.counts: list[list[int]] = []
        self.asides = Asides(c["aside"], folder)
        self.build()

    def build(self) -> None:
        """Models, optimizers and everything else, new, and prepared."""
        c, job = self.c, self.job
        self.asides.begin(job)
        self.loader: Any = loader_of(c, job)  # a split draws from what `init` seeded
        self.models = [make(c["model"], seed, self.dtype) for seed in range(c["num_models"])]
        self.optimizers = optimizers_of(c, self.models)
        passes = {"two_backwards": 2, "retain_graph": 2}.get(c["loss"], 1)
        if c["style"] == "accumulate":
            passes = 1  # a block is one micro-batch
        self.settings = {
            "accumulation_steps": c["accumulation"] * passes if c["declares_accumulation"] else 1,
            "precision": c["precision"],
            "loss_reduction": "sum" if c["loss"] == "sum" else "mean",
            "sync_batch_norm": c["model"] == "batch_norm",
        }
        more: Any = {
            "batch": "global",
            "shard": c["data"] != "own",
            "batch_size_of": batch_size_of(c["batch"]),
            "strategy": f"all_reduce(codec={c['codec']})" if c["codec"] else c["strategy"],
        }
        self.prepare(more)
        self.test_loader: Any = None
        if c["evaluates"] in ("prepared", "own"):
            is_own = c["evaluates"] == "own" and job.size <= len(self.samples)
            more = {"batch": "global", "shard": not is_own, "batch_size_of": batch_size_of(c["batch"])}
            self.test_loader = job.prepare(self.test_data(), **more)
        self.emas = (
            [make(c["model"], seed, self.dtype) for seed in range(c["num_models"])] if c["ema"] else []
        )
        job.register(**{f"ema{i}": e for i, e in enumerate(self.emas)})
        self.beside = Beside(self)
        once_prepared(self)

    def prepare(self, more: dict[str, Any]) -> None:
        """In one call, or model by model; a late optimizer is made afterwards."""
        c, job = self.c, self.job
        loader = [] if c["data"] == "by_hand" else [self.loader]
        is_late = c["optimizer"] == "late"
        self.schedulers = self.all_schedulers()
        if c["prepares"] == "one_by_one":
            each = len(self.optimizers) // len(self.models)
            for i, model in enumerate(self.models):
                own = self.optimizers[i * each : (i + 1) * each]
                schedulers = self.schedulers[i * each : (i + 1) * each]
                given = loader if i + 1 == len(self.models) else []
                results = job.prepare(model, *own, *given, scheduler=schedulers, **self.settings, **more)
            self.loader = results[-1] if loader else self.loader
            return
        given = [*self.models, *([] if is_late else self.optimizers), *loader]
        results = job.prepare(*given, **self.settings, **more)
        self.loader = results[-1] if loader else self.loader
        if is_late:
            self.optimizers = optimizers_of(c, self.models)
            self.schedulers = self.all_schedulers()
        job.register(**{f"scheduler{i}": s for i, s in enumerate(self.schedulers)})

    def all_schedulers(self) -> list[Any]:
        return [self.scheduler_of(o) for o in self.optimizers] if self.c["scheduler"] else []

    def scheduler_of(self, optimizer: Any) -> Any:
        inner = getattr(optimizer, "inner", optimizer)
        if self.c["scheduler"] == "cosine":
            first = SimpleNamespace(rank=0, size=self.job.size)  # another rank's own data may be shorter
            total = max(1, len(loader_of(self.c, first))) * self.c["epochs"]
            return torch.optim.lr_scheduler.CosineAnnealingLR(inner, total)
        return torch.optim.lr_scheduler.StepLR(inner, 2, 0.5)

    def __call__(self) -> Any:
        resume, already = self.c["resume"], False
        for epoch in self.epochs():
            stopped = self.epoch(epoch, stop_after=2 if resume == "middle" and not already else None)
            if stopped:
                return self.resumed()
            if resume == "epoch" and not already:
                already = True
                self.job.save(self.folder / "saved")
            self.note(epoch)
            if self.c["prepares_again"] and epoch == 0:
                self.job.prepare(*self.models, *self.optimizers, **self.settings)
            if resume == "epoch" and epoch == 0 and self.c["epochs"] > 1:
                return self.resumed()
        return self.result()

    def resumed(self) -> Any:
        seen = self.seen
        self.job = self.job.again()
        self.build()
        self.job.load(self.folder / "saved")
        for epoch in self.epochs():
            self.epoch(epoch)
            self.note(epoch)
        self.seen = seen + self.seen[len(seen) :]
        return self.result()

    def epochs(self) -> Iterator[int]:
        yield from self.job.epochs(self.c["epochs"])

    def epoch(self, epoch: int, stop_after: int | None = None) -> bool:
        c = self.c
        count = len(self.loader)
        first = c["skip_first"] if epoch == 1 else 0
        for model in self.models:
            model.train()
        at_epoch(self)
        if c["looks"] and 0 < self.job.rank == self.job.size - 1:
            next(iter(self.loader))
        for i, batch in enumerate(self.batches(first)):
            if c["skips"] and i % 3 == 1:
                # Where its models get copies of the batches, or a block begins while the loader keeps them.
                if c["codec"] or c["loss"] == "penalty" or (c["style"], c["data"]) == ("accumulate", "own"):
                    self.job.skip()
                continue
            if c["leaves_early"] and i == 2:
                break
            is_last = first + i + 1 == count
            ends = (i + 1) % c["accumulation"] == 0 or is_last or (c["leaves_early"] and i == 1)
            # As a GradScaler does: all ranks where they take the same steps, and else perhaps one.
            omits = c["omits_steps"] and i % 3 == c["epochs"] % 2 and not (is_last or c["leaves_early"])
            self.omits_step = omits and (is_exact(c) or self.job.rank == 0)
            if c["gathers"]:
                self.gather(batch)
            if c["style"] == "accumulate":
                self.blocks += 1
                ends = self.blocks >= c["accumulation"] or is_last
                self.blocks = 0 if ends else self.blocks
                with self.job.accumulate():
                    self.minibatch(batch, ends=ends)
                assert self.is_alone or self.job.sync_gradients == ends
            else:
                self.minibatch(batch, ends=ends)
            self.begins_window = ends
            if c["evaluate"] == "middle" and i == 1:
                self.evaluate()
            if stop_after is not None and i + 1 == stop_after and i + 1 < count:
                self.job.save(self.folder / "saved")  # a pass that is left is over
                return True
        if c["scheduler"] == "epoch":
            for scheduler in self.schedulers:
                scheduler.step()
        return False

    @property
    def is_alone(self) -> bool:
        """Whether the loop runs without Paceline, and does by hand what `accumulate` does."""
        return isinstance(self.job, PlainJob)

    def gather(self, batch: Any) -> None:
        x, y = self.parts(batch)
        with torch.no_grad():
            mine = {"out": output(self.models[0](x)), "y": (y, [f"{float(v):.9f}" for v in x[:, 0]])}
        self.seen.append(self.job.gather_for_metrics(mine))

    def batches(self, first: int) -> Iterator[Any]:
        """What the loader gives; without one, this rank's share of every batch, and how much it weighs."""
        if self.c["data"] != "by_hand":
            loader = self.job.skip_first_batches(self.loader, first) if first else self.loader
            yield from fetched(loader, self.c["fetches"])
            return
        size = self.c["batch_size"]
        for start in range(0, len(self.samples), size):
            whole = slice(start, start + size)
            x, y = (t[whole][self.job.rank :: self.job.size] for t in (self.samples.x, self.samples.y))
            self.weight = len(x)
            # A rank without samples trains on others, which weigh nothing.
            yield (x, y) if len(x) else (self.samples.x[whole], self.samples.y[whole])

    def minibatch(self, batch: Any, *, ends: bool) -> None:
        c, kind = self.c, self.c["optimizer"]
        at_step(self)
        self.beside.before(batch)
        is_held = c["style"] == "accumulate" and not self.is_alone  # what is called amid a window waits
        clears = self.begins_window or (is_held and c["zero"] not in BY_LOOP)
        if c["zeroes"] == "first" and clears:
            self.zero()
        if kind == "lbfgs":
            for optimizer in self.optimizers:

                def closure(optimizer: Any = optimizer) -> Any:
                    optimizer.zero_grad()
                    loss = self.loss(batch)
                    loss.backward()
                    return loss

                optimizer.step(closure)
        elif kind == "sam":
            self.sam(batch)
        else:
            self.backward(batch, clears=c["zeroes"] == "between" and clears)
            self.beside.after()
            if not (ends or is_held):
                return
            if ends:
                self.between()
            left_out = self.left_out()
            for optimizer in self.optimizers:
                if not any(optimizer is one for one in left_out):
                    optimizer.step()
                elif ends and not is_exact(c):  # of one rank alone, for a reason that is seen
                    for p in parameters_of(optimizer):
                        if p.grad is not None:
                            p.grad.fill_(float("inf"))
        if c["zeroes"] == "last" and (ends or c["zero"] not in BY_LOOP):
            self.zero()
        if c["scheduler"] in ("step", "cosine"):
            for scheduler in self.schedulers:
                scheduler.step()
        if not ends:
            return
        self.updates += 1
        for ema, model in zip(self.emas, self.models, strict=False):
            with torch.no_grad():
                for average, p in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(p, 0.3)

    def parts(self, batch: Any) -> tuple[Any, Any]:
        x, y = parts(batch, self.c["batch"])
        return x.to(self.dtype), y

    def loss(self, batch: Any) -> Any:
        x, y = self.parts(batch)
        kind = self.c["loss"]
        needs_input = kind == "penalty"
        if needs_input:
            x = x.clone().requires_grad_()
        outputs = [output(model(x)) for model in self.models]
        self.beside.inside()
        if kind == "tokens":
            weights = torch.where(x[:, :1] > 0, 1.0, 0.25).expand_as(y)
            self.job.weight(weights.sum() * (self.weight > 0))
            loss: Any = sum(((out - y) ** 2 * weights).sum() / weights.sum() for out in outputs)
        else:
            if self.c["data"] == "by_hand" and kind != "sum":
                self.job.weight(self.weight)
            squares = [(out - y) ** 2 for out in outputs]
            mask = float(self.weight > 0)
            loss = sum(s.sum() / 20 * mask if kind == "sum" else s.mean() for s in squares)
        if needs_input:
            (slope,) = torch.autograd.grad(outputs[0].sum(), x, create_graph=True, allow_unused=True)
            loss = loss + (0.0 if slope is None else 0.1 * slope.square().sum(1).mean())
        # By job.backward, unless it was told that the loss is a sum.
        is_divided = self.c["style"] == "accumulate" and not self.is_alone and kind != "sum"
        return loss if is_divided else loss / self.c["accumulation"]

    def backward(self, batch: Any, *, clears: bool) -> None:
        kind = self.c["loss"]
        backward: Any = torch.Tensor.backward if self.c["style"] == "plain" else self.job.backward
        loss = self.loss(batch)
        if clears:
            self.zero()
        if kind == "two_backwards":
            backward(loss * 0.3)
            backward(self.loss(batch) * 0.7)
            return
        if kind == "retain_graph":
            backward(loss, retain_graph=True)
        if kind == "scaled":
            loss = loss * 1024
        if kind == "detached_part":
            loss = loss + (loss * loss).detach()
        backward(loss, create_graph=kind == "create_graph")
        further = self.beside.more(batch)
        if further is not None:
            backward(self.loss(further))

    def sam(self, batch: Any) -> None:
        self.loss(batch).backward()
        moved = []
        with torch.no_grad():
            for p in self.trained():
                if p.grad is not None:
                    moved.append((p, 0.05 * p.grad / (p.grad.norm() + 1e-6)))
            for p, by in moved:
                p.add_(by)
        self.zero()
        self.loss(batch).backward()
        with torch.no_grad():
            for p, by in moved:
                p.sub_(by)
        for optimizer in self.optimizers:
            optimizer.step()

    def left_out(self) -> list[Any]:
        """Optimizers that do not step in this minibatch: all of them, or those of one model."""
        if not self.omits_step:
            return []
        each = max(1, len(self.optimizers) // len(self.models))
        which: Any = {"first_model": slice(each), "last_model": slice(-each, None)}
        return list(self.optimizers[which.get(self.c["omits_steps"], slice(None))])

    def trained(self) -> list[Any]:
        return [p for model in self.models for p in model.parameters() if p.requires_grad]

    def between(self) -> None:
        """What the user does with complete gradients."""
        c = self.c
        gradients = [p.grad for p in self.trained() if p.grad is not None]
        if c["loss"] == "scaled":
            for gradient in gradients:
                gradient.div_(1024)
        if c["between"] == "noise":
            generator = torch.Generator().manual_seed(len(self.seen))
            for gradient in gradients:
                noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
                gradient.add_(noise.to(gradient.dtype), alpha=0.01)
        elif c["between"] == "read":
            self.seen.append(sum(float(gradient.abs().sum()) for gradient in gradients))
        elif c["between"] == "keep" and len(self.kept) < 12:
            self.kept += gradients
        elif c["between"] == "drop_one":
            self.trained()[0].grad = None
        if c["clip"] == "norm":
            self.seen.append(float(nn.utils.clip_grad_norm_(self.trained(), 0.5)))
        elif c["clip"] == "value":
            nn.utils.clip_grad_value_([p for p in self.trained() if not p.is_complex()], 0.05)

    def zero(self) -> None:
        if self.c["zero"] == "by_hand":
            for p in self.trained():
                p.grad = None
        elif self.c["zero"] == "module":
            for model in self.models:
                model.zero_grad()
        else:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=self.c["zero"] == "none")

    def evaluate(self) -> None:
        c = self.c

        def squared(out: Any, y: Any) -> tuple[float, int]:
            return float((output(out) - y).square().sum()), y.numel()

        def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
            x, y = self.parts(batch)
            return model(x), y

        for model in [*self.models, *self.emas]:
            # Averages that are kept beside replicas which differ, differ too.
            mean = {} if model in self.models or is_exact(c) else {"average": True}
            if c["evaluates"] == "copy":
                model, mean = copy.deepcopy(model), {"average": not is_exact(c)}
                with torch.no_grad():
                    next(model.parameters()).mul_(0.5)
            found = self.job.evaluate(model, self.test_data(), {"squared": squared}, forward=forward, **mean)
            self.seen.append(dict(found))

    def test_data(self) -> Any:
        form, job = self.c["batch"], self.job
        if self.test_loader is not None:
            return self.test_loader
        if self.c["evaluates"] == "dataset" and not collate(form):
            return self.samples
        sampler = None
        if self.c["evaluates"] == "distributed":
            sampler = DistributedSampler(self.samples, job.size, job.rank, shuffle=False)
        loader: Any = DataLoader(self.samples, 5, sampler=sampler, collate_fn=collate(form))
        if self.c["evaluates"] == "own" and job.size <= len(self.samples):
            share = Subset(self.samples, range(job.rank, len(self.samples), job.size))
            loader = DataLoader(share, 5, collate_fn=collate(form))
        return loader

    def note(self, epoch: int) -> None:
        self.asides.note(self.job, epoch)
        self.counts.append([epoch, self.job.step, self.job.samples])
        self.seen += [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        if self.c["evaluate"] == "epoch":
            self.evaluate()

    def result(self) -> Any:
        inner = [getattr(o, "inner", o) for o in self.optimizers]
        if self.c["saves_model"]:
            self.job.save_model(self.models[0], self.folder / "model.pt")
            self.seen.append(dict(torch.load(self.folder / "model.pt", weights_only=True)))
        return {
            "models": [state(m) for m in self.models],
            "optimizers": [state(o) for o in inner],
            "emas": [state(m) for m in self.emas],
            "schedulers": [s.last_epoch for s in self.schedulers],
            "length": len(self.loader),
            "counts": self.counts,
            "updates": self.updates,
            "minibatches": [a.minibatches for a in self.job.attachments],
            "seen": self.seen,
            "constants": [b.tolist() for m in self.models for n, b in m.named_buffers() if n == "table"],
            "asides": self.asides.result(self.job),
            "kept": [gradient.detach().clone() for gradient in self.kept],
        }
