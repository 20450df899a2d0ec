"""``fpe.sparse``: a wider model with new weights at the dense one's number of non-zeros."""

from collections.abc import Callable

import pytest
import torch
from support import mlp, seeded
from torch import nn

import fpe


@pytest.mark.parametrize(("width", "masked"), [(2, "first"), (3, "first"), (2, "both"), (4, "both")])
def test_sparse_models_are_wide_at_the_dense_count(width: int, masked: str) -> None:
    model = mlp(64, 16, 6)
    before = [p.clone() for p in model.parameters()]
    wide = fpe.sparse(model, width, masked, generator=seeded())  # type: ignore[arg-type]
    assert fpe.nonzeros(wide) == fpe.nonzeros(model)
    assert all(torch.equal(now, was) for now, was in zip(model.parameters(), before, strict=True))
    first, second = (m for m in fpe.to_dense(wide).modules() if isinstance(m, nn.Linear))
    assert (first.out_features, second.in_features) == (16 * width, 16 * width)
    share = fpe.nonzeros(model) / (16 * width * (64 + 6))
    if masked == "both":
        assert float((first.weight != 0).float().mean()) == pytest.approx(share, abs=0.01)
        assert float((second.weight != 0).float().mean()) == pytest.approx(share, abs=0.01)
    else:
        assert int((second.weight != 0).sum()) == 6 * 16 * width
    first = first.requires_grad_(False)
    kept = (first.weight != 0).sum() / first.out_features
    assert float(first.weight.abs().max()) == pytest.approx(float(kept) ** -0.5, rel=0.05)


def test_masks_are_seeded_and_norms_are_widened() -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5))
    one, two, other = (fpe.sparse(model, 2, generator=seeded(seed)) for seed in (1, 1, 2))
    masks = [model.get_submodule("0").kept() for model in (one, two, other)]  # type: ignore[operator]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert one(torch.randn(3, 20)).shape == (3, 5) and one[1].normalized_shape == (16,)


def test_named_pairs_train_with_moving_masks_and_are_restored() -> None:
    model = mlp(24, 13, 6)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wide = fpe.sparse(model, 2, pairs=[(names[0], names[1])], generator=seeded())
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-2)
    rewiring = fpe.Rewiring(wide, optimizer, every=2, regrow="gradient")
    masks = wide.get_submodule(names[0]).kept().clone()  # type: ignore[operator]
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wide(torch.randn(32, 24)), torch.randint(6, (32,))).backward()
        optimizer.step()
        rewiring.step()
    assert not torch.equal(masks, wide.get_submodule(names[0]).kept())  # type: ignore[operator]
    assert fpe.nonzeros(wide) == fpe.nonzeros(model)
    again, x = fpe.restore(mlp(24, 13, 6), wide.state_dict()), torch.randn(3, 24)
    assert torch.equal(again(x), wide(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fpe.sparse(mlp(24, 13, 6), 1), ValueError, "width >= 2"),
        (lambda: fpe.sparse(mlp(24, 13, 6), 2.0), ValueError, "whole width >= 2.*got 2.0"),  # type: ignore[arg-type]
        (lambda: fpe.sparse(mlp(64, 8, 8, 8, 80)), ValueError, "sparse: 4 -> 6: a dense second layer"),
        (lambda: fpe.sparse(mlp(24, 13, 6), 2.5), ValueError, "whole width >= 2"),  # type: ignore[arg-type]
        (lambda: fpe.sparse(mlp(24, 13, 6), 2, "second"), ValueError, "'second'"),  # type: ignore[arg-type]
        (lambda: fpe.sparse(mlp(6, 13, 24), 2), ValueError, "masked='both'"),
        (lambda: fpe.sparse("model"), TypeError, "nn.Module"),  # type: ignore[arg-type]
        (lambda: fpe.sparse(mlp(24, 13, 6), generator=7), TypeError, "sparse"),  # type: ignore[arg-type]
        (lambda: fpe.sparse(mlp(24, 13, 6), pairs=[("a", "b")]), ValueError, "'a'"),
    ],
)
def test_bad_calls_are_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
