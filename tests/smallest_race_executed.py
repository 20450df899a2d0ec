"""The PTX of the smallest kernel that races on compute capability 9.0, executed. A script: Triton interprets in tests.

Prints, as JSON, how it ends in each mode: ``"right"``, ``"wrong"`` or a fault.
"""

import json

import numpy as np
import triton
from smallest_race import compiled

from fpe.bench.lab.ptx.hopper import MODES
from fpe.bench.lab.ptx.machine import Machine
from fpe.bench.lab.ptx.memory import Fault, Global, Region
from fpe.bench.lab.ptx.parse import parse
from fpe.bench.lab.ptx.table import table

STEPS, WIDTH = 4, 4096


def ends(block_k: int, block_m: int, asynchronous: str) -> str:
    """Executes it on small integers, whose bits the mask leaves as they are."""
    kernel = compiled(block_k, block_m)
    random = np.random.default_rng(0)
    a, x = (random.integers(-3, 4, (rows, WIDTH)).astype(np.float32) for rows in (64, block_m))
    out = np.zeros((block_m, 64), np.float32)
    regions = []
    for name, values in (("a", a), ("x", x)):
        data = (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
        regions.append(Region(name, data, np.ones(len(data), bool), np.ones(len(data), bool)))
    data = out.reshape(-1).view(np.uint8)
    regions.append(Region("out", data, np.ones(len(data), bool), np.zeros(len(data), bool)))
    code, memory = parse(kernel.asm["ptx"]), Global(regions)
    values = [*memory.addresses, 0xFFFF, STEPS]
    values += [0] * (len(code.parameters) - len(values))
    machine = Machine(code, (1, 1, 1), 128, values, memory, kernel.metadata.shared, table(90))
    machine.extra["asynchronous"] = asynchronous
    try:
        machine.run()
    except Fault as fault:
        return str(fault)
    memory.write_back()
    length = STEPS * block_k
    return "right" if (out == x[:, :length] @ a[:, :length].T).all() else "wrong"


if __name__ == "__main__":
    found = {mode: ends(64, 64, mode) for mode in MODES}
    print(json.dumps({"triton": triton.__version__, **found}))
