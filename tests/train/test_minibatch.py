"""The phases of a minibatch: every transition of the table, and a refusal of all others."""

from __future__ import annotations

import itertools

import pytest

from paceline.train.minibatch import TRANSITIONS, AccumulationWindow, MinibatchEvent, MinibatchState, Phase


def state_in(phase: Phase) -> MinibatchState:
    state = MinibatchState()
    ways = {
        Phase.IDLE: (),
        Phase.BACKWARD: (MinibatchEvent.BACKWARD_BEGINS,),
        Phase.UNSENT: (MinibatchEvent.BACKWARD_BEGINS, MinibatchEvent.GRADIENTS_KEPT),
        Phase.COMPLETE: (MinibatchEvent.BACKWARD_BEGINS, MinibatchEvent.GRADIENTS_REDUCED),
    }
    for event in ways[phase]:
        state.advance(event)
    assert state.phase is phase
    return state


@pytest.mark.parametrize(
    ("phase", "event"), list(itertools.product(Phase, MinibatchEvent)), ids=lambda x: x.name
)
def test_every_transition_of_the_table_and_no_other(phase: Phase, event: MinibatchEvent) -> None:
    state = state_in(phase)
    if (phase, event) in TRANSITIONS:
        state.advance(event)
        assert state.phase is TRANSITIONS[phase, event]
    else:
        with pytest.raises(AssertionError, match=f"{event.name} in phase {phase.name}"):
            state.advance(event)


@pytest.mark.parametrize("before", [Phase.IDLE, Phase.UNSENT, Phase.COMPLETE])
def test_a_backward_that_raised_leaves_the_phase_in_which_it_began(before: Phase) -> None:
    state = state_in(before)
    state.advance(MinibatchEvent.BACKWARD_BEGINS)
    state.backward_was_abandoned()
    assert state.phase is before
    state.backward_was_abandoned()  # nothing runs: nothing changes
    assert state.phase is before


def test_a_window_weighs_all_its_micro_batches_and_begins_again_after_an_update() -> None:
    window = AccumulationWindow(1)
    window.add(2, 8, is_last=False)
    window.backwards += 1
    window.add(1, 4, is_last=True)
    assert (window.own_samples, window.all_samples, window.is_last_batch) == (3, 12, True)
    window.backwards = 0  # reduced
    window.add(5, 10, is_last=False)
    assert (window.own_samples, window.all_samples, window.is_last_batch) == (5, 10, False)
    window.clear()
    assert (window.own_samples, window.all_samples) == (0, 0)
