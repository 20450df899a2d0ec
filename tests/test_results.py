"""Results that are appended: rows are whole, a run goes on, and damage is named."""

import json
from pathlib import Path

import pytest

from fpe.bench.results import Results


def test_appended_rows_are_whole_and_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Results.resume(path, "s", {"a": (1, 2)})
    first.append(path, {"x": 1}, {"x": 2})
    again = Results.resume(path, "s", {"a": (1, 2)})
    again.append(path, {"x": 3})
    assert [row["x"] for row in Results.read(path).rows] == [1, 2, 3] == [row["x"] for row in again.rows]
    with pytest.raises(ValueError, match="move it away"):
        Results.resume(path, "s", {"a": (1, 3)})
    with pytest.raises(ValueError, match="expected rows of 't'"):
        Results.resume(path, "t", {"a": (1, 2)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: [*lines, '{"x": 4'], "line 4 is cut"),
        (lambda lines: [*lines, "[1]"], "line 4 is no row"),
        (lambda lines: [json.dumps({**json.loads(lines[0]), "schema": 0}), *lines[1:]], "schema 1, got 0"),
        (lambda lines: ['{"schema": 1}', *lines[1:]], "lacks study"),
        (lambda lines: ["[]"], "schema 1, got none"),
    ],
    ids=["cut", "list", "schema", "header", "no header"],
)
def test_damaged_results_are_named(tmp_path: Path, change, says: str) -> None:
    path = tmp_path / "r.jsonl"
    Results("s", {}, [{"x": 1}, {"x": 2}]).write(path)
    path.write_text("\n".join([*change(path.read_text().splitlines()), ""]))
    for read in (Results.read, lambda p: Results.resume(p, "s", {})):
        with pytest.raises(ValueError, match=r"r\.jsonl") as caught:
            read(path)
        assert says in str(caught.value)
