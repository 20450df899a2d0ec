"""What is made of a weight once for each of its versions: compressed forms, which an optimizer's step makes stale."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Result = TypeVar("Result")


def once_per_version(make: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the last result of ``make(values, codes, *rest)`` for as long as ``values`` lives unchanged.

    In-place changes count by PyTorch's version counter. Writing through ``.data`` goes unseen by it, as it does by
    autograd; tensors of ``torch.inference_mode`` have no counter, and nothing is kept for them.
    """
    kept: Any = WeakIdKeyDictionary()

    @wraps(make)
    def remembered(values: Tensor, codes: Tensor, *rest: Any) -> Result:
        if values.is_inference() or codes.is_inference():
            return make(values, codes, *rest)
        state = (values._version, id(codes), codes._version, rest)
        found = kept.get(values)
        if found is None or found[0] != state:
            found = kept[values] = (state, make(values, codes, *rest), codes)  # codes: so that its id stays its own
        return found[1]

    return remembered
