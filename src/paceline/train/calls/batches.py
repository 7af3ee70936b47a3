"""What loops ask about the batch in hand: its values of all ranks, and where a pass begins."""

from __future__ import annotations

from typing import Any

from paceline.comm.communicator import FabricCommunicator
from paceline.errors import ConfigError
from paceline.spec import whole_number
from paceline.train.calls import joined_rows
from paceline.train.calls.turns import Turns
from paceline.train.data.following import Loaders
from paceline.train.data.loader import ShardedLoader


class BatchCalls:
    """`job.gather_for_metrics`, `job.skip` and `job.skip_first_batches`."""

    comm: FabricCommunicator
    turns: Turns
    loaders: Loaders

    def gather_for_metrics(self, values: Any) -> Any:
        """What all ranks computed of the batch in hand, in the order of one process; all ranks call it.

        Each sample once: ranks that repeat a batch because they ran out of samples contribute nothing. Ranks
        may have different numbers of rows. The batch is that of the innermost pass over a prepared loader
        that is not over. Under methods whose replicas differ between synchronisations each rank's values are
        those of its own replica, as are BatchNorm's statistics: `job.evaluate` measures the consensus model.

        Args:
            values: Tensors and NumPy arrays, whose rows are joined; dicts, tuples and lists of them; lists of
                anything else (strings, numbers, dicts: one entry per sample), which are joined. A single
                number, string or tensor without a dimension gives one entry for each rank with samples.

        Returns:
            The same structure, detached, on the device where this rank's values are; equal on all ranks.

        Raises:
            ConfigError: No batch of a prepared loader is in hand, or values that cannot travel.
            Mismatch: Ranks give different structures, or rows of different shapes.

        Example:
            `logits, targets = job.gather_for_metrics((model(x), y))`
        """
        batch = self.loaders.hands.gathered(values)
        if batch is None:
            raise ConfigError(
                f"rank {self.comm.rank}: job.gather_for_metrics outside a pass over a prepared loader, where"
                " it cannot know which samples count: call it in `for batch in loader:` with the loader that"
                " prepare() returned, or use job.gather_objects(value)"
            )
        loader = batch.loader
        if not loader.is_gathered and loader.leaves_out_ranks:
            raise ConfigError(
                f"rank {self.comm.rank}: job.gather_for_metrics: the first batch of this loader has fewer"
                " samples than there are ranks, and under torch.no_grad() those without any got none. Say"
                " loader.is_gathered = True before the loop, or use job.evaluate"
            )
        loader.is_gathered = True
        with self.turns.meeting(rests=False):  # in each batch, perhaps: no message to servers
            return joined_rows.gather(values, self.comm, counts=batch.own > 0, own=batch.own)

    def skip(self) -> None:
        """Say that the batch in hand is not trained: for a loop that leaves it out (`continue`).

        Of batches that the loop has fetched ahead, the one in hand is the first that was not trained yet.
        Loops that give their models the tensors of the batch need not say it, nor those whose batches all
        count alike. It concerns this rank alone.

        Example:
            ```
            for x, y in loader:
                if bad(x):
                    job.skip()
                    continue
            ```
        """
        self.loaders.hands.skip()

    def skip_first_batches(self, loader: ShardedLoader, num_batches: int = 0) -> ShardedLoader:
        """Let the next pass over a prepared loader begin after its first batches; all ranks call it.

        For loops that restore their state themselves: `job.load` goes on at the right sample without it. The
        order is that of the whole pass, `len(loader)` too; later passes are whole. Batches that are skipped
        are not trained, so `job.step` and `job.samples` do not count them. A checkpoint that is saved in such
        a pass goes on after its last trained sample.

        Args:
            loader: One that `prepare` returned.
            num_batches: How many batches to leave out, at least 0; default 0. As many as there are, or more,
                leave an empty pass.

        Returns:
            The loader.

        Raises:
            ConfigError: It was not prepared, a pass over it is open, or `job.load` has set another position.

        Example:
            `for x, y in job.skip_first_batches(loader, 100): …`
        """
        num_batches = whole_number("job.skip_first_batches: num_batches", num_batches, least=0)
        if not any(loader is known for known in self.loaders):
            raise ConfigError(
                f"job.skip_first_batches: a loader that prepare() returned expected, got"
                f" {type(loader).__name__}; loader = job.prepare(loader) first"
            )
        loader.skip(num_batches)
        return loader
