"""Everything that `fpe` exports has an example in its docstring, and the examples run as they are written."""

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import fpe


def has_examples(value: object) -> bool:
    """Whether it can be called to some purpose: no module, and no warning."""
    return not inspect.ismodule(value) and not (inspect.isclass(value) and issubclass(value, Warning))


PUBLIC = [name for name in fpe.__all__ if has_examples(getattr(fpe, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = doctest.DocTestParser().get_doctest(
        inspect.getdoc(getattr(fpe, name)) or "", {"fpe": fpe, "nn": nn, "torch": torch}, name, None, None
    )
    said: list[str] = []
    assert found.examples and doctest.DocTestRunner().run(found, out=said.append).failed == 0, "".join(said)
