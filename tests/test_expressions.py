"""The language of conditions: what it works out, and that it does nothing else."""

import itertools
import math
import pickle
import time

import pytest

from potstill.errors import UserError
from potstill.expressions import Expression

KEY = "search.conditions[2]"
VALUES = {
    "a": 3,
    "b": 0.5,
    "zero": 0,
    "name": "resnet18",
    "nothing": None,
    "yes": True,
    "model.name": "vit",
    "model.kwargs.dim": 64,
    "layers": [1, 2, 3],
}


def worked_out(text):
    return Expression(text, KEY).value(VALUES)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a + 2 * b - 1", 3.0),
        ("a ** 2 // 2 % 3", 1),
        ("-a / 2", -1.5),
        ("+a - -a", 6),
        ("2 ** -1", 0.5),
        ("1 < a <= 3 < 4", True),
        ("1 < a < 3 < zero / zero", False),  # the rest of a chain is not asked
        ("name in ['resnet18', 'resnet50']", True),
        ("name not in ('resnet50',)", True),
        ("2 in layers and 'net' in name", True),
        ("nothing == null and nothing == None", True),
        ("yes == true and yes == True and not false", True),
        ("model.name == 'vit' and model.kwargs.dim * 2 == 128", True),
        ("nothing != null and nothing > 1", False),
        ("nothing == null or nothing > 1", True),
        ("min(a, 2) + max(layers) + abs(-1) + len(name) + round(2.6)", 17),
        ("round(2.126, 2) == 2.13", True),
        ("layers == (1, 2, 3)", True),
        ("(yes) + (a > 1) <= 1", False),
        ("\n a == 3\n  and b == 0.5 \n", True),
    ],
)
def test_by_hand(text, value):
    assert worked_out(text) == value


def test_names_are_dotted_and_without_functions_and_constants():
    text = "min(a, model.kwargs.dim) > 1 and null == None or [min, x.y.z] == true"
    assert Expression(text, KEY).names == {"a", "model.kwargs.dim", "min", "x.y.z"}
    assert Expression("1 < 2", KEY).names == frozenset()


def test_as_python_has_it():
    """Every pair of operators over a few numbers, against Python's own precedence."""
    operators = ["+", "-", "*", "/", "//", "%", "**", "<", "<=", "==", "!=", ">", "and", "or"]
    for one, two in itertools.product(operators, repeat=2):
        text = f"a {one} b {two} not c" if two in ("and", "or") else f"a {one} b {two} c"
        for a, b, c in itertools.product((2, 0.5, 3), repeat=3):
            values = {"a": a, "b": b, "c": c}
            try:
                expected = eval(text, values.copy())
            except (ArithmeticError, TypeError):
                expected = UserError
            try:
                got = Expression(text, KEY).value(values)
            except UserError:
                got = UserError
            assert got == expected, (text, values)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("().__class__", "Attribute"),
        ("'a'.upper() == 'A'", "Call"),
        ("(a).__class__ == 1", "Attribute"),
        ("model.__dict__ == 1", "Attribute"),
        ("__import__ == 1", "Name"),
        ("__import__('os')", "Call"),
        ("open('x')", "Call"),
        ("model.name('x')", "Call"),
        ("min(a, key=b)", "Call"),
        ("max(*layers)", "Starred"),
        ("[*layers]", "Starred"),
        ("(lambda: 1)()", "Call"),
        ("lambda: 1", "Lambda"),
        ("[x for x in layers]", "ListComp"),
        ("max(x for x in layers)", "GeneratorExp"),
        ("layers[0]", "Subscript"),
        ("{'a': 1}", "Dict"),
        ("{1, 2}", "Set"),
        ("f'{a}'", "JoinedStr"),
        ("a if b else 1", "IfExp"),
        ("(x := 1)", "NamedExpr"),
        ("a & b", "BinOp"),
        ("~a", "UnaryOp"),
        ("a @ b", "BinOp"),
        ("1 << 99", "BinOp"),
        ("b'a' == a", "Constant"),
        ("1j", "Constant"),
        ("...", "Constant"),
        ("await a", "Await"),
    ],
)
def test_what_the_language_does_not_have(text, what):
    with pytest.raises(UserError) as refused:
        Expression(text, KEY)
    said = str(refused.value)
    assert said.startswith(f"{KEY} must be made of names")
    assert f"({what})" in said
    assert "write it such as" in said


def test_is_has_a_remedy_of_its_own():
    with pytest.raises(UserError, match="compare by =="):
        Expression("a is None", KEY)


@pytest.mark.parametrize(
    "text",
    ["a ==", "a = 1", "import os", "a; b", "model.lambda == 1", "(" * 5000, "-" * 50_000 + "1", "a\0b",
     "not " * 20_000 + "a", "9" * 5000],
)  # fmt: skip
def test_what_cannot_be_read(text):
    with pytest.raises(UserError, match=r"search.conditions\[2\] must be an expression that can"):
        Expression(text, KEY)


@pytest.mark.parametrize("text", [None, True, 3, "", "  ", ["a"]])
def test_what_is_no_text(text):
    with pytest.raises(UserError, match="must be an expression in quotes"):
        Expression(text, KEY)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing > 1", "'>' not supported between instances of 'NoneType' and 'int'.*nothing = null"),
        ("name < a", 'with a = 3, name = "resnet18"; what may be null'),
        ("a / zero", "division by zero, with a = 3, zero = 0"),
        ("a % zero", "zero"),
        ("zero ** -1", "zero"),
        ("name + 'x'", 'arithmetic with "resnet18" and "x"'),
        ("name * 1000000000", "arithmetic"),
        ("layers * 1000000000", "arithmetic"),
        ("'%1000000000d' % 1", "arithmetic"),
        ("-name", "bad operand"),
        ("1 in a", "not iterable"),
        ("len(a)", "has no len"),
        ("min()", "at least 1 argument"),
        ("(-8) ** 0.5", "negative number has no such power"),
        ("2 ** 65", "exponents up to 64"),
        ("2 ** -65", "exponents up to 64"),
        ("9 ** 9 ** 9 ** 9", "exponents up to 64"),
        ("((9 ** 64) ** 64) ** 64", "whole numbers up to"),
        ("round(a, -99999999999)", "up to 64 digits"),
        ("1e308 ** 2", "Numerical result|too large"),
        ("round(1e999)", "infinity"),
    ],
)  # fmt: skip
def test_what_has_no_value(text, said):
    expression = Expression(text, KEY)
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as refused:
        expression.value(VALUES)
    assert time.monotonic() - start < 1
    assert str(refused.value).startswith(f"{KEY}: {text!r} must have a value, got ")


def test_a_name_without_a_value_gets_those_near():
    with pytest.raises(UserError, match=r"got model.nam, .*; did you mean model.name or"):
        worked_out("model.nam == 'vit'")
    with pytest.raises(UserError, match="got q, which has no value here; check its spelling"):
        worked_out("q == 1")


def test_names_behind_a_decided_and_or_are_not_asked():
    assert worked_out("yes or unknown")
    assert not worked_out("zero and unknown")


def test_holds_and_travels():
    expression = pickle.loads(pickle.dumps(Expression("a - 3 or layers", KEY)))
    assert expression.value(VALUES) == [1, 2, 3]
    assert expression.holds(VALUES) is True
    assert Expression("a - 3", KEY).holds(VALUES) is False
    assert Expression("b == b", KEY).holds({"b": math.nan}) is False
