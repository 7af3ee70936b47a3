"""One strategy object for Lightning's Trainer and for Fabric.

Lightning has two class trees for the two; this class is in both. Processes, samplers, precision and the
collectives of Lightning's own (barrier, broadcast of objects, reduced metrics) are those of its DDP strategy;
gradients and models travel by Paceline instead of DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.pytorch.strategies import DDPStrategy as TrainerDDP
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch._C._distributed_c10d import PrefixStore
from torch.optim import Optimizer

from paceline.compat import embedding
from paceline.compat.lightning.environment import PacelineEnvironment
from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy, make
from paceline.train.job import DEFAULT_STRATEGY, Job

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import Precision


class _SyncControl(_BackwardSyncControl):  # type: ignore[misc]
    """What Fabric asks for `no_backward_sync`: backward passes that only accumulate."""

    def __init__(self, owner: PacelineStrategy) -> None:
        self._owner = owner

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Any:
        """Backward passes inside only accumulate."""
        return self._owner.job.no_sync() if enabled else nullcontext()


class PacelineStrategy(TrainerDDP, FabricDDP):  # type: ignore[misc]
    """`strategy=` of `Trainer` and `Fabric`: any of Paceline's strategies.

    Args:
        strategy: A strategy string such as `"local_sgd(period=8)"`, or an object; default: all_reduce.
        fabric: What carries Paceline's tensors, `"native"` or `"torch"`; default: chosen by device.
        process_group_backend: What carries Lightning's own tensors; default: `"paceline"` beside the native
            fabric, else Lightning's choice.
        accelerator: Lightning's, passed on.
        parallel_devices: One device per worker of this host; default: its GPUs, or the CPU.
        checkpoint_io: Lightning's, passed on.
        precision_plugin: Lightning's, passed on.

    Raises:
        ConfigError: The strategy string is wrong.

    Example:
        ```python
        trainer = Trainer(strategy=PacelineStrategy("local_sgd(period=8)"), max_epochs=3)
        ```

    Validation and checkpoints see the strategy's consensus model; a checkpoint also holds every rank's state,
    so that `trainer.fit(ckpt_path=…)` continues bit for bit. Each of the Trainer's loggers gets the job's
    statistics as `paceline/…` every `log_every_n_steps`.
    """

    def __init__(
        self,
        strategy: str | TrainingStrategy = DEFAULT_STRATEGY,
        *,
        fabric: str | None = None,
        process_group_backend: str | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if isinstance(strategy, str):
            make(strategy)  # a wrong spec is refused here
        environment = PacelineEnvironment()
        if parallel_devices is None:
            has_gpu = torch.cuda.is_available()
            parallel_devices = [
                torch.device("cuda", i) if has_gpu else torch.device("cpu")
                for i in range(environment.local_size)
            ]
        # One base class for each of Lightning's two front ends; both only store what they are given.
        FabricDDP.__init__(self, parallel_devices=parallel_devices, cluster_environment=environment)
        TrainerDDP.__init__(
            self,
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
        )
        self._spec, self._fabric_name = strategy, fabric
        self._job: Job | None = None
        self._module: nn.Module | None = None
        self._trainer: Trainer | None = None
        self._evaluation = ExitStack()
        self._backward_sync_control = _SyncControl(self)

    @property
    def job(self) -> Job:
        """Paceline's handle: `strategy.job.stats()`, `strategy.job.synchronize()`."""
        if self._job is None:
            raise ConfigError("PacelineStrategy: the job begins with trainer.fit() or fabric.launch()")
        return self._job

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """This rank's share of a data set."""
        return {"num_replicas": self.job.size, "rank": self.job.rank}

    def setup_environment(self) -> None:
        """Join the job, then give Lightning a process group if the fabric has made none."""
        self.accelerator.setup_device(self.root_device)
        if self._job is None:
            self._job = embedding.join("Lightning", fabric=self._fabric_name)
        if not dist.is_initialized():
            assert self.job.meeting is not None
            is_native = self.job.comm.fabric == "native"
            self._process_group_backend = self.process_group_backend or ("paceline" if is_native else None)
            dist.init_process_group(
                self._get_process_group_backend(),
                store=PrefixStore("lightning", self.job.meeting.store),
                rank=self.job.rank,
                world_size=self.job.size,
                timeout=self._timeout,
            )
        self.set_world_ranks()

    def _prepare(self, module: nn.Module, optimizers: list[Any]) -> None:
        self._module = module
        self.job.prepare(module, optimizers, strategy=self._spec)

    # The Trainer's side.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: the flat buffers exist before weights are loaded into them."""
        return True

    def setup(self, trainer: Trainer) -> None:
        """Lightning's own setup, with `prepare` where DDP would wrap the module."""
        super().setup(trainer)
        self._trainer = trainer
        if trainer.state.fn == TrainerFn.FITTING:
            self._prepare(self.lightning_module, list(self.optimizers))

    def configure_ddp(self) -> None:
        """Nothing: the module stays as it is."""

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulation of gradients, as the Trainer asks for it."""
        with self.job.no_sync():
            yield

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], object] | None = None,
        model: nn.Module | None = None,
        **options: object,
    ) -> object:
        """Run forward and backward first, then step: hooks of the step must find complete gradients."""
        if self._lightning_module is None:
            return FabricDDP.optimizer_step(self, optimizer, **({"closure": closure} if closure else {}))
        plugin = self.precision_plugin
        if getattr(plugin, "scaler", None) is not None:
            result = TrainerDDP.optimizer_step(self, optimizer, closure, model, **options)
        else:
            wrap = plugin._wrap_closure  # noqa: SLF001  Lightning's own way to run a closure early
            result = wrap(model or self.lightning_module, optimizer, closure)
            optimizer.step(closure=lambda: result, **options)
        self._log()
        return result

    def _log(self) -> None:
        trainer = self._trainer
        assert trainer is not None  # the Trainer's own step comes here
        step = trainer.global_step + 1
        if self.job.is_main and trainer.loggers and step % trainer.log_every_n_steps == 0:
            row = self.job.measure()
            values = {
                f"{embedding.KEY}/{name}": row[name]
                for name in ("seconds", "samples_per_s", "payload_bytes", "wait_s", "staleness")
                if row[name] is not None
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step - 1)

    def on_train_start(self) -> None:
        self.job.clock.start()

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Count what this batch holds; all ranks get batches of one size."""
        first = next((t for t in _leaves(batch) if isinstance(t, torch.Tensor) and t.ndim), None)
        self.job.samples += 0 if first is None else len(first) * self.job.size

    def on_train_end(self) -> None:
        """All ranks end with the final model."""
        self._evaluation.close()
        self.job.synchronize()
        self.job.clock.stop()
        self.job.sum_up()

    def on_validation_start(self) -> None:
        """Validate the consensus model."""
        if self._job is not None and self.job.attachments:
            self._evaluation.enter_context(embedding.consensus_model(self.job))

    def on_validation_end(self) -> None:
        """Go on training where it was."""
        self._evaluation.close()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The consensus model, as copies: parameters are views of flat buffers."""
        return self._consensus_state(self.lightning_module)

    def _consensus_state(self, module: nn.Module) -> dict[str, Any]:
        self._evaluation.close()  # a callback may save between validation and its end
        with embedding.consensus_model(self.job) if self.job.attachments else nullcontext():
            return {
                k: v.detach().clone() if isinstance(v, torch.Tensor) else v
                for k, v in module.state_dict().items()
            }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Also every rank's own state; Lightning calls this after it has loaded the model."""
        super().load_optimizer_state_dict(checkpoint)
        for attachment in self.job.attachments:
            attachment.replica.adopt()
        if embedding.KEY in checkpoint:
            embedding.restore(self.job, checkpoint[embedding.KEY])

    # Fabric's side, and what both call by one name with different arguments.

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Any], scheduler: object = None
    ) -> Any:
        """What `fabric.setup(model, optimizer)` calls: `prepare` stands in for DDP."""
        self._prepare(module, list(optimizers))
        return module, optimizers, scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """`fabric.setup(model)` or `fabric.setup_module(model)`; `setup_optimizers` prepares it."""
        self._module = module
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """`fabric.setup_optimizers(optimizer)`; one optimizer, after `setup_module`."""
        if self._module is None:
            raise ConfigError("PacelineStrategy: fabric.setup_module(model) comes before setup_optimizers")
        self._prepare(self._module, [optimizer])
        return optimizer

    def backward(
        self, tensor: torch.Tensor, module: nn.Module | None = None, *args: object, **options: object
    ) -> object:
        """Backward of either front end."""
        side = FabricDDP if self._lightning_module is None else TrainerDDP
        return side.backward(self, tensor, module, *args, **options)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The consensus model; all ranks call it."""
        return self._consensus_state(module)

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Trainer: (checkpoint, path, …); Fabric: (path=…, state=…, …). All ranks add their state."""
        is_trainer = self._lightning_module is not None
        names = ("checkpoint", "filepath") if is_trainer else ("path", "state")
        options |= zip(names, args, strict=False)
        what = names[0] if is_trainer else names[1]
        if self.job.attachments:
            self._evaluation.close()
            options[what] = {**options[what], embedding.KEY: embedding.state_of_all_ranks(self.job)}
        (TrainerDDP if is_trainer else FabricDDP).save_checkpoint(self, **options)

    def load_checkpoint(self, path: str | Path, *args: object, **options: object) -> dict[str, Any]:
        """The checkpoint, or with Fabric what is left of it after restoring the given objects."""
        if self._lightning_module is not None:
            loaded: dict[str, Any] = TrainerDDP.load_checkpoint(self, path, *args, **options)
            return loaded
        rest: dict[str, Any] = FabricDDP.load_checkpoint(self, path, *args, **options)
        if (args or options.get("state")) and self.job.attachments and embedding.KEY in rest:
            for attachment in self.job.attachments:
                attachment.replica.adopt()
            embedding.restore(self.job, rest.pop(embedding.KEY))
        return rest


def _leaves(batch: object) -> Iterator[object]:
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        for item in batch:
            yield from _leaves(item)
    else:
        yield batch
