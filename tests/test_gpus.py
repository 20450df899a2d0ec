"""The table of GPUs: complete, and one rule for those that are not in it."""

import pytest

from fpe.kernels.device import KNOWN
from fpe.kernels.gpus import ARCHITECTURES, GPUS, architecture


@pytest.mark.parametrize(
    ("arch", "like"), [(75, 80), (80, 80), (87, 86), (89, 89), (90, 90), (103, 100), (110, 100), (121, 120)]
)
def test_an_unknown_architecture_is_taken_for_the_newest_that_is_not_newer(arch: int, like: int) -> None:
    assert architecture(arch) is ARCHITECTURES[like]


def test_every_gpu_has_an_architecture_and_every_architecture_an_example_of_its_own() -> None:
    assert {gpu.arch for gpu in GPUS.values()} == set(ARCHITECTURES)
    for arch, kind in ARCHITECTURES.items():
        example, device = GPUS[kind.example], KNOWN[arch]
        assert kind.arch == arch == example.arch == device.arch
        assert (device.sms, device.shared) == (example.sms, kind.shared) and device.l2 == example.l2 * 2**20
        assert kind.shared + 1024 == kind.shared_sm


def test_matrix_instructions_follow_the_family() -> None:
    found = {arch: architecture(arch).matrix for arch in (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)}
    assert [arch for arch, matrix in found.items() if matrix == "wgmma"] == [90]
    assert [arch for arch, matrix in found.items() if matrix == "tcgen05.mma"] == [100, 103, 110]
