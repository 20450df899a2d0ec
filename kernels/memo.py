"""What is made of a tensor once for each of its versions.

Compressed forms of a weight go stale with an optimizer's step. Codes and metadata are made of labels, which stay: in
training they are made once.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Result = TypeVar("Result")


def once_per_version(make: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the last result of ``make(values, *rest)`` for as long as ``values`` lives and nothing has changed.

    Other tensors among the arguments count by identity and version. In-place changes are seen by PyTorch's version
    counter: writing through ``.data`` goes unseen, as it does by autograd. Tensors of ``torch.inference_mode`` have
    no counter, and nothing is kept for them.
    """
    kept: Any = WeakIdKeyDictionary()

    @wraps(make)
    def remembered(values: Tensor, *rest: Any) -> Result:
        tensors = [t for t in (values, *rest) if isinstance(t, Tensor)]
        if any(t.is_inference() for t in tensors):
            return make(values, *rest)
        state = (values._version, [(id(t), t._version) if isinstance(t, Tensor) else t for t in rest])
        found = kept.get(values)
        if found is None or found[0] != state:
            found = kept[values] = (state, make(values, *rest), rest)  # rest: while it is held, its ids stay its own
        return found[1]

    return remembered


def constant_to_compile(ask: Callable[..., Result]) -> Callable[..., Result]:
    """Marks a function that ``torch.compile`` calls once and takes the result of for granted.

    It is ``torch.compiler.assume_constant_result``, which would import all of the compiler as this package is imported.
    """
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask
