"""What ``fpe doctor`` and missing data say to somebody who has just arrived."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fpe
from fpe.bench.cli import cli, doctor
from fpe.bench.results import COMMITTED
from fpe.bench.studies import every, vision
from fpe.bench.studies.recipes import RECIPES
from fpe.bench.studies.sweep import Sweep


def rows() -> list[dict[str, str]]:
    done = CliRunner().invoke(cli, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_backend_runs_or_says_why_not() -> None:
    found = [row for row in rows() if row["about"] == "backends"]
    assert {row["name"].split(",")[0] for row in found} >= {"split_matmul", "merge_matmul", "block_matmul"}
    assert all(row["state"] == "yes" or row["says"] for row in found)
    eager = [row for row in found if row["name"].endswith(" eager")]
    assert len(eager) >= 5 and all(row["state"] == "yes" for row in eager)


def test_a_wrong_layer_is_broken_and_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fpe, "to_dense", lambda model: nn.Sequential(nn.Linear(64, 4)))
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.exit_code == 1 and "it differs from its dense form" in done.output


def test_a_failure_is_said_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(fpe, "expand", fails)
    finding = doctor.check("cpu")
    assert finding.state == "broken" and "no such luck" in finding.says


def test_a_gpu_that_no_kernel_can_use_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen:
        is_cuda = True
        dtype = torch.bfloat16

    for known in (doctor.SPLIT, doctor.MERGE, doctor.BLOCK, doctor.SEMI_STRUCTURED, doctor.BITMAP, doctor.MLP):
        for name, backend in known.items():
            if name != "eager":
                monkeypatch.setitem(known, name, doctor.Backend(backend.module, "", lambda *call: "too old"))
    states = [finding.state for finding in doctor.backends(Seen())]  # type: ignore[arg-type]
    assert states.count("broken") == 6


def test_data_that_are_missing_say_how_they_are_made(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["study", "budget", "--data", "cifar100_lite2_512", "--output", str(tmp_path)])
    assert done.exit_code == 2 and "EfficientNet-Lite2" in done.output and "np.savez" in done.output
    with pytest.raises(FileNotFoundError, match=r"nothing-like-it.*cifar100_lite2_512"):
        vision.load("nothing-like-it")


def test_every_data_set_of_the_committed_results_has_a_recipe() -> None:
    names = {path.stem for path in (COMMITTED / "studies").glob("*.jsonl")}
    swept = {study.rows_in for study in every().values() if isinstance(study, Sweep)}
    used = {name.removeprefix(f"{kind}-") for name in names for kind in swept if name.startswith(f"{kind}-")}
    known = {*RECIPES, "cifar10", "curves", "sensitivity", "sweep"}  # the last three are no data
    assert used & set(RECIPES) >= {"cifar100_lite2_512", "wordnet1000_minilm_384", "fashion-mnist"}
    assert {name for name in used if "_" in name} <= known
