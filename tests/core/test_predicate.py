"""Predicates: meaning by hand, columns, null as unknown, mistakes told before any work."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from core.predicate import Predicate

TABLE = pa.table(
    {
        "a.x": [1, None, 5],
        "a.s": pa.array(["en", None, "a.x < 1"], pa.large_string()),
        "kind": pa.array(["web", "book", None], pa.large_string()),
        "fate@e.keep": [True, None, False],
    }
)
T, F, N = True, False, None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.x < 3", [T, N, F]),
        ("3 > a.x", [T, N, F]),
        ("1 < a.x < 6", [F, N, T]),
        ("a.x <= 1 or a.x >= 5", [T, N, T]),
        ("a.x < 3 or a.x is null", [T, T, F]),
        ("a.x < 3 and kind == 'book'", [F, N, F]),
        ("a.x < 0 and a.s == 'none'", [F, N, F]),
        ("not a.x < 3", [F, N, T]),
        ("a.x is null", [F, T, F]),
        ("a.x is not null", [T, F, T]),
        ("(a.x < 3) is null", [F, T, F]),
        ("a.x == null", [N, N, N]),
        ("a.x + 1 > 2 * 1", [F, N, T]),
        ("a.x - 1 == 0", [T, N, F]),
        ("a.x / 2 == 0.5", [T, N, F]),
        ("1 / a.x == 0.2", [F, N, T]),
        ("-a.x < -3", [F, N, T]),
        ("a.s == 'en'", [T, N, F]),
        ("a.s == 'a.x < 1'", [F, N, T]),
        ('a.s == "a.x < 1"', [F, N, T]),
        (r"a.s == 'it\'s kind.of null'", [F, N, F]),
        ("a.s != 'fate@e'", [T, N, T]),
        ("a.s in ['en', 'de']", [T, N, F]),
        ("a.s not in ['en']", [F, N, T]),
        ("a.s in ('en',)", [T, N, F]),
        ("a.s in []", [F, N, F]),
        ("a.x in [-1, 5]", [F, N, T]),
        ("kind != 'web'", [F, T, N]),
        ("fate@e", [T, N, F]),
        ("not fate@e", [F, N, T]),
        ("fate@e.keep == true", [T, N, F]),
        ("true", [T, T, T]),
        ("1 > 2", [F, F, F]),
        ("null", [N, N, N]),
        ("a.x < 3\n  or a.x == 5", [T, N, T]),
    ],
)
def test_meaning(text, expected):
    predicate = pickle.loads(pickle.dumps(Predicate(text)))
    assert predicate.evaluate(TABLE).to_pylist() == expected
    assert predicate.evaluate({n: TABLE.column(n) for n in TABLE.column_names}).to_pylist() == expected
    batches = TABLE.to_batches(max_chunksize=1)
    assert [predicate.evaluate(b).to_pylist()[0] for b in batches] == expected
    held = predicate.holds(TABLE)
    assert held.dtype == bool
    assert held.tolist() == [e is True for e in expected]


def test_columns_and_layers():
    predicate = Predicate("(signals.words < 50 or fate@eligible) and kind != 'a.b' and dedup@x.rank is null")
    assert predicate.columns == ("dedup@x.rank", "fate@eligible.keep", "kind", "signals.words")
    assert predicate.layers == ("dedup@x", "fate@eligible", "signals")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected something like"),
        ("a.x <", "invalid syntax"),
        ("a.x < 3)", "unmatched"),
        ("a.x = 3", "expected something like"),
        ("a.s == 'open", "unterminated string"),
        ("a.x < 3; import os", "expected something like"),
        ("\0", "null bytes"),
        ("foo < 1", "no column 'foo'; expected layer.column or one of"),
        ("f(a.x) < 1", "Call is not allowed"),
        ("a.x.y < 1", "Attribute is not allowed"),
        ("a.x[0] < 1", "Subscript is not allowed"),
        ("a.x ** 2 > 1", "Pow is not allowed"),
        ("a.x if true else false", "IfExp is not allowed"),
        ("(lambda: 1)", "Lambda is not allowed"),
        ("[a.x]", "List is not allowed"),
        ("a.x == [1]", "List is not allowed"),
        ("a.x is 5", "`is` expects null"),
        ("a.x in a.s", "`in` expects a list of constants"),
        ("a.x in ['a', 1]", "`in` expects a list of constants"),
        ("a.x in [a.s]", "`in` expects a list of constants"),
        ("a.x in [1] == true", "`in` expects a list of constants"),
        ("a.x == b'x'", "is no constant"),
        ("a.x < 1j", "is no constant"),
        ("...", "is no constant"),
    ],
)
def test_mistakes_are_told_before_any_work(text, message):
    with pytest.raises(ConfigError) as caught:
        assert Predicate(text).columns
    assert repr(text) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.s < 3", "no kernel matching"),
        ("a.x", "gives int64, expected true or false"),
        ("a.x and a.x", "no kernel matching"),
        ("a.x + 1", "gives int64"),
        ("a.x < 99999999999999999999", "too large"),
        ("a.x in ['en']", "predicate"),
    ],
)
def test_types_that_do_not_fit_name_the_predicate(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Predicate(text).evaluate(TABLE)
    assert repr(text) in str(caught.value)


VALUES = st.lists(st.none() | st.integers(-3, 3), min_size=1, max_size=8)


@given(VALUES, st.integers(-3, 3), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
def test_a_predicate_and_its_negation_never_both_hold(values, bound, op):
    table = pa.table({"a.x": pa.array(values, pa.int64())})
    holds, fails = (Predicate(f"{word}(a.x {op} {bound})").holds(table) for word in ("", "not "))
    expected = [v is not None and eval(f"{v} {op} {bound}") for v in values]
    assert holds.tolist() == expected
    assert (holds | fails).tolist() == [v is not None for v in values]
    assert not np.any(holds & fails)


def test_a_constant_meets_a_float32_column_as_float32() -> None:
    column = {"signals.x": pa.array([0.3, 0.2, 0.4], pa.float32())}
    assert Predicate("signals.x > 0.3").holds(column).tolist() == [False, False, True]
    assert Predicate("0.3 >= signals.x").holds(column).tolist() == [True, True, False]
    assert Predicate("signals.x == 0.3").holds(column).tolist() == [True, False, False]
