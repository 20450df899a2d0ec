"""The process of ``fpe gpu`` that uses the device: what hangs, crashes or loses the device ends here alone."""

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results import provenance
from .guard import end_with_the_watcher
from .lost import LostError
from .plan import walk
from .steps import Context

LOST = 3
"""Exit status of a process that its device no longer answers; a new one goes on."""


def main(arguments: Sequence[str]) -> int:
    """Walks the plan as the options say, given as one JSON object: see :func:`context_of`.

    Standard input is a pipe that whoever watches holds open, see :func:`~fpe.bench.gpu.guard.end_with_the_watcher`:
    two processes would write the same rows after a restart.
    """
    threading.Thread(target=end_with_the_watcher, daemon=True).start()
    options = json.loads(arguments[0])
    try:
        walk(context_of(options), options["steps"], options["seconds"])
    except LostError as error:
        print(f"  the device is lost to this process: {error}", flush=True)
        return LOST
    return 0


def context_of(options: Mapping[str, Any]) -> Context:
    """The context of ``device``, ``folder``, ``deadline`` (Unix time), ``run``, ``providers``, ``commit``, ``jobs``."""
    import torch

    from fpe.kernels.device import arch_of

    made = provenance(options["commit"])
    arch = arch_of(torch.device("cuda")) if options["device"] == "cuda" else 90

    def say(line: str) -> None:
        print(line, flush=True)

    return Context(
        options["device"],
        Path(options["folder"]),
        options["deadline"],
        options["run"],
        say,
        tuple(options["providers"]),
        made,
        arch,
        options["jobs"],
        time.time,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
