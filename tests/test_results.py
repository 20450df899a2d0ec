"""Result files: written and read back, appended to with whole rows, and refused by name where they are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

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


def test_results_round_trip(tmp_path: Path) -> None:
    results = Results("s", {"a": (1, 2)}, [{"x": np.float32(0.5), "n": torch.tensor(3)}])
    back = Results.read(results.write(tmp_path / "deep" / "r.jsonl"))
    assert back.rows == [{"x": 0.5, "n": 3}] and back.settings == {"a": [1, 2]}
    assert set(back.provenance) >= {"device", "torch", "commit"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "schema 1, got an empty file"),
        ('{"schema": 99}\n', "schema 1, got 99"),
        ('{"schema": 1, "study": "s", "settings": {}, "provenance": {}}\n{"x": 1', "line 2 is cut"),
    ],
)
def test_results_refuse_what_they_cannot_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Results.read(path)
