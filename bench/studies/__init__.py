"""The paper's experiments, each a function from settings to raw rows."""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .study import Study


def every() -> "dict[str, Study]":
    """Every study by name: what the modules of this package declare as ``STUDIES``.

    Raises:
        ValueError: Two have one name.
    """
    modules = [import_module(f".{found.name}", __name__) for found in pkgutil.iter_modules(__path__)]
    found = [study for module in modules for study in getattr(module, "STUDIES", ())]
    names = [study.name for study in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"studies: expected a name for each, got several called {', '.join(sorted(twice))}")
    return dict(zip(names, found, strict=True))
