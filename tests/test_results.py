"""Result files: written and read back, appended to with whole rows, and refused by name where they are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fpe.bench.gpu import compatible
from fpe.bench.report import summary
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


def test_a_row_of_versions_takes_the_place_of_the_same_versions(tmp_path: Path) -> None:
    path, row = tmp_path / "versions.jsonl", {"modules": 9, "sm_80": [1, 1], "sm_90": [1, 2], "processor_seconds": 4.0}
    base = {"python": "3.12.1", "torch": "2.13.0+cpu", "triton": "3.7.1", "numpy": "2.4.6"}
    for versions, dry_run in ((base, False), ({**base, "python": "3.10.13"}, True), (base, True)):
        compatible.keep(path, versions, {**row, "dry_run": dry_run})
    drawn = summary.versions(Results.read(path)).rows
    assert [cells[0] for cells in drawn] == ["3.10.13", "3.12.1"]
    assert drawn[1][4:] == ("9", "1 of 1", "1 of 2", "passes", "4 s")
