"""Every public name of `fpe` has an example in its docstring, and the examples run as they are written."""

import doctest
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import fpe

PUBLIC = [name for name in fpe.__all__ if not inspect.ismodule(getattr(fpe, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = doctest.DocTestParser().get_doctest(
        inspect.getdoc(getattr(fpe, name)) or "", {"fpe": fpe, "nn": nn, "torch": torch}, name, None, None
    )
    said: list[str] = []
    assert found.examples and doctest.DocTestRunner().run(found, out=said.append).failed == 0, "".join(said)
