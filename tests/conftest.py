"""Settings of the whole suite: one thread, Triton's interpreter, property tests that try the same examples."""

import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton as a kernel is defined; tests that compile use a subprocess

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "fpe",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fpe")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of ``test_fuzz.py``."""
    parser.addoption(
        "--fuzz", type=int, default=8, metavar="N", help="random calls of each operation in Triton, 4 N eager"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="other random calls")


@pytest.fixture(autouse=True, scope="session")
def unmeasured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody has measured this machine (``fpe here``), so that ``"auto"`` decides alike on all of them."""
    empty = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpe.kernels.here.folder", lambda: empty)
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, so that an element that no program writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
