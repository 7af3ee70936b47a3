from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline import spec
from paceline.errors import ConfigError
from paceline.spec import Spec


def test_nested_and_summed() -> None:
    parsed = spec.parse("parameter_server(shards=4, staleness=softsync(c=4)+inverse)")
    assert parsed == Spec(
        "parameter_server", {"shards": 4, "staleness": (Spec("softsync", {"c": 4}), Spec("inverse"))}
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("-2", -2), ("1e-3", 1e-3), ("0.5", 0.5), (".5", 0.5), ("True", True), ("none", None)]
    + [("'a, b'", "a, b"), ("plain", Spec("plain"))],
)
def test_values(text: str, value: object) -> None:
    assert spec.parse(f"x(a={text})").arguments["a"] == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "a(",
        "a(b",
        "a(b=",
        "a(b=1",
        "a(1)",
        "a(b=1 c=2)",
        "a)",
        "a b",
        "a(b=1,b=2)",
        "__import__('os')",
    ]
    + ["a+", "a+1", "1", "a(b=1)x", "a" * 5000, "a(b=" * 40],
)
def test_bad_text_is_a_clear_error(text: str) -> None:
    with pytest.raises(ConfigError):
        spec.parse(text)


def test_split_list_keeps_brackets() -> None:
    text = 'single,all_reduce, "local_sgd(a=1,b=2)",local_sgd(period=8, average="x,y")'
    assert spec.split_list(text)[-1] == 'local_sgd(period=8, average="x,y")'
    assert len(spec.split_list(text)) == 4


def test_call_lists_what_is_accepted() -> None:
    def build(*, period: int = 16) -> int:
        return period

    assert spec.call(build, spec.parse("x(period=3)"), kind="strategy") == 3
    with pytest.raises(ConfigError, match="period=16"):
        spec.call(build, spec.parse("x(perido=3)"), kind="strategy")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000),
    lambda inner: st.builds(
        Spec, st.sampled_from("abc"), st.dictionaries(st.sampled_from(["k", "l", "m"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["k", "l", "m"]), values, max_size=3))
def test_printing_and_parsing_are_inverse(arguments: dict) -> None:
    original = Spec("name", arguments)
    assert spec.parse(str(original)) == original


@given(st.text(max_size=40))
def test_any_text_parses_or_raises_config_error(text: str) -> None:
    try:
        spec.parse_sum(text)
    except ConfigError:
        pass


def plug_in(
    *, size: int = 1, rate: float | None = None, fast: bool = False, relay: bool | None = None
) -> tuple[object, ...]:
    return size, rate, fast, relay


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x(rate=nan)", "rate: a number expected, got nan"),
        ("x(size=eight)", "size: a whole number expected, got eight"),
        ("x(size='8')", "size: a whole number expected"),
        ("x(fast=maybe)", "fast: true or false expected, got maybe"),
        ("x(relay=1)", "relay: true or false expected, got 1"),
    ],
)
def test_words_are_no_numbers_and_numbers_no_flags(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        spec.call(plug_in, spec.parse(text), kind="test")


def test_arguments_that_fit_are_passed_on() -> None:
    assert spec.call(plug_in, spec.parse("x(size=3, rate=2, relay=none)"), kind="test") == (3, 2, False, None)


def test_whole_numbers_have_a_least_value() -> None:
    assert spec.whole_number("period", 1, least=1) == 1
    assert spec.whole_number("backup", 0, least=0) == 0


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None, Spec("many")])
def test_what_is_not_a_whole_number_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"period=.*: a whole number >= 1 expected"):
        spec.whole_number("period", value, least=1)


@pytest.mark.parametrize("text", ["1", "1/2", "none", "true", "'a'"])
def test_a_sum_is_made_of_names(text: str) -> None:
    with pytest.raises(ConfigError, match="a name such as all_reduce expected"):
        spec.parse_sum(text)
