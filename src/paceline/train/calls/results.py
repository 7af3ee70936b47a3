"""What a run hands out: a model as one file, and rows for trackers."""

from __future__ import annotations

import os

from torch import nn

from paceline.comm.communicator import FabricCommunicator
from paceline.train.arguments import unwrapped
from paceline.train.attachment import Attachment
from paceline.train.calls.turns import Turns
from paceline.train.clock import TrainingClock
from paceline.train.data.following import Loaders
from paceline.train.logs.logbook import Logbook
from paceline.train.logs.trackers import Tracker
from paceline.train.saving import model_file


class ResultCalls:
    """`job.save_model` and `job.track`."""

    comm: FabricCommunicator
    attachments: list[Attachment]
    turns: Turns
    clock: TrainingClock
    loaders: Loaders
    logbook: Logbook

    def save_model(self, model: nn.Module, path: str | os.PathLike[str]) -> None:
        """Write the consensus model to one plain file, to be read without Paceline; all ranks call it.

        Rank 0 writes, durably; a file that is there is replaced at the end. Names are those of the plain
        module. Training goes on as if nothing had happened. `job.save` writes what a run needs to go on.

        Args:
            model: A prepared model, or any other that is equal on all ranks; compiled or not.
            path: `….safetensors`, for `safetensors.torch.load_model` or `load_file`: of tied weights one name
                is written; or `….pt`, `….pth`, `….bin`, for `torch.load`. A path without an ending is a
                folder, for `model.safetensors` in it. Folders that are missing are made.

        Raises:
            ConfigError: Another ending, the package safetensors is missing, or a state that it cannot hold.
            CheckpointError: On all ranks, when rank 0 cannot write it.
            Mismatch: A model that was not prepared differs over the ranks.

        Example:
            `job.save_model(model, "out/model.safetensors")`
        """
        with self.clock.paused():
            for one in self.attachments:
                one.finish_minibatch()
            with self.turns.meeting():
                model_file.save(unwrapped(model), path, self.attachments, self.comm)

    def track(self, tracker: Tracker) -> None:
        """Hand the rows of `job.log` to a tracker too; rank 0 does so, the other ranks ignore it.

        A tracker that raises does not end the training: the first time is said, and it gets the next rows.

        Args:
            tracker: An object with `log(row, step)`, for a row's columns as a dict and `job.step`, and
                `finish()`, which is called once when the job is closed. To make one on rank 0 only, call this
                under `if job.is_main:`.

        Raises:
            ConfigError: It has no such methods.

        Example:
            ```
            class Wandb:
                def __init__(self): self.run = wandb.init(project="mine")
                def log(self, row, step): self.run.log(row, step=step)
                def finish(self): self.run.finish()

            if job.is_main:
                job.track(Wandb())
            ```
        """
        self.loaders.check_open("job.track: the job")
        self.logbook.trackers.add(tracker)
