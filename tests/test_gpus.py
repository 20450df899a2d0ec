"""The table of GPUs: complete, and one rule for those that are not in it."""

import pytest

from fpe.kernels.device import KNOWN
from fpe.kernels.gpus import ARCHITECTURES, GPUS, SOURCES, architecture
from fpe.kernels.roofs import roof_named


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


LANES = {80: 64}
"""Float32 lanes of a multiprocessor, where they are not 128."""


@pytest.mark.parametrize("key", GPUS)
def test_published_figures_agree_with_one_another(key: str) -> None:
    gpu = GPUS[key]
    assert gpu.fp32 == pytest.approx(2 * LANES.get(gpu.arch, 128) * gpu.sms * gpu.clock / 1e3, rel=0.02)
    assert gpu.tensor == pytest.approx(2 * gpu.tf32, rel=0.02) and gpu.tf32 >= 0.97 * gpu.fp32
    assert gpu.source in SOURCES and gpu.l2 >= 2 and gpu.bandwidth >= 200


@pytest.mark.parametrize("key", GPUS)
def test_a_gpu_is_found_by_its_key_and_by_its_name_as_people_write_it(key: str) -> None:
    name = GPUS[key].name
    written = (key, name, f"NVIDIA GeForce {name}", name.lower().replace("rtx ", "rtx"), name.replace(" Ti", "ti"))
    assert {roof_named(text).name for text in written} == {name}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("rtx4070tisuper", "RTX 4070 Ti SUPER"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
    ],
)
def test_drivers_names_are_known(text: str, name: str) -> None:
    assert roof_named(text).name == name


@pytest.mark.parametrize("text", ["Quadro RTX 6000", "RTX 4090 Laptop GPU", "Tesla T4"])
def test_another_gpu_is_not_taken_for_one_of_a_like_name(text: str) -> None:
    with pytest.raises(ValueError, match="fpe gpus"):
        roof_named(text)
