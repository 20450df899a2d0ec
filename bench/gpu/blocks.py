"""What a red check blocks: the family, dtype, backend and operation that it is of, and nothing else."""

from collections.abc import Iterable, Mapping
from typing import Any

from fpe.kernels.structures import BLOCK, TWO_FOUR

from ..latency.problems import Case
from ..latency.providers import OURS
from ..latency.suite import Skip
from .steps import RED

_FAMILIES: dict[str, str] = {TWO_FOUR: "semi_structured", BLOCK: "block"}
"""Whose kernels run a structure; the others run from labels."""
_OPERATIONS = {
    "partition": ("split_matmul", "merge_matmul", "partition_grad"),
    "semi_structured": ("semi_structured_matmul", "semi_structured_matmul_t", "semi_structured_grad"),
    "block": ("block_matmul", "block_matmul_t", "block_grad"),
}
"""Forward, dX and dW of an expanded layer."""


def operations(structure: str, level: str, pass_: str) -> set[tuple[str, str]]:
    """Families and operations that a measurement runs."""
    first = _FAMILIES.get(structure, "partition")
    second = "block" if first == "block" else "partition"
    families = {"op": (first,), "layer": (first,), "merge": (second,)}.get(level, (first, second))
    if pass_ not in ("forward", "dX", "dW") or level == "mlp":
        return {(family, op) for family in families for op in _OPERATIONS[family]}
    family, place = families[0], ("forward", "dX", "dW").index(pass_)
    if level == "merge" and family == "partition":
        place = (1, 0, 2)[place]  # forward merges, dX splits
    return {(family, _OPERATIONS[family][place])}


def skip_red(checks: Iterable[Mapping[str, Any]], case: Case, level: str) -> Skip:
    """Says of each provider and pass of a case whether a red check forbids its measurement.

    Args:
        checks: Rows of the gate.
        case: What is measured.
        level: Of the suite.
    """
    found = [row for row in checks if row.get("status") in RED and row.get("dtype") == case.dtype]

    def reason(provider: str, pass_: str) -> str:
        runs = operations(case.structure, level, pass_)
        for row in found:
            ops = {op for family, op in runs if family == row["family"]}
            if provider == f"{OURS}{row['backend']}" and ops and row["op"] in ("", *ops):
                return f"the check {row['check']!r} is red: {row['reason']}"
        return ""

    return reason
