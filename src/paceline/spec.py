"""Spec strings: how a user names a plug-in and its arguments on one line.

    local_sgd(period=16)
    parameter_server(shards=4, staleness=softsync(c=4)+inverse)
    direct(shares=33/33/34/0)

Grammar:  value := number ("/" number)* | true | false | none | "text" | sum      sum := term ("+" term)*
          term := name [ "(" key "=" value ("," key "=" value)* ")" ]

Parsed by hand and never evaluated: a spec may come from a command line, a file or a peer.
"""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import ConfigError

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)(?![\w.]))
    |(?P<name>[A-Za-z_][\w]*)|(?P<text>"[^"]*"|'[^']*')|(?P<mark>[()=,+/]))""",
    re.VERBOSE,
)
_BLANKS = re.compile(r"\s*")
_CONSTANTS = {"true": True, "false": False, "none": None}
_MAX_LENGTH = 4096
_MAX_DEPTH = 16


@dataclass(frozen=True)
class Spec:
    """A name with keyword arguments.

    An argument may itself be a Spec, a tuple of Specs joined by `+`, or a tuple of numbers with `/` between.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.arguments:
            return self.name
        return f"{self.name}({', '.join(f'{k}={_show(v)}' for k, v in self.arguments.items())})"


def parse(text: str) -> Spec:
    """Parse one spec string; ConfigError points at the character that does not fit."""
    parts = parse_sum(text)
    if len(parts) != 1:
        raise ConfigError(f"{text!r}: one name expected, got {len(parts)} joined by '+'")
    return parts[0]


def parse_sum(text: str) -> tuple[Spec, ...]:
    """Parse `a(x=1)+b` into its terms."""
    if len(text) > _MAX_LENGTH:
        raise ConfigError(f"spec of {len(text)} characters; at most {_MAX_LENGTH} are accepted")
    parser = _Parser(text)
    value = parser.value(depth=0)
    parser.expect_end()
    if isinstance(value, Spec):
        return (value,)
    if isinstance(value, tuple) and all(isinstance(term, Spec) for term in value):
        return value
    raise ConfigError(f"{text!r}: a name such as all_reduce expected, got {value!r}")


def split_list(text: str) -> list[str]:
    """Split `single,local_sgd(period=8, average=true)` at the commas outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, ch in enumerate(text):
        if quote:
            quote = "" if ch == quote else quote
        elif ch in "\"'":
            quote = ch
        elif ch in "()":
            depth += 1 if ch == "(" else -1
        elif ch == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]


