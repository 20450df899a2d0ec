"""The commands of README and the documents as a newcomer types them; long ones take their quick form.

Run by an interpreter that has the package: ``python newcomer.py``, in an empty folder. A test compares the lists with
what is written there (:func:`written`).
"""

import re
import shlex
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from fpe.bench.cli import cli

RUN = {
    "fpe doctor": "",
    "fpe explain": "",
    "fpe explain --kept 0.5": "",
    "fpe explain --m 16 --structure 2:4": "",
    "fpe explain --m 16 --structure 2:4 --pass dX": "",
    "fpe gpu": "--plan",
    "fpe gpu --plan --minutes 9": "",
    "fpe gpus": "",
    "fpe here": "--quick --rounds 2",
    "fpe results": "",
    "fpe results boolean": "",
    "fpe results --table should-i": "",
    "fpe study": "",
    "fpe study --help": "",
    "fpe study boolean --quick": "--output out",
    "fpe verdict": "",
    "fpe verdict --gpu rtx4090 --shape 4096x14336": "",
    "fpe verdict --kept 0.5": "",
}
"""What README and the documents say to type, and the words that make it quick where it is not."""
ANSWERS = tuple(f"fpe results --table {name}" for name in ("by-width", "controls", "here", "memory", "models-cpu"))
HELP = ("fpe", "fpe --version", "fpe lab", "fpe verdict --gpu rtx4090 --shape 4096x14336 --json", *ANSWERS)
"""Commands that the help offers or README's drawn tables name, and the documents' own words do not."""
LAB = "minutes: tests/test_lab_*.py and tests/test_ptx_*.py run it on a few small kernels"
GPU = "it needs a GPU; tests/test_device.py walks it on the CPU"
INSTALLS = "it installs packages: whoever runs this has them"
BUILDS = "it runs make, which sets up an environment of its own"
NOT_RUN = {
    "pip install 'fixed-parameter-expansion[bench]'": INSTALLS,
    "pip install -e '.[bench]'": INSTALLS,
    "pip install fixed-parameter-expansion": INSTALLS,
    "pip install blksprs": INSTALLS,
    "make report": "it is fpe report: tests/test_package.py runs that from the wheel, with --quick",
    "make test": BUILDS,
    "make docs": BUILDS,
    "make test-ecosystem": BUILDS,
    "make test-python VERSION=3.12": BUILDS,
    "make test-torch VERSION=2.11.0": BUILDS,
    "make test-triton VERSION=3.8.0": BUILDS,
    "pytest bench --benchmark-only": "it is of a checkout; tests/test_suite.py runs the same cases",
    "python -m fpe.bench gpu": GPU,
    "fpe gpu --dry-run": "a minute: tests/test_device.py runs parts of it",
    "fpe gpu --merge FOLDER/fpe-gpu.tar.gz": GPU,
    "fpe gpu --minutes 9 --output FOLDER --commit HASH": GPU,
    "fpe gpu --only roof": GPU,
    "fpe gpu --resume FOLDER/fpe-gpu.tar.gz": GPU,
    "fpe lab compile": LAB,
    "fpe lab compile --op 2:4": LAB,
    "fpe lab execute": LAB,
    "fpe lab hazards": LAB,
    "fpe lab hazards --arch 90 --kernels after --output bench/results/lab": LAB,
    "fpe lab ladder": LAB,
    "fpe lab mutate": LAB,
    "fpe lab traffic": LAB,
    "fpe lab traffic --structure 2:4": LAB,
    "fpe lab wavefronts": LAB,
    "fpe latency --level model": "minutes: tests/test_terminal.py draws its table from the committed rows",
    "fpe latency --shape 4096x14336 --m 16 --column GB/s": "minutes: tests/test_terminal.py times a small layer",
    "fpe study boolean": "minutes: --quick of it is run",
    "fpe study features": "it reads images that the reader has",
    "fpe tune": GPU,
    "fpe verdict --gpu here": "it wants fpe here in full, half a minute of an idle machine",
    "fpe verdict --measured latency.jsonl": "it reads a GPU's file: tests/test_costs.py gives it one",
}
"""What README and the documents say to type and this does not, and why."""


def written(paths: list[Path]) -> set[str]:
    """The commands of documents: lines of shell, and what prose has between backticks; drawn tables are left out."""
    found = set()
    for path in paths:
        text = re.sub(r"<!-- table:.*?<!-- end -->", "", path.read_text(), flags=re.DOTALL)
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                command, _, comment = line.partition("  #") if "  #" in line else line.partition(" # ")
                found |= {command.strip(), *re.findall(r"in a checkout: (.*)", comment)} - {""}
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found |= {" ".join(said.split()) for said in re.findall(r"`((?:fpe|make|pip|pytest|python) [^`<]+)`", prose)}
    return found


def main() -> None:
    """Runs each; the first that fails ends it, with what it said."""
    for line in (*HELP, *RUN):
        words = shlex.split(f"{line} {RUN.get(line, '')}")[1:]
        begun = time.perf_counter()
        done = CliRunner().invoke(cli, words)
        if done.exit_code or not done.output.strip():
            sys.exit(f"{line}: exit status {done.exit_code}\n{done.output}\n{done.exception!r}")
        print(f"{time.perf_counter() - begun:5.1f} s  {line}")


if __name__ == "__main__":
    main()
