"""Watched children: nothing of a tool and of what it watches is left behind, however it ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fpe.bench.gpu.child import watch

TARGET = "import time; print('target', flush=True); time.sleep(60)"
TOOL = """
import subprocess, sys, time
target = subprocess.Popen([sys.executable, "-c", {target!r}])
open({note!r}, "w").write(str(target.pid))
print("tool", flush=True)
{then}
"""


def tool(note: Path, then: str) -> list[str]:
    """A tool that starts a target, notes its process, and does something."""
    return [sys.executable, "-c", TOOL.format(target=TARGET, note=str(note), then=then)]


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
        watch(tool(note, "target.wait()"), 2.0)
    assert time.monotonic() - begun < 20, "the pipe that the target holds was waited for"
    assert is_gone(int(note.read_text()))
    assert "tool" in str(caught.value.output)


def test_a_target_that_outlives_its_tool_is_killed(tmp_path: Path) -> None:
    """The tool ends at once, having given its target other pipes."""
    note = tmp_path / "process"
    quiet = tool(note, "sys.exit(9)")
    quiet[2] = quiet[2].replace("])", "], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)", 1)
    done = watch(quiet, 30.0)
    assert done.returncode == 9 and done.stdout == "tool\n"
    assert is_gone(int(note.read_text()))


def test_output_status_and_environment_are_the_commands() -> None:
    code = "import os, sys; print(os.environ['WHO']); print('bad', file=sys.stderr); sys.exit(3)"
    done = watch([sys.executable, "-c", code], 30.0, {**os.environ, "WHO": "me"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "me\n", "bad\n")
