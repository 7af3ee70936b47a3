"""Space-time pictures: what is on them, and that those in docs/ are the current ones."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from paceline import collectives
from paceline.cli.main import make_app
from paceline.errors import ConfigError
from paceline.schedule.drawing import draw
from paceline.schedule.drawing.holdings import Holdings

PICTURES = Path(__file__).resolve().parents[3] / "docs" / "pictures"
NAMES = ("ring", "double_binary_tree", "hierarchical", "hybrid")


def words_of(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_in_docs_are_current(name: str, tmp_path: Path) -> None:
    target = tmp_path / "picture.svg"
    result = CliRunner().invoke(make_app(), ["schedule", "show", name, "--ranks", "8", "--svg", str(target)])
    assert result.exit_code == 0
    assert target.read_text() == (PICTURES / f"{name}.svg").read_text(), (
        f"make it again: paceline schedule show {name} --ranks 8 --svg docs/pictures/{name}.svg"
    )
    assert f"pictures/{name}.svg" in (PICTURES.parent / "collectives.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_explains_itself(name: str) -> None:
    words = words_of((PICTURES / f"{name}.svg").read_text())
    text = " ".join(words)
    assert f"{name} · all_reduce · 8 ranks" in words
    assert any(w.endswith(".") for w in words[1:2]), "a caption of one sentence"
    assert {f"rank {r}" for r in range(8)} <= set(words)
    assert "time →" in words
    assert "chunk 3 is sent and added to what the receiver has" in words
    assert "chunk 3 is copied to the receiver" in words
    assert "the sum of all 8 ranks" in text
    if name == "double_binary_tree":
        assert {"channel 0", "channel 1"} <= set(words)
    if name in ("hierarchical", "hybrid"):
        assert {"host 0", "host 1"} <= set(words)
        assert "between hosts" in text


def test_every_arrow_has_a_label_in_its_colour() -> None:
    svg = draw.svg(collectives.build("double_binary_tree", "all_reduce", 8))
    arrows = re.findall(r'class="arrow"><title>([^<]*)</title><line[^>]*stroke="(#\w+)"', svg)
    labels = re.findall(r'<text x="[\d.]+" y="[\d.]+" fill="(#\w+)">\+?([^<]+)</text>', svg)
    assert len(arrows) == 2 * 2 * 7 * 4
    assert len(labels) == len(arrows)
    assert sorted(c for _, c in arrows) == sorted(c for c, _ in labels)
    for title, colour in arrows:
        tree = int(re.search(r"\[(\d+)\]", title)[1]) // 4  # type: ignore[index]
        assert colour == ("#0072b2", "#d55e00")[tree]


def test_alike_arrows_of_a_rank_share_one_label() -> None:
    svg = draw.svg(collectives.build("all_pairs", "all_reduce", 6))
    assert len(re.findall(r'class="arrow"', svg)) == 2 * 6 * 5
    assert len(re.findall(r'<text x="[\d.]+" y="[\d.]+" fill=', svg)) == 2 * 6


def test_holdings_end_complete_and_follow_the_ring() -> None:
    moments = list(Holdings(collectives.build("ring", "all_reduce", 4)).walk())
    assert np.allclose(moments[1].complete.sum(axis=1), 3 * 0.25 + 0.5)
    diagonal = moments[3].complete == 1.0
    assert (diagonal.sum(axis=0) == 1).all()
    assert (diagonal.sum(axis=1) == 1).all()
    assert (moments[-1].complete == 1.0).all()


@pytest.mark.parametrize("operation", ["all_to_all", "all_gather", "broadcast", "reduce", "barrier"])
def test_every_result_is_green_at_the_end(operation: str) -> None:
    for name, module in collectives.algorithms().items():
        if operation in module.OPERATIONS and collectives.supports(name, operation, 6):
            *_, last = Holdings(collectives.build(name, operation, 6)).walk()
            held = last.complete[:1] if operation == "reduce" else last.complete
            assert (held == 1.0).all(), name


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 64 ranks"):
        draw.svg(collectives.build("ring", "all_reduce", 65))
    with pytest.raises(ConfigError, match="more than 128 steps"):
        draw.svg(collectives.build("ring_chunked", "all_reduce", 40))


def test_text_is_escaped() -> None:
    svg = draw.svg(collectives.build("ring", "all_reduce", 2), caption="<b> & co", hosts=["<x>", "y"])
    assert "<b> & co" in words_of(svg)
