"""Predict the next character of a text file, e.g. of Shakespeare's plays (tinyshakespeare, 1.1 MB).

Accuracy is the share of characters guessed right, each from up to 63 before it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from paceline.errors import ConfigError
from paceline.tasks.task import Task

_LENGTH = 64
_TEST_SHARE = 0.1
_SHORTEST = 50 * (_LENGTH + 1)


class Sequences(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Stretches of 64 characters, and the same shifted by one: int64 [64], int64 [64]."""

    def __init__(self, characters: Tensor) -> None:
        self._characters = characters

    def __len__(self) -> int:
        return (len(self._characters) - 1) // _LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = self._characters[index * _LENGTH : (index + 1) * _LENGTH + 1].long()
        return piece[:-1], piece[1:]


class CharacterModel(nn.Module):
    """A recurrent network: characters [N, T] to logits [N, T, vocabulary]."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 48)
        self.recurrent = nn.GRU(48, 160, batch_first=True)
        self.output = nn.Linear(160, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of the character after each."""
        states, _ = self.recurrent(self.embedding(characters))
        logits: Tensor = self.output(states)
        return logits


def build(data: Path) -> Task:
    """The last tenth of the text in `data` (UTF-8) is the test set."""
    try:
        text = data.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{data}: a text file in UTF-8 expected: {error}") from None
    if len(text) < _SHORTEST:
        raise ConfigError(f"{data}: at least {_SHORTEST} characters expected, got {len(text)}")
    vocabulary = sorted(set(text))
    if len(vocabulary) > 4096:
        raise ConfigError(f"{data}: at most 4096 different characters expected, got {len(vocabulary)}")
    number = {c: i for i, c in enumerate(vocabulary)}
    characters = torch.tensor([number[c] for c in text], dtype=torch.int16)
    cut = int(len(characters) * (1 - _TEST_SHARE))
    model = CharacterModel(len(vocabulary))
    return Task(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=4e-3),
        train_set=Sequences(characters[:cut]),
        test_set=Sequences(characters[cut:]),
        batch_size=64,
        epochs=2,
    )
