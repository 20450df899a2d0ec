"""Watched children: nothing of a tool and of what it watches is left behind, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from fpe.bench.gpu.child import watch

TARGET = "echo target; exec sleep 60"


def tool(note: Path, then: str, pipes: str = "") -> list[str]:
    """A tool that starts a target, notes its process, and does something."""
    return ["sh", "-c", f"sh -c '{TARGET}' {pipes} & echo $! > {note}; echo tool; {then}"]


def is_gone(process: int) -> bool:
    """Whether a process no longer runs; a dead one that nobody has collected counts as gone."""
    for _ in range(100):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_target_is_killed_with_its_tool_when_time_is_up(tmp_path: Path) -> None:
    note = tmp_path / "process"
    begun = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        watch(tool(note, "wait"), 2.0)
    assert time.monotonic() - begun < 20, "the pipe that the target holds was waited for"
    assert is_gone(int(note.read_text()))
    assert "tool" in str(caught.value.output)


def test_a_target_that_outlives_its_tool_is_killed(tmp_path: Path) -> None:
    """The tool ends at once, having given its target other pipes."""
    note = tmp_path / "process"
    done = watch(tool(note, "exit 9", "> /dev/null 2> /dev/null"), 30.0)
    assert done.returncode == 9 and done.stdout == "tool\n"
    assert is_gone(int(note.read_text()))


def test_a_target_is_killed_when_the_measuring_process_is(tmp_path: Path) -> None:
    """By a signal that it cannot see, as whoever watches it does where it hangs."""
    note = tmp_path / "process"
    code = f"from fpe.bench.gpu.child import watch; watch({tool(note, 'wait')!r}, 60.0)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as measures:
        for _ in range(3000):
            if note.exists() and note.read_text().endswith("\n"):
                break
            time.sleep(0.02)
        target = int(note.read_text())
        os.kill(target, 0)
        measures.kill()
    assert is_gone(target)


def test_output_status_and_environment_are_the_commands() -> None:
    code = "import os, sys; print(os.environ['WHO']); print('bad', file=sys.stderr); sys.exit(3)"
    done = watch([sys.executable, "-c", code], 30.0, {**os.environ, "WHO": "me"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "me\n", "bad\n")


def test_a_signal_that_ends_the_command_is_its_status() -> None:
    assert watch(["sh", "-c", "kill -SEGV $$"], 30.0).returncode == 128 + signal.SIGSEGV
