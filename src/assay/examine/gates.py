"""Gates: comparisons of a report's figures, so that an examination can stop a pipeline."""

import ast
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from assay.examine.report import GateRecord, Report
from assay.lab.usage import UsageError, unknown

MAX_LENGTH = 500
MAX_DEPTH = 50  # far below where Python's own stack ends

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class _UndecidedError(Exception):
    """What the report holds does not say whether a comparison is true."""


def _constant(node: ast.Constant) -> int | float:
    assert isinstance(node.value, int | float)  # checked when the gate was read
    return node.value


class Gate:
    """A condition on a report under which an examination counts as failed.

    Made of `panel.metric`, numbers, `+ - * /`, comparisons, `and`, `or`, `not` and brackets, and
    of nothing else: no names, no calls, no indices. It is read by a parser and never executed.

    Args:
        expression: e.g. `"performance.accuracy < 0.9 or curvature.top_eigenvalue > 100"`.

    Raises:
        UsageError: if it is malformed, or uses anything else.

    Example:
        >>> from assay.examine import Gate
        >>> sorted(Gate("performance.accuracy < 0.9 and not card.parameters > 1e6").names)
        ['card.parameters', 'performance.accuracy']
        >>> Gate("__import__('os')")
        Traceback (most recent call last):
        ...
        assay.lab.usage.UsageError: gate "__import__('os')": Call is not allowed; ...
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        if len(expression) > MAX_LENGTH:
            raise UsageError(f"a gate has at most {MAX_LENGTH} characters, got {len(expression)}")
        try:
            self._tree = ast.parse(expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            said = getattr(error, "msg", None) or str(error)
            raise UsageError(f'gate "{expression}" is malformed: {said}') from None
        self.names: set[str] = set()
        self._check(self._tree, condition=True, depth=0)

    def check_panels(self, panels: Sequence[str]) -> None:
        """Whether all panels that it asks are examined.

        Args:
            panels: names of those that are.

        Raises:
            UsageError: if one is not.
        """
        for name in sorted(self.names):
            panel = name.partition(".")[0]
            if panel not in panels:
                raise UsageError(f'gate "{self.expression}": {unknown("panel", panel, panels)}')

    def decide(self, report: Report) -> GateRecord:
        """Apply it; undecided (`failed` is None) where the report lacks a figure that matters.

        A figure is lacking if its panel failed, or if it is not a number. One true part of an
        `or`, or one false part of an `and`, decides whatever the others lack.

        Args:
            report: of the examination.

        Raises:
            UsageError: if a panel that is done has no such metric.
        """
        figures, missing = self._figures(report)
        shown = [f"{name} = {value:.6g}" for name, value in figures.items()]
        try:
            failed = self._holds(self._tree, figures, missing)
        except _UndecidedError as undecided:
            return GateRecord(expression=self.expression, failed=None, reason=str(undecided))
        return GateRecord(expression=self.expression, failed=failed, reason=", ".join(shown))

    def _figures(self, report: Report) -> tuple[dict[str, float], dict[str, str]]:
        """The figures that it asks for, and why others are missing."""
        self.check_panels([entry.name for entry in report.panels])
        figures, missing = {}, {}
        for name in sorted(self.names):
            panel, _, metric = name.partition(".")
            record = report.panel(panel)
            values = {entry.name: entry.value for entry in record.metrics}
            if record.status != "done":
                missing[name] = f"panel {panel} is {record.status}: {record.reason}"
            elif metric not in values:
                said = unknown("metric", metric, values, of=f"panel {panel}")
                raise UsageError(f'gate "{self.expression}": {said}')
            elif math.isnan(values[metric]):
                missing[name] = f"{name} is not a number"
            else:
                figures[name] = values[metric]
        return figures, missing

    def _check(self, node: ast.AST, condition: bool, depth: int) -> None:
        """Walk the tree: conditions are true or false, everything else is a number."""
        depth += 1
        if depth > MAX_DEPTH:
            raise UsageError(f'gate "{self.expression}" is nested deeper than {MAX_DEPTH} levels')
        if condition and isinstance(node, ast.BoolOp):
            for part in node.values:
                self._check(part, True, depth)
        elif condition and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand, True, depth)
        elif condition and isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                self._check(part, False, depth)
            for comparison in node.ops:
                if type(comparison) not in _COMPARISONS:
                    self._refuse(comparison)
        elif condition:
            self._refuse(node, "a gate is a comparison, e.g. performance.accuracy < 0.9")
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            self._check(node.left, False, depth)
            self._check(node.right, False, depth)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            self._check(node.operand, False, depth)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id.startswith("_") or node.attr.startswith("_"):
                self._refuse(node, "no panel and no metric begins with an underscore")
            self.names.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            if _constant(node) > sys.float_info.max:
                raise UsageError(f'gate "{self.expression}": a number is too large')
        else:
            self._refuse(node)

    def _refuse(self, node: ast.AST, hint: str = "") -> None:
        hint = hint or "panel.metric, numbers, + - * /, comparisons, and, or, not are"
        raise UsageError(f'gate "{self.expression}": {type(node).__name__} is not allowed; {hint}')

    def _holds(
        self, node: ast.AST, figures: Mapping[str, float], missing: Mapping[str, str]
    ) -> bool:
        """Whether a condition is true, in the logic of three values."""
        match node:
            case ast.BoolOp():
                decisive = isinstance(node.op, ast.Or)  # one part of this value is enough
                undecided = None
                for part in node.values:
                    try:
                        if self._holds(part, figures, missing) is decisive:
                            return decisive
                    except _UndecidedError as error:
                        undecided = undecided or error
                if undecided is not None:
                    raise undecided
                return not decisive
            case ast.UnaryOp():
                return not self._holds(node.operand, figures, missing)
            case ast.Compare():
                parts = (node.left, *node.comparators)
                values = [self._number(part, figures, missing) for part in parts]
                pairs = zip(node.ops, values, values[1:], strict=False)
                return all(_COMPARISONS[type(op)](a, b) for op, a, b in pairs)
        raise AssertionError(f"{type(node).__name__} has passed the check")

    def _number(
        self, node: ast.AST, figures: Mapping[str, float], missing: Mapping[str, str]
    ) -> float:
        match node:
            case ast.UnaryOp():
                value = self._number(node.operand, figures, missing)
                return -value if isinstance(node.op, ast.USub) else value
            case ast.BinOp():
                left = self._number(node.left, figures, missing)
                right = self._number(node.right, figures, missing)
                if isinstance(node.op, ast.Div) and right == 0:
                    raise _UndecidedError("division by zero")
                value = _ARITHMETIC[type(node.op)](left, right)
                if math.isnan(value):
                    raise _UndecidedError(f"{left} and {right} give no number")
                return value
            case ast.Attribute(value=ast.Name(id=panel)):
                name = f"{panel}.{node.attr}"
                if name in missing:
                    raise _UndecidedError(missing[name])
                return figures[name]
            case ast.Constant():
                return float(_constant(node))
        raise AssertionError(f"{type(node).__name__} has passed the check")
