"""Runs a command for as long as somebody holds standard input open: ``python guard.py PROGRAM ARGUMENT ...``.

A process that is killed cannot end what it has started, but its end of a pipe is closed for it. Only the standard
library is imported, so that the guard is there at once.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def end_with_the_watcher() -> None:
    """Waits until the other end of standard input is closed; then kills this process and its group."""
    os.read(0, 1)  # nothing is ever written
    os.killpg(0, signal.SIGKILL)


def main(command: Sequence[str]) -> int:
    """Runs a command in this process's group; returns its exit status, or 128 and the signal's number."""
    threading.Thread(target=end_with_the_watcher, daemon=True).start()
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
