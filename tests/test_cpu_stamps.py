"""Binaries that Numba keeps are of the code that there is: it sees a kernel's own file alone."""

from hashlib import sha256

import pytest
from support import ROOT

KERNELS = ROOT / "kernels"
MADE_OF = {"partition": ("vectors.py", "partition/cpu_storage.py"), "block": ("vectors.py",)}
"""What the instructions of each family's kernels come from, beside the kernels' own file."""


@pytest.mark.parametrize("family", MADE_OF)
def test_a_stamp_is_that_of_the_code(family: str) -> None:
    """Where this fails, what the message says goes into the file of the kernels: they are compiled anew then."""
    text = "".join((KERNELS / name).read_text() for name in MADE_OF[family])
    stamp = sha256(text.encode()).hexdigest()[:8]
    path = KERNELS / family / "cpu.py"
    assert f'STAMP = "{stamp}"' in path.read_text(), f'{path}: STAMP must be "{stamp}"'
