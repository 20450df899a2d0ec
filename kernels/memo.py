"""Results that are computed from a tensor once for each of its versions, and kept.

Compressed forms of a weight are outdated after a step of the optimizer. Codes and metadata are computed from labels,
which do not change, so in training they are computed once.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Result = TypeVar("Result")


def once_per_version(make: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the last result of ``make(values, *rest)`` for as long as ``values`` lives and nothing has changed.

    Other tensors among the arguments are compared by identity and version, everything else by ``==``. In-place changes
    are seen by PyTorch's version counter; writes through ``.data`` are not, as autograd does not see them either.
    Tensors made under ``torch.inference_mode`` have no counter, so nothing is kept for them.
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
            found = kept[values] = (state, make(values, *rest), rest)  # holding rest keeps its ids from being reused
        return found[1]

    return remembered


def constant_to_compile(ask: Callable[..., Result]) -> Callable[..., Result]:
    """Marks a function that ``torch.compile`` calls once, taking its result for a constant.

    It does what ``torch.compiler.assume_constant_result`` does, which would import the whole compiler.
    """
    ask._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ask
