"""The tuner: what cannot run is counted and left out, candidates compile ahead, how far the rule is from the best."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from compiler_double import compile_by_number
from support import ROOT
from torch import Tensor

from fpe.bench.cli import cli
from fpe.bench.gpu import tune
from fpe.bench.gpu.ahead import Ahead
from fpe.bench.gpu.tune_jobs import BlockJob, PartitionJob, headline_jobs
from fpe.bench.latency.timing import Timing
from fpe.kernels import tables
from fpe.kernels.block import config as block_config
from fpe.kernels.device import KNOWN
from fpe.kernels.partition import config as partition_config

JOB = PartitionJob(op="split_matmul", transposed=False, m=16).small()
DEVICE = KNOWN[80]


class OutOfResources(Exception):  # noqa: N818 - as Triton's
    """What Triton raises where a program needs more than a multiprocessor has."""


def tuned(spoil: Callable[[int], None] = lambda number: None, **options: Any) -> tuple[dict[str, Any], str]:
    """Tunes the job among six candidates; ``spoil`` is called with the number of each as it is launched."""
    launch, eager, problem = JOB.setup("cpu")
    configs = tune.planned(JOB, DEVICE, 6)

    def run(config: tune.Config) -> Tensor:
        spoil(configs.index(config))
        return launch(config=config)

    def setup(job: PartitionJob, target: str) -> tuple:
        return (launch if target == "meta" else run), eager, problem

    times = iter(range(60, 0, -10))
    with patch.object(PartitionJob, "setup", setup):
        return tune.tune(JOB, DEVICE, lambda call: float(next(times)), "cpu", 6, **options)


def fails(numbers: Iterable[int], error: Exception) -> Callable[[int], None]:
    def spoil(number: int) -> None:
        if number in numbers:
            raise error

    return spoil


def test_a_candidate_that_does_not_fit_is_left_out_and_counted() -> None:
    entry, line = tuned(fails({1, 4}, OutOfResources("shared memory, Required: 300000, Hardware limit: 232448")))
    assert entry["tried"] == 4 and entry["skipped"] == {"it does not run: OutOfResources": 2}
    assert entry["rule_milliseconds"] == 60 and entry["milliseconds"] == 30
    assert "rule 60.0000), 4 tried, 2 cannot run" in line
    assert tables.parse({"entries": [entry]}, partition_config.Config)[0].where == {
        "op": "split_matmul", "transposed": False, "alpha": 2, "itemsize": 4,
    }  # fmt: skip


def test_a_rule_that_does_not_fit_is_no_time() -> None:
    entry, line = tuned(fails({0}, OutOfResources("")))
    assert entry["rule_milliseconds"] is None and "the rule's does not run" in line
    assert json.loads(json.dumps(entry)) == entry


def test_a_lost_device_ends_the_job() -> None:
    for message in ("CUDA error: an illegal memory access", "Triton Error [CUDA]: unspecified launch failure"):
        with pytest.raises(RuntimeError, match=message.partition(" ")[2][-20:]):
            tuned(fails({2}, RuntimeError(message)))


def test_nothing_left_is_an_error_that_counts_the_reasons() -> None:
    with pytest.raises(tune.NoneCorrectError, match="'it does not run: OutOfResources': 6"):
        tuned(fails(range(6), OutOfResources("")))


def test_a_job_is_boxed_in_time() -> None:
    entry, line = tuned(seconds=-1.0)
    assert entry["tried"] == 1 and "5 left when time was up" in line


# Compiling ahead.


def test_candidates_compile_in_processes_and_a_compilers_death_is_one_reason() -> None:
    with Ahead("sm_80", 1, compile_by_number) as ahead:  # type: ignore[arg-type]
        ahead.begin("a", range(3))
        assert [ahead.why_not("a", i) for i in (0, 1)] == ["", "odd for a on sm_80"]
        ahead.begin("a", range(6))
        assert ahead.why_not("a", 3) == "its compiler died"
        assert [ahead.why_not("a", i) for i in (4, 5)] == ["", "odd for a on sm_80"]


def test_a_compilers_death_blames_no_other_candidate_and_may_come_at_any_moment() -> None:
    """The pool breaks while candidates are begun, and one is asked for that waited beside the one that kills."""
    with Ahead("sm_80", 2, compile_by_number) as ahead:  # type: ignore[arg-type]
        ahead.begin("a", [3, 0])
        broken = ahead._found["a", 3]
        assert isinstance(broken.exception(), BrokenExecutor)
        ahead.begin("a", [2, 4])  # the pool is known to be broken now
        reasons = [ahead.why_not("a", i) for i in (4, 2, 0, 3, 1)]
        assert reasons == ["", "", "", "its compiler died", "odd for a on sm_80"]


def test_what_a_compiler_refuses_is_not_launched() -> None:
    refused: list[int] = []

    class Found(Ahead):
        def why_not(self, job: Any, config: Any) -> str:
            return "" if len(refused) else refused.append(0) or "it needs 9 bytes of shared memory of 8"

    launched: list[int] = []
    entry, _ = tuned(launched.append, ahead=Found(DEVICE, 0))
    assert launched == [1, 2, 3, 4, 5] and entry["skipped"] == {"it needs 9 bytes of shared memory of 8": 1}


REAL = """
from dataclasses import replace
from fpe.bench.gpu.ahead import compile_candidate
from fpe.bench.gpu.tune_jobs import BlockJob, PartitionJob
from fpe.kernels import tables
from fpe.kernels.device import KNOWN
import torch
for job in (PartitionJob(op="merge_matmul", transposed=True, m=128), BlockJob(op="dX", block=(64, 64), m=64)):
    config = tables.choose(job.setup("meta")[2], KNOWN[90])
    print(repr(compile_candidate(job, config, KNOWN[90], False)))
    print(repr(compile_candidate(job, config, replace(KNOWN[90], shared=4096), False)))
    print(repr(compile_candidate(job, replace(config, num_warps=3), KNOWN[90], False)))
