"""What is read from the files of plug-ins equals what their classes say when they are imported."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from paceline import declarations, plugins, registry
from paceline.codecs.kernel.codec import Codec
from paceline.codecs.reducers.reducer import Reducer
from paceline.errors import ConfigError
from paceline.strategies.base.staleness_policy import StalenessPolicy
from paceline.strategies.base.strategy import TrainingStrategy, make

PLUG_INS = [(package, name) for package in declarations.KINDS for name in registry.names(package)]
BASES = (TrainingStrategy, StalenessPolicy, Codec, Reducer)


@pytest.mark.parametrize(("package", "name"), PLUG_INS)
def test_a_declaration_is_that_of_the_class(package: str, name: str) -> None:
    module = registry.load(package, name, kind="plug-in")
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    (found,) = [c for c in own if issubclass(c, BASES) and not inspect.isabstract(c)]
    declared = declarations.read(package, name)
    assert declared is not None, "its class cannot be read without torch"
    parameters = inspect.signature(found).parameters.values()
    assert [(p.name, p.kind, p.default, p.annotation) for p in parameters] == [
        (p.name, p.kind, p.default, p.annotation) for p in declared.signature.parameters.values()
    ]
    assert declared.advice == getattr(found, "advice", "")
    assert declared.summary == (inspect.getdoc(found) or "").partition("\n")[0] != ""


@pytest.mark.parametrize(
    "text",
    [
        "all_reduse",
        "local_sgd(perod=3)",
        "local_sgd(period=many)",
        "local_sgd(codec=topq)",
        "all_reduce(codec=error_feedback(codec=onebit(blok=32)))",
        "parameter_server(staleness=softsync(c=4)+invers)",
        'parameter_server(staleness="softsync")',
        "single+all_reduce",
        "single(",
    ],
)
def test_mistakes_are_told_in_the_words_of_the_constructor(text: str) -> None:
    with pytest.raises(ConfigError) as early:
        declarations.check("paceline.strategies", text)
    with pytest.raises(ConfigError) as late:
        make(text)
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize(
    "text",
    [
        "single",
        "local_sgd(period=4, codec=topk(density=0.01))",
        "parameter_server(staleness=softsync(c=4)+inverse, codec=int8)",
        'gossip(mode="synchronous")',
        "local_sgd(codec=none)",
        "local_sgd(period=0)",  # a value that only the constructor refuses
    ],
)
def test_what_exists_is_accepted(text: str) -> None:
    declarations.check("paceline.strategies", text)


def test_a_plug_in_of_a_user_is_listed_and_left_to_its_constructor(tmp_path: Path) -> None:
    file = tmp_path / "declared_elsewhere.py"
    file.write_text(
        "from paceline.strategies.local_sgd import LocalSGD\n\n\n"
        "class Mine(LocalSGD):\n"
        '    """Mine."""\n\n'
        '    advice = "Only a test."\n\n'
        "    def __init__(self, *, often: int = 2) -> None:\n"
        "        super().__init__(period=often)\n"
    )
    plugins.load(str(file))
    declarations.check("paceline.strategies", "declared_elsewhere(anything=1)")
    assert declarations.read("paceline.strategies", "declared_elsewhere") is None
    found = declarations.read_all("paceline.strategies")["declared_elsewhere"]
    assert (list(found.signature.parameters), found.advice) == (["often"], "Only a test.")
