"""The little language of conditions in a config: Python's expressions, without anything that could do harm.

    model.name == 'resnet18' and loop.batch_size * loop.accumulate <= 256
    task.terms.features.weight == null or task.terms.features.weight < 4

Names are dotted config keys; null, true and false may be written as in YAML.
"""

from __future__ import annotations

import ast
import difflib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from potstill.errors import UserError

_EXAMPLE = "write it such as \"model.name == 'resnet18' and loop.batch_size >= 32\""
_LANGUAGE = (
    "made of names, numbers, texts, lists, comparisons, and/or/not, + - * / // % ** and "
    "min, max, abs, len, round"
)
_CONSTANTS = {"null": None, "true": True, "false": False}
_LARGEST = 64


def _power(base: float, exponent: float) -> float:
    if abs(exponent) > _LARGEST or (isinstance(base, int) and abs(base) > 2**64):
        raise ValueError(f"** takes exponents up to {_LARGEST} and whole numbers up to 2**64")
    if isinstance(result := base**exponent, complex):
        raise ValueError("a negative number has no such power")
    return result


def _round(number: float, digits: int = 0) -> float:
    if abs(digits) > _LARGEST:  # 10**-digits is worked out for whole numbers
        raise ValueError(f"round takes up to {_LARGEST} digits")
    return round(number, digits) if digits else round(number)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": min, "max": max, "abs": abs, "len": len, "round": _round,
}  # fmt: skip
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power,
}  # fmt: skip
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


class Expression:
    """A condition over dotted names: comparisons, and/or/not, arithmetic, lists, and min, max, abs, len, round.

    It is read by Python's grammar and worked out here node by node, never by eval. `key` is its place in the config,
    for errors. Raises UserError for anything else that it holds.
    """

    def __init__(self, text: str, key: str) -> None:
        self.text, self.key = text, key
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{key} must be an expression in quotes, got {text!r}; {_EXAMPLE}")
        try:
            self._root = ast.parse(text.strip().replace("\n", " "), mode="eval").body
            self.names = frozenset(self._names(self._root))
        except UserError:
            raise
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            said = getattr(error, "msg", None) or str(error) or "nested too deeply"
            raise UserError(
                f"{key} must be an expression that can be read, got {text!r} ({said}); {_EXAMPLE}"
            ) from None

    def _names(self, node: ast.AST) -> Iterator[str]:
        """The dotted names below a node. Raises UserError for what the language does not have."""
        parts: Sequence[ast.AST] = ()
        match node:
            case ast.Constant(value=value) if value is None or type(value) in (bool, int, float, str):  # fmt: skip
                pass
            case ast.Name() | ast.Attribute() if (name := _dotted(node)) is not None:
                if name not in _CONSTANTS:
                    yield name
            case ast.UnaryOp() if type(node.op) in _UNARY:
                parts = [node.operand]
            case ast.BinOp() if type(node.op) in _BINARY:
                parts = [node.left, node.right]
            case ast.BoolOp():
                parts = node.values
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                parts = [node.left, *node.comparators]
            case ast.List() | ast.Tuple():
                parts = node.elts
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
                parts = node.args
            case _:
                is_is = isinstance(node, ast.Compare)
                remedy = "compare by ==, as in `x == null`" if is_is else _EXAMPLE
                raise UserError(
                    f"{self.key} must be {_LANGUAGE}, got `{ast.unparse(node)}` ({type(node).__name__}) in "
                    f"{self.text!r}; {remedy}"
                )
        for part in parts:
            yield from self._names(part)

    def value(self, values: Mapping[str, Any]) -> Any:
        """Raises UserError for a name that is not in `values`, and where it cannot be worked out."""
        try:
            return self._of(self._root, values)
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            seen = [f"{n} = {as_text(values[n])}" for n in sorted(self.names & values.keys())]
            raise UserError(
                f"{self.key}: {self.text!r} must have a value, got {error}, with {', '.join(seen) or 'no names'}; "
                "what may be null or 0 is asked for first, as in `x != null and x > 1`"
            ) from error

    def holds(self, values: Mapping[str, Any]) -> bool:
        return bool(self.value(values))

    def _of(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name() | ast.Attribute():
                name = _dotted(node)
                assert name is not None
                if name in _CONSTANTS:
                    return _CONSTANTS[name]
                if name not in values:
                    raise UserError(
                        f"{self.key}: {self.text!r} may read keys of the config and variables of search.space, got {name}, "
                        f"which has no value here; {near(name, values)}"
                    )
                return values[name]
            case ast.UnaryOp(op=op, operand=operand):
                return _UNARY[type(op)](self._of(operand, values))
            case ast.BinOp(left=left, op=op, right=right):
                pair = self._of(left, values), self._of(right, values)
                # of texts and lists, * and % could fill the memory
                if not all(isinstance(x, int | float) for x in pair):
                    raise TypeError(f"arithmetic with {as_text(pair[0])} and {as_text(pair[1])}")
                return _BINARY[type(op)](*pair)
            case ast.BoolOp(op=op, values=parts):
                value = None
                for part in parts:
                    value = self._of(part, values)
                    if bool(value) == isinstance(op, ast.Or):
                        break
                return value
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                a, result = self._of(left, values), True
                for op, comparator in zip(ops, comparators, strict=True):
                    b = self._of(comparator, values)
                    if not (result := _COMPARE[type(op)](a, b)):
                        break
                    a = b
                return result
            case ast.List(elts=elts) | ast.Tuple(elts=elts):
                return [self._of(e, values) for e in elts]
            case ast.Call(func=ast.Name(id=name), args=args):
                return _FUNCTIONS[name](*(self._of(a, values) for a in args))
        raise AssertionError(f"{type(node).__name__} has passed _names")


def _dotted(node: ast.AST) -> str | None:
    """The dotted key that a chain of attributes spells; None where it starts with something else than a name."""
    match node:
        case ast.Name(id=name):
            return None if name.startswith("__") else name
        case ast.Attribute(value=inner, attr=name) if not name.startswith("__"):
            before = _dotted(inner)
            return None if before is None else f"{before}.{name}"
    return None


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "check its spelling"
