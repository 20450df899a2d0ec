"""Watches the process that measures: where it hangs or dies, the unit it was at is a red row, and a new one goes on."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .steps import Context, keep
from .worker import LOST

GRACE = 20.0
"""Seconds after the end of the time in which the unit at hand may end."""
DEATHS = 2
"""How often the process may end between two units."""
POLL = 0.2
"""Seconds between two looks at the process."""


def supervise(
    command: Sequence[str],
    options: Mapping[str, Any],
    context: Context,
    while_waiting: Callable[[], None] = lambda: None,
) -> None:
    """Starts the measuring process until the plan is done or the time is up.

    Args:
        command: That takes the options as one JSON object.
        options: Of the process.
        context: With the folder and the deadline, by Unix time.
        while_waiting: Called at every look.

    Raises:
        ValueError: It ended between two units, :data:`DEATHS` times; the message is its own.
    """
    errors, deaths = context.folder / ".errors.txt", 0
    while True:
        context.beat.unlink(missing_ok=True)
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [*command, json.dumps(options)], stdin=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
            try:
                hangs = _wait(process, context, while_waiting)
            finally:
                _kill_group(process)
                process.stdin.close()  # type: ignore[union-attr]  # held open until now: it says that somebody watches
        if process.returncode == 0 or time.time() >= context.deadline:
            return
        if process.returncode == LOST:
            continue
        now = _read(context.beat)
        said = (errors.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
        if now is None:
            deaths += 1
            if deaths < DEATHS:
                continue
            raise ValueError(f"the measuring process ended with {_status(process)}: {said}")
        spent = time.time() - now["began"]
        reason = f"it hangs: nothing after {spent:.0f} s" if hangs else f"its process died ({_status(process)}): {said}"
        row = {"status": "error", "reason": reason}
        keep(context, context.results(now["step"]), now["key"], [row], spent)


def _wait(process: "subprocess.Popen[bytes]", context: Context, while_waiting: Callable[[], None]) -> bool:
    """Waits for the process to end; ends it where it hangs or the time is up. Says whether it hung."""
    while process.poll() is None:
        time.sleep(POLL)
        while_waiting()
        now = _read(context.beat)
        hangs = now is not None and time.time() > now["limit"]
        if hangs or time.time() > context.deadline + GRACE:
            _kill_group(process)
            process.wait()
            return hangs
    return False


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _status(process: "subprocess.Popen[bytes]") -> str:
    code = process.returncode
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _read(beat: Path) -> dict[str, Any] | None:
    """What is being done, or nothing."""
    try:
        return json.loads(beat.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
