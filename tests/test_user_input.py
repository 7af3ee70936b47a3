"""Whatever a user writes, a parser answers with a result or with one of our own errors, soon."""

from __future__ import annotations

import itertools

import pytest
from fuzzing import Parser, check, damaged, warm_up
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from input_parsers import PARSERS


@pytest.mark.parametrize("parser", PARSERS, ids=lambda p: p.name)
def test_damaged_input_gives_only_our_errors(parser: Parser) -> None:
    warm_up(parser)
    for data in itertools.islice(damaged(parser), 300):
        check(parser, data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda p: p.name)
def test_much_damaged_input_gives_only_our_errors(parser: Parser) -> None:
    warm_up(parser)
    for data in itertools.islice(damaged(parser, seed=1), 2000):
        check(parser, data)


@pytest.mark.slow
@pytest.mark.property
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("parser", PARSERS, ids=lambda p: p.name)
def test_any_input_gives_only_our_errors(parser: Parser) -> None:
    inputs = st.binary(max_size=100) if isinstance(parser.examples[0], bytes) else st.text(max_size=60)

    @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(data: str | bytes) -> None:
        check(parser, data)

    warm_up(parser)
    run()