"""


def test_the_real_compilers_know_what_cannot_run(tmp_path: Path) -> None:
    """The launchers on meta tensors, for a device that is not here; the binaries are in Triton's cache."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REAL], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[::3] == ["''"] * 2
    assert all("of shared memory of 4096" in line for line in lines[1::3])
    assert all("it does not compile" in line for line in lines[2::3])
    assert {"_partition_multiply", "_block_multiply"} <= {path.stem for path in tmp_path.rglob("*.cubin")}


# How far the rule is off.


def test_neighbours_are_the_nearest_by_doublings() -> None:
    chosen = partition_config.Config(16, 64, 128, 2, 8, 4, 4)
    one = [replace(chosen, num_warps=8), replace(chosen, split=1), replace(chosen, direct=True)]
    near = [replace(chosen, num_stages=3)]
    two = [replace(chosen, block_m=64), replace(chosen, block_n=128, block_k=64)]
    found = tune.neighbours(chosen, [*two, chosen, *one, *near])
    assert found == [*near, *one, two[0]]


def test_the_chosen_one_is_timed_beside_its_neighbours_in_turns() -> None:
    asked: list[list[str]] = []

    def timed(calls: dict, device: str, seconds: float) -> dict[str, Timing]:
        asked.append(list(calls))
        assert all(isinstance(call(), Tensor) for call in calls.values())
        return {name: Timing(3.0 - (name == "2"), 2.0, 3.0, 5, 0.1, 3.1) for name in calls}

    class Found(Ahead):
        def why_not(self, job: Any, config: Any) -> str:
            return "it does not fit" if config == configs[4] else ""

    configs = [c := tables.choose(JOB.setup("meta")[2], DEVICE), *tune.neighbours(c, tune.planned(JOB, DEVICE))]
    with patch.object(tune, "interleaved", timed):
        rows = tune.nearest(JOB, DEVICE, "cpu", Found(DEVICE, 0))
    assert asked == [["0", "1", "2", "3", "5"]]
    assert [row["config"] for row in rows] == [asdict(config) for config in configs]
    assert [row["chosen"] for row in rows] == [True, *[False] * 5]
    assert [row.get("over_best") for row in rows] == [1.5, 1.5, 1.0, 1.5, None, 1.5]
    assert rows[4]["status"] == "absent" and rows[4]["reason"] == "it does not fit"
    assert (rows[0]["N"], rows[0]["M"], rows[0]["eager_milliseconds"]) == (64, 5, 3.1)


