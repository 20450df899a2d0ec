"""Twenty commands of a newcomer, from README, docs and the help; long ones take their quick form.

Run by an interpreter that has the package: ``python newcomer.py``, in an empty folder.
"""

import sys
import time

from click.testing import CliRunner

from fpe.bench.cli import cli

SHORTER = {"fpe here": "--quick --rounds 2", "fpe study boolean --quick": "--output out", "fpe gpu": "--plan"}
"""What makes a command quick, where it is not."""
COMMANDS = (
    "fpe",
    "fpe --version",
    "fpe doctor",
    "fpe gpus",
    "fpe verdict",
    "fpe verdict --gpu rtx4090 --shape 4096x14336",
    "fpe verdict --gpu rtx4090 --shape 4096x14336 --json",
    "fpe explain",
    "fpe explain --m 16 --structure 2:4",
    "fpe explain --m 16 --structure 2:4 --pass dX",
    "fpe here",
    "fpe gpu",
    "fpe gpu --plan --minutes 9",
    "fpe results",
    "fpe results boolean",
    "fpe study",
    "fpe study --help",
    "fpe study boolean --quick",
    "fpe lab",
    "fpe lab compile --help",
)


def main() -> None:
    """Runs each; the first that fails ends it, with what it said."""
    for line in COMMANDS:
        words = f"{line} {SHORTER.get(line, '')}".split()[1:]
        begun = time.perf_counter()
        done = CliRunner().invoke(cli, words)
        if done.exit_code or not done.output.strip():
            sys.exit(f"{line}: exit status {done.exit_code}\n{done.output}\n{done.exception!r}")
        print(f"{time.perf_counter() - begun:5.1f} s  {line}")


if __name__ == "__main__":
    main()
