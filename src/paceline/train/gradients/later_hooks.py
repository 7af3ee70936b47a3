"""Hooks of gradients that were registered after `prepare`: they would change what is being sent already."""

from __future__ import annotations

from torch import nn

from paceline.errors import ConfigError
from paceline.train.replica import FlatReplica


class LaterHooks:
    """Refuses `register_post_accumulate_grad_hook` on parameters whose gradients are summed over the ranks.

    torch calls such hooks in the order in which they were registered. One from before `prepare` sees this
    rank's gradient, as it would under DDP.

    Args:
        replica: Names the parameters.
        rank: This rank.
    """

    def __init__(self, replica: FlatReplica, rank: int) -> None:
        self._replica, self._rank = replica, rank
        self._known: dict[int, int] = {}  # by parameter, how many hooks it had in its first backward pass

    def check(self, parameter: nn.Parameter) -> None:
        """Called by our own hook of `parameter`."""
        hooks = parameter._post_accumulate_grad_hooks or {}  # noqa: SLF001
        if self._known.get(id(parameter)) == len(hooks):
            return
        self._known[id(parameter)] = len(hooks)
        is_ours = [getattr(hook, "__module__", "").startswith("paceline.") for hook in hooks.values()]
        if True in is_ours and not all(is_ours[is_ours.index(True) :]):
            raise ConfigError(
                f"rank {self._rank}: {self._replica.name(parameter)} got a post-accumulate-grad hook after"
                " prepare(): its gradient is on its way to the other ranks when the hook runs. Change"
                " gradients, or call optimizer.step(), after backward, where they are those of all ranks; or"
                " register the hook before prepare(): it then gets this rank's gradient"
            )
