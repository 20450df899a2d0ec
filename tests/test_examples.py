"""The examples that need no other packages than the suite's run, and say what they should."""

import re
import subprocess
import sys

from support import ROOT


def lines(name: str) -> list[str]:
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_classifier() -> None:
    _, half_way, dense, expanded = lines("classifier")
    accuracies = [float(re.search(r"([\d.]+)%", line)[1]) for line in (half_way, dense, expanded)]  # type: ignore[index]
    assert all(30 < accuracy <= 100 for accuracy in accuracies)
    assert {re.search(r"% +(\d+)", line)[1] for line in (half_way, dense, expanded)} == {str(64 * 6 + 6 * 10)}  # type: ignore[index]


def test_serve() -> None:
    _, *served = lines("serve")
    weights = {line.split(" " * 5)[0]: int(re.search(r"(\d+) weights", line)[1]) for line in served}  # type: ignore[index]
    assert list(weights.values()) == [2 * 64 * 128, 2 * 64 * 128, 4 * 64 * 128]