def call(factory: Callable[..., Any], spec: Spec, *, kind: str) -> Any:
    """`factory(**spec.arguments)`, or a ConfigError that lists what it takes."""
    signature = inspect.signature(factory)
    check(signature, spec, kind=kind)
    try:
        return factory(**spec.arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{kind} {spec}: {error}. It takes: {shown(signature)}") from error


def check(signature: inspect.Signature, spec: Spec, *, kind: str) -> None:
    """ConfigError for arguments that `signature` does not take, and for words where it takes numbers.

    Args:
        signature: Of what the spec's name stands for; annotations may be text.
        spec: The spec. Whether its numbers make sense, only what it names knows.
        kind: What the name is, for errors: "strategy", "codec".
    """
    try:
        signature.bind(**spec.arguments)
    except TypeError as error:
        raise ConfigError(f"{kind} {spec}: {error}. It takes: {shown(signature)}") from None
    _check_kinds(signature, spec, kind)


def whole_number(name: str, value: object, *, least: int) -> int:
    """Return `value` if it is a whole number of at least `least`; else raise a ConfigError that names it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(f"{name}={value!r}: a whole number >= {least} expected")
    return int(value)


def _check_kinds(signature: inspect.Signature, spec: Spec, kind: str) -> None:
    """Words where numbers or true and false belong: `tau=nan`, `entropy=maybe`. The rest is the plug-in's."""
    parameters = signature.parameters
    for name, value in spec.arguments.items():
        if name not in parameters or value is None:
            continue
        wanted = set(str(parameters[name].annotation).split(" | ")) - {"None"}
        if wanted == {"bool"} and not isinstance(value, bool):
            expected = "true or false"
        elif wanted and wanted <= {"int", "float"} and isinstance(value, Spec | str | tuple):
            expected = "a whole number" if wanted == {"int"} else "a number"
        else:
            continue
        raise ConfigError(
            f"{kind} {spec}: {name}: {expected} expected, got {_show(value)}. It takes: {shown(signature)}"
        )


def shown(signature: inspect.Signature) -> str:
    """Return `period=16, codec=none, rate=(chosen)`: the arguments that a spec may give.

    A number that is not given is chosen for the run.
    """
    arguments = [
        p.name if p.default is p.empty else f"{p.name}={'(chosen)' if _is_chosen(p) else _show(p.default)}"
        for p in signature.parameters.values()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return ", ".join(arguments) or "none"


def _is_chosen(parameter: inspect.Parameter) -> bool:
    kinds = str(parameter.annotation)
    return parameter.default is None and ("int" in kinds or "float" in kinds)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ("+" if isinstance(value[0], Spec) else "/").join(_show(v) for v in value)
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)


def _number(token: str) -> float:
    return float(token) if any(c in token for c in ".eE") else int(token)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self._error(f"nested deeper than {_MAX_DEPTH}")
        kind, token = self._take("a name or a value")
        if kind == "number":
            return self._numbers(token)
        if kind == "text":
            return token[1:-1]
        if kind == "mark":
            raise self._error(f"a name or a value expected, got {token!r}")
        if token.lower() in _CONSTANTS and not self._peek("("):
            return _CONSTANTS[token.lower()]
        terms = [self._term(token, depth)]
        while self._peek("+"):
            self._take("'+'")
            kind, token = self._take("a name")
            if kind != "name":
                raise self._error(f"a name expected after '+', got {token!r}")
            terms.append(self._term(token, depth))
        return terms[0] if len(terms) == 1 else tuple(terms)

    def _numbers(self, token: str) -> float | tuple[float, ...]:
        """A number, or several with '/' between them as a tuple."""
        numbers = [_number(token)]
        while self._peek("/"):
            self._take("'/'")
            kind, token = self._take("a number")
            if kind != "number":
                raise self._error(f"a number expected after '/', got {token!r}")
            numbers.append(_number(token))
        return numbers[0] if len(numbers) == 1 else tuple(numbers)

    def expect_end(self) -> None:
        if self._text[self._position :].strip():
            raise self._error("nothing more expected")

    def _term(self, name: str, depth: int) -> Spec:
        arguments: dict[str, Any] = {}
        if not self._peek("("):
            return Spec(name)
        self._take("'('")
        while not self._peek(")"):
            kind, key = self._take("an argument's name")
            if kind != "name":
                raise self._error(f"an argument's name expected, got {key!r}; write {name}(key=value)")
            if key in arguments:
                raise self._error(f"argument {key!r} given twice")
            if self._take("'='")[1] != "=":
                raise self._error(f"'=' expected after {key!r}")
            arguments[key] = self.value(depth + 1)
            if not self._peek(")") and self._take("',' or ')'")[1] != ",":
                raise self._error("',' or ')' expected")
        self._take("')'")
        return Spec(name, arguments)

    def _peek(self, mark: str) -> bool:
        blanks = _BLANKS.match(self._text, self._position)
        return self._text.startswith(mark, blanks.end() if blanks else self._position)

    def _take(self, expected: str) -> tuple[str, str]:
        match = _TOKEN.match(self._text, self._position)
        if match is None:
            raise self._error(f"{expected} expected")
        self._position = match.end()
        assert match.lastgroup is not None
        return match.lastgroup, match[match.lastgroup]

    def _error(self, why: str) -> ConfigError:
        before = self._text[: self._position]
        return ConfigError(
            f"cannot read {self._text!r} after {before!r}: {why}. Example: local_sgd(period=16)"
        )
