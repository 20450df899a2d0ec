"""What a device can do: published by its vendor, or measured on it; pure, neither torch nor Triton is imported.

A :class:`Roof` is published (:data:`PUBLISHED`) or measured (a JSON file that ``fpe gpu`` writes). A :class:`Share`
says which part of it an implementation reaches. Shares are :data:`ASSUMED` unless a roof file has measured ones. A
prediction from assumed shares is an estimate, and every output says so (:attr:`Roof.basis`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .gpus import GPUS, OLDEST, Gpu, architecture

ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
"""Bytes of an element; ``"tf32"`` is float32 storage multiplied on tensor cores, ``"fp32"`` is not."""


class Share(NamedTuple):
    """Which part of a roof an implementation reaches: of its bandwidth, and of its arithmetic."""

    bandwidth: float
    arithmetic: float


# All assumptions about shares are here. Measured shares replace them where a roof file has some.

ASSUMED: Mapping[str, Share] = {
    "parent": Share(0.90, 1.00),  # cuBLAS: it is what the arithmetic roof is measured with
    "wide dense": Share(0.90, 1.00),
    "masked dense": Share(0.90, 1.00),
    "packed labels": Share(0.90, 0.65),
    "kept values": Share(0.90, 0.65),
    "decompressed": Share(0.80, 0.65),  # the pass that writes values to their places; the product has its own
    "blocks": Share(0.90, 0.80),
    "torch.sparse": Share(0.45, 0.75),
    "sparse tensor cores": Share(0.85, 0.75),
}
ASSUMED_REACH = Share(0.90, 0.80)
"""What the best program reaches of published figures: a copy of the bandwidth, a large GEMM of the arithmetic."""
ASSUMED_LAUNCH = 2.5e-6
"""Seconds from one kernel's end to the next one's first useful work."""


@dataclass(frozen=True)
class Roof:
    """What a device can do.

    Attributes:
        name: Of the device.
        arch: Compute capability, as 90 for 9.0.
        bandwidth: Bytes of memory traffic a second.
        flops: Dense FLOPs a second by dtype (:data:`ITEMSIZE` has the names); products of 16-bit and TF32 operands on
            tensor cores with float32 accumulation.
        l2: Bytes of L2.
        integer: 32-bit bitwise instructions a second, over all lanes.
        launch_seconds: Cost of each launch.
        source: ``"published"`` or ``"measured"``.
        reach: Which part of ``bandwidth`` and ``flops`` the best program reaches; 1 if they were measured.
        shares: Which part of that each implementation reaches.
    """

    name: str
    arch: int
    bandwidth: float
    flops: Mapping[str, float]
    l2: float
    integer: float
    launch_seconds: float = ASSUMED_LAUNCH
    source: str = "published"
    reach: Share = ASSUMED_REACH
    shares: Mapping[str, Share] = field(default_factory=lambda: dict(ASSUMED))

    @property
    def basis(self) -> str:
        """What predictions for this device are based on, for captions."""
        assumed = [name for name in ASSUMED if self.shares[name] == ASSUMED[name]]
        shares = "assumed" if len(assumed) == len(ASSUMED) else "partly assumed" if assumed else "measured"
        return f"predicted, not measured: {self.source} roofs of the {self.name}, {shares} shares of them"

    @classmethod
    def read(cls, path: Path) -> "Roof":
        """Reads a measured roof from a JSON file with this class's field names; ``shares`` may name some or none.

        Raises:
            ValueError: The file is not JSON, or a field is missing, unknown or not a positive number.
        """
        try:
            given = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a roof in JSON: {error}") from error
        return cls.of(given, str(path))

    @classmethod
    def of(cls, given: Any, where: str = "roof") -> "Roof":
        """Makes a measured roof from a mapping, as :meth:`read` does.

        Raises:
            ValueError: See :meth:`read`; ``where`` begins the message.
        """
        names = {f.name for f in fields(cls)} - {"reach"}
        if not isinstance(given, dict):
            raise ValueError(f"{where}: expected an object with {', '.join(sorted(names))}, got {type(given).__name__}")
        provenance = {"provenance"}
        missing = {"name", "arch", "bandwidth", "flops", "l2", "integer"} - set(given)
        unknown = set(given) - names - provenance
        if missing or unknown:
            raise ValueError(f"{where}: a roof has fields missing: {sorted(missing)}, and unknown: {sorted(unknown)}")
        numbers = {n: given[n] for n in ("arch", "bandwidth", "l2", "integer", "launch_seconds") if n in given}
        numbers |= {f"flops.{dtype}": rate for dtype, rate in given["flops"].items()}
        shares = {name: Share(*pair) for name, pair in given.get("shares", {}).items()}
        numbers |= {f"shares.{name}": value for name, pair in shares.items() for value in pair}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{where}: {name} must be a positive number, got {value!r}")
        strangers = sorted({*given["flops"]} - {*ITEMSIZE} | {*shares} - {*ASSUMED})
        if strangers:
            raise ValueError(f"{where}: unknown {strangers}; dtypes are {[*ITEMSIZE]}, implementations {[*ASSUMED]}")
        own = {name: value for name, value in given.items() if name not in provenance}
        return cls(**{**own, "source": "measured", "reach": Share(1.0, 1.0), "shares": {**ASSUMED, **shares}})


def _published(gpu: Gpu) -> Roof:
    """The roof of a data sheet."""
    flops = {"bf16": gpu.tensor * 1e12, "fp16": gpu.tensor * 1e12, "tf32": gpu.tf32 * 1e12, "fp32": gpu.fp32 * 1e12}
    # The CUDA programming guide gives 64 bitwise instructions a clock and multiprocessor for all of these.
    return Roof(gpu.name, gpu.arch, gpu.bandwidth * 1e9, flops, gpu.l2 * 2**20, 64 * gpu.sms * gpu.clock * 1e9)


PUBLISHED: Mapping[str, Roof] = {key: _published(gpu) for key, gpu in GPUS.items()}
"""Roofs by :data:`~fpe.kernels.gpus.GPUS`. Published, not measured: :data:`ASSUMED_REACH` is applied."""


def roof_named(name: str, arch: int | None = None) -> Roof:
    """The roof of a GPU by its key in :data:`PUBLISHED` or by a device's own name, as ``"NVIDIA H200"``.

    Args:
        name: Key or name.
        arch: Compute capability, as 90. If it is given, a GPU that is not in the table is taken for the one of least
            bandwidth among those of the newest known architecture that is not newer. The roof's name says so. Its
            kind is right, its size need not be.

    Raises:
        ValueError: No such GPU is known.
    """
    words = _words(name)
    fitting = [key for key in PUBLISHED if {*key.split("-")} <= words and "laptop" not in words]
    if fitting:
        return PUBLISHED[max(fitting, key=len)]
    if arch is not None and arch >= OLDEST:
        alike = [roof for roof in PUBLISHED.values() if roof.arch == architecture(arch).arch]
        stand_in = min(alike, key=lambda roof: roof.bandwidth)
        return replace(stand_in, name=f"{name}, taken for a {stand_in.name}")
    raise ValueError(
        f"GPU must be one of {', '.join(PUBLISHED)}, or a roof's JSON file (`fpe gpus --help`), got {name!r}"
    )


def _words(name: str) -> set[str]:
    """The words of a GPU's name as people write it: ``"RTX4070Ti"``, ``"rtx 4070 ti"`` and ``"4070-ti"`` are alike."""
    glued = "(?<=rtx)(?=[0-9a])|(?<=[0-9])(?=(?:ti|super|ada)(?![a-z])|tisuper)|(?<=[0-9]ti)(?=super)"
    return {word.removesuffix("gb") for word in re.split("[^a-z0-9]+", re.sub(glued, " ", name.lower()))}