def test_the_headlines_launches_have_jobs() -> None:
    found = headline_jobs()
    assert {job.shape for job in found} == {(4096, 14336), (14336, 4096)} and len({*found}) == len(found) == 72
    assert {type(job) for job in found} == {PartitionJob, BlockJob}
    assert all(len(tune.planned(job, KNOWN[90])) > 5 for job in found[:6])


# Tables of a device.


def test_a_table_is_of_one_device(tmp_path: Path) -> None:
    h200 = replace(KNOWN[90], name="NVIDIA H200")
    entry = {"family": "partition", "op": "split_matmul", "transposed": False, "alpha": 2, "itemsize": 2, "max_m": 64}
    chosen = partition_config.Config(32, 64, 64, 2, 8, 4, 3)
    tune.write(tmp_path / "configs", h200, [{**entry, "config": asdict(chosen)}])
    assert [p.name for p in (tmp_path / "configs").iterdir()] == ["partition_nvidia_h200.json"]
    problem = partition_config.Problem("split_matmul", 16, 4096, 4096, False, 2, 2)
    rule = tables.choose(problem, h200)
    tables.tuned.cache_clear()
    with patch.object(tables, "files", lambda package: tmp_path):
        assert tables.choose(problem, h200) == chosen != rule
        assert tables.choose(problem, replace(h200, name="NVIDIA H100 80GB HBM3")) == rule
        assert tables.choose(problem, KNOWN[90]) == rule
    tables.tuned.cache_clear()


def test_tuner_walks_its_plan_and_writes_a_table_that_the_chooser_reads(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["tune", "--dry-run", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "block_sm80.json").read_text())
    entries = tables.parse(table, block_config.Config)
    assert sorted(entry.where["op"] for entry in entries) == ["block_grad", "block_matmul", "block_matmul"]
    labels = tables.parse(json.loads((tmp_path / "partition_sm80.json").read_text()), partition_config.Config)
    assert len({(e.where["op"], e.where["transposed"]) for e in labels}) == 6
    with patch.object(tables, "tuned", return_value=labels):
        problem = partition_config.Problem("split_matmul", 5, 999, 999, False, 2, 4)
        (entry,) = (e for e in labels if e.holds(problem))
        assert tables.choose(problem, KNOWN[80]) == entry.config
        assert tables.choose(replace(problem, alpha=4), KNOWN[80]) != entry.config
    assert {"device", "torch", "commit"} <= set(table["provenance"])


def test_tuner_discards_what_is_wrong_and_keeps_the_fastest() -> None:
    job = tune.small(tune.jobs())[0]
    times = iter([3.0, 1.0, 2.0])
    entry, _ = tune.tune(job, KNOWN[80], lambda call: next(times), "cpu", 3)
    tried = [tables.choose(job.setup("cpu")[2], KNOWN[80])]
    assert entry["milliseconds"] == 1.0 and entry["rule_milliseconds"] == 3.0
    assert entry["config"] != asdict(tried[0])
    with patch("fpe.bench.accuracy.excess", lambda *a: 2.0), pytest.raises(RuntimeError, match="agrees"):
        tune.tune(job, KNOWN[80], lambda call: 0.0, "cpu", 3)


def test_tuner_draws_what_it_has_no_time_for() -> None:
    """A limit takes candidates from the whole list, not its beginning, the same ones each time."""
    job = tune.small(tune.jobs())[0]
    seen: list[list[dict]] = [[], []]
    for tried in seen:
        launch, eager, problem = job.setup("cpu")

        def noting(config: tune.Config, launch=launch, tried=tried) -> torch.Tensor:
            tried.append(asdict(config))
            return launch(config=config)

        with patch.object(type(job), "setup", lambda *args, n=noting, e=eager, p=problem: (n, e, p)):
            tune.tune(job, KNOWN[80], lambda call: 0.0, "cpu", 6)
    everything = [asdict(c) for c in job.candidates(problem, KNOWN[80])]
    places = [everything.index(c) for c in seen[0][1:]]
    assert seen[0] == seen[1] and len(places) == 5 and max(places) > len(everything) / 2
