"""Predicates over columns, as users write them in a config: `signals.words < 50 or language.language != 'en'`.

Columns are `layer.column` (`fate@eligible.keep`; `fate@eligible` alone means its `keep`) or document columns (`kind`, `source`).
Operators: `< <= > >= == !=`, `in [..]`, `not in [..]`, `and or not`, `+ - * /`, `is null`, `is not null`, parentheses; constants
are numbers, quoted strings, true, false. Null is unknown, as in SQL: `null < 1` is null, and a null predicate does not hold.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import ConfigError
from core.schema import DOCUMENTS

_TOKENS = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?P<column>[A-Za-z_]\w*(?:@\w+)?\.[A-Za-z_]\w*|[A-Za-z_]\w*@\w+)|\b(?P<word>null|true|false)\b"""
)
_WORDS = {"null": "None", "true": "True", "false": "False"}
_COMPARE = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_ARITHMETIC = {ast.Add: pc.add, ast.Sub: pc.subtract, ast.Mult: pc.multiply, ast.Div: pc.divide}


@dataclass(frozen=True)
class Predicate:
    """A parsed predicate. Picklable: it is its text."""

    text: str

    def __post_init__(self) -> None:
        _check(self._tree, self.text)

    def __reduce__(self) -> tuple[type["Predicate"], tuple[str]]:
        return Predicate, (self.text,)

    @cached_property
    def _parsed(self) -> tuple[ast.expr, dict[str, str]]:
        names: dict[str, str] = {}

        def substitute(match: re.Match[str]) -> str:
            if column := match.group("column"):
                dotted = column if "." in column else f"{column}.keep"
                return names.setdefault(dotted, f"c_{len(names)}_")
            return _WORDS.get(match.group("word") or "", match.group(0))

        try:
            one_line = " ".join(_TOKENS.sub(substitute, self.text).split("\n")).strip()  # YAML blocks keep line ends
            tree = ast.parse(one_line, mode="eval").body
        except (SyntaxError, ValueError, RecursionError) as e:  # ValueError: a NUL byte
            why = e.msg if isinstance(e, SyntaxError) else str(e)
            raise ConfigError(f"predicate {self.text!r}: {why}; expected something like `signals.words < 50`") from e
        return tree, {v: k for k, v in names.items()}

    @property
    def _tree(self) -> ast.expr:
        return self._parsed[0]

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column it reads, sorted."""
        names = self._parsed[1]
        found = {names.get(n.id, n.id) for n in ast.walk(self._tree) if isinstance(n, ast.Name)}
        unknown = sorted(c for c in found if "." not in c and c not in DOCUMENTS.names)
        if unknown:
            raise ConfigError(
                f"predicate {self.text!r}: no column {unknown[0]!r}; expected layer.column or one of {DOCUMENTS.names}"
            )
        return tuple(sorted(found))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(sorted({c.rpartition(".")[0] for c in self.columns if "." in c}))

    def evaluate(self, columns: pa.Table | pa.RecordBatch | Mapping[str, Any]) -> pa.Array:
        """bool array with nulls; `columns` must hold all of `self.columns`."""
        names = self._parsed[1]
        if isinstance(columns, pa.Table | pa.RecordBatch):
            rows = columns.num_rows
        else:
            rows = len(next(iter(columns.values()), ()))

        def column(name: str) -> Any:
            if isinstance(columns, pa.Table | pa.RecordBatch):
                return columns.column(names.get(name, name))
            return columns[names.get(name, name)]

        try:
            value = _evaluate(self._tree, column)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as e:
            raise ConfigError(f"predicate {self.text!r}: {e}") from e
        if pa.types.is_null(value.type):
            value = value.cast(pa.bool_())
        if not pa.types.is_boolean(value.type):
            raise ConfigError(
                f"predicate {self.text!r}: gives {value.type}, expected true or false; compare it to a value"
            )
        if isinstance(value, pa.Scalar):
            value = pa.repeat(value, rows)
        return value.combine_chunks() if isinstance(value, pa.ChunkedArray) else value

    def holds(self, columns: pa.Table | pa.RecordBatch | Mapping[str, Any]) -> np.ndarray:
        """bool [n]: true where the predicate is true; false where it is false or unknown."""
        return np.asarray(pc.fill_null(self.evaluate(columns), False), dtype=bool)


def _check(node: ast.AST, text: str) -> None:
    allowed = (
        ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.Compare, ast.BinOp, ast.Name, ast.Load, ast.Constant,
        ast.List, ast.Tuple, ast.In, ast.NotIn, ast.Is, ast.IsNot, *_COMPARE, *_ARITHMETIC,
    )  # fmt: skip
    lists: set[int] = set()  # those that stand where a list may: right of `in`
    for part in ast.walk(node):
        if not isinstance(part, allowed) or (isinstance(part, ast.List | ast.Tuple) and id(part) not in lists):
            raise ConfigError(
                f"predicate {text!r}: {type(part).__name__} is not allowed; use comparisons, and, or, not, in, is null"
            )
        if isinstance(part, ast.Constant) and not isinstance(part.value, int | float | str | None):
            raise ConfigError(f"predicate {text!r}: {part.value!r} is no constant; use numbers, strings, true, false")
        if not isinstance(part, ast.Compare):
            continue
        for op, right in zip(part.ops, part.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                if len(part.ops) > 1 or not (isinstance(right, ast.List | ast.Tuple) and _are_constants(right.elts)):
                    raise ConfigError(f"predicate {text!r}: `in` expects a list of constants such as ['en', 'de']")
                lists.add(id(right))
            null = isinstance(right, ast.Constant) and right.value is None
            if isinstance(op, ast.Is | ast.IsNot) and (len(part.ops) > 1 or not null):
                raise ConfigError(f"predicate {text!r}: `is` expects null; use == for other values")


def _are_constants(elements: list[ast.expr]) -> bool:
    """Constants of one type, numbers with a minus sign included."""
    try:
        pa.array([ast.literal_eval(e) for e in elements])
    except (ValueError, TypeError, OverflowError, pa.ArrowException):
        return False
    return True


def _evaluate(node: ast.expr, column: Any) -> Any:
    if isinstance(node, ast.Constant):
        return pa.scalar(node.value)
    if isinstance(node, ast.Name):
        return column(node.id)
    if isinstance(node, ast.BoolOp):
        join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
        value = _evaluate(node.values[0], column)
        for other in node.values[1:]:
            value = join(value, _evaluate(other, column))
        return value
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, column)
        return pc.invert(value) if isinstance(node.op, ast.Not) else pc.negate(value)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, column), _evaluate(node.right, column)
        if isinstance(node.op, ast.Div):  # 1 / 2 is 0.5 whatever the columns' types
            left = left.cast(pa.float64())
        return _ARITHMETIC[type(node.op)](left, right)
    assert isinstance(node, ast.Compare)
    value = None
    left = node.left
    for op, right in zip(node.ops, node.comparators, strict=True):
        here = _compare(op, left, right, column)
        value = here if value is None else pc.and_kleene(value, here)
        left = right
    return value


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, column: Any) -> Any:
    value = _evaluate(left, column)
    if isinstance(op, ast.Is | ast.IsNot):
        return pc.is_null(value) if isinstance(op, ast.Is) else pc.is_valid(value)
    if isinstance(op, ast.In | ast.NotIn):
        assert isinstance(right, ast.List | ast.Tuple)  # _check saw to it
        wanted = pa.array([ast.literal_eval(e) for e in right.elts]).cast(value.type)
        inside = pc.if_else(pc.is_valid(value), pc.is_in(value, value_set=wanted), None)
        return pc.invert(inside) if isinstance(op, ast.NotIn) else inside
    return _COMPARE[type(op)](*_as_stored(value, _evaluate(right, column)))


def _as_stored(left: Any, right: Any) -> tuple[Any, Any]:
    """A fractional constant beside a float32 column as float32: a stored 0.3 is 0.30000001 and equals the constant 0.3."""
    if isinstance(right, pa.Scalar) and pa.types.is_float32(left.type) and pa.types.is_float64(right.type):
        right = right.cast(pa.float32(), safe=False)
    elif isinstance(left, pa.Scalar) and pa.types.is_float32(right.type) and pa.types.is_float64(left.type):
        left = left.cast(pa.float32(), safe=False)
    return left, right
