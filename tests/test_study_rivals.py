"""Networks that FPE is compared with: own batches, masks that move in a stack, pruning to a budget, their tables."""

import itertools

import pytest
import torch
from support import Recipe, mlp, seeded
from torch import nn

import fpe
from fpe.bench.results import Results
from fpe.bench.studies import field, rivals, rotation, scarce
from fpe.bench.studies.protocol import Data, Training
from fpe.bench.studies.stack import Stack, classification_loss, own_epochs_of
from fpe.bench.studies.trials import VALIDATION

SIZES = (24, 13, 6)


def problem() -> Data:
    x, y = torch.randn(96, 24, generator=seeded(1)), torch.randint(6, (96,), generator=seeded(2))
    return Data(x, y, x[:50], y[:50])


def test_validation_samples_are_a_seeded_part_of_the_training_samples() -> None:
    data = problem()
    held = data.held_out(0.25, seed=3)
    assert (len(held.x), len(held.x_validation), len(held.y_validation)) == (72, 24, 24)
    assert torch.equal(torch.cat([held.x, held.x_validation]).sort(0).values, data.x.sort(0).values)
    assert torch.equal(held.x, data.held_out(0.25, seed=3).x) and not torch.equal(held.x, data.held_out(0.25, seed=4).x)
    assert held.x_test is data.x_test
    for share, of in ((0.0, data), (1.0, data), (0.5, held)):
        with pytest.raises(ValueError, match="share between 0 and 1"):
            of.held_out(share)


def test_each_network_sees_every_sample_once_an_epoch_in_its_own_order() -> None:
    x = torch.arange(50.0)[:, None]
    data = Data(x, x[:, 0].long(), x, x[:, 0].long())
    batches = list(own_epochs_of(data, 2, 16, [seeded(1), seeded(2), seeded(1)]))
    assert [len(y[0]) for _, y in batches] == [16, 16, 16, 2] * 2
    seen = torch.cat([y for _, y in batches], 1)
    assert all(torch.equal(part.sort().values, torch.arange(50)) for part in seen.view(3 * 2, 50))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert all(torch.equal(x[..., 0].long(), y) for x, y in batches)


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("sparse", [False, True], ids=["expanded", "sparse"])
def test_a_stack_moves_masks_as_rewiring_does(regrow: str, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "EVERY", 3)
    data, steps = problem(), 12
    dense = [mlp(*SIZES, seed=seed) for seed in range(2)]
    models: list[nn.Module] = [Recipe().expand(model, 5) for model in dense]
    if sparse:
        models = [fpe.sparse(model, 2, "both", generator=seeded(5)) for model in dense]
    stack = Stack(models)
    draws = [seeded(7), seeded(8)]
    orders = [seeded(9), seeded(10)]
    batches = list(own_epochs_of(data, 4, 32, orders))
    move = rivals.moving(models, steps, draws, regrow)
    before = {name: mask.clone() for name, mask in stack.masks.items()}
    stack.train(iter(batches), Training(4, 32, 1e-2), classification_loss, own=True, move=move)
    assert any(not torch.equal(before[name], mask) for name, mask in stack.masks.items())
    for number, (model, stacked) in enumerate(zip(models, stack.models(), strict=True)):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        options = {"every": 3, "fraction": rivals.FRACTION, "steps": round(rivals.MOVING * steps), "regrow": regrow}
        rewiring = fpe.Rewiring(model, optimizer, generator=seeded(7 + number), **options)  # type: ignore[arg-type]
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[number]), y[number]).backward()
            optimizer.step()
            rewiring.step()
        for ours, theirs in zip(fpe.to_dense(model).parameters(), stacked.parameters(), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    assert stack.nonzeros == [fpe.nonzeros(model) for model in models]


def test_pruning_ends_at_the_budget_with_the_largest_weights() -> None:
    data, steps, budget = problem(), 8, 150
    models = [mlp(*SIZES, seed=seed) for seed in range(2)]
    for move in (rivals.gradual(budget, steps), rivals.one_shot(budget, 4)):
        stack = Stack(models)
        counts = []

        def watched(
            step: int, stack: Stack, gradients: object, move: rivals.Move = move, counts: list = counts
        ) -> object:
            kept = move(step, stack, {})
            counts.append(sum(int(mask[0].sum()) for mask in kept.values()) if kept else None)
            if kept:
                size = torch.cat([(w.abs() * kept[n]).flatten(1) for n, w in stack.weights.items()], 1)
                lost = torch.cat([(w.abs() * ~kept[n]).flatten(1) for n, w in stack.weights.items()], 1)
                least = size.masked_fill(size == 0, torch.inf).min(1).values
                assert bool((lost.max(1).values <= least).all())
            return kept

        batches = itertools.islice(own_epochs_of(data, 9, 32, [seeded(1), seeded(2)]), steps)
        stack.train(batches, Training(1, 32, 1e-2), classification_loss, own=True, move=watched)  # type: ignore[arg-type]
        assert stack.nonzeros == [budget, budget]
        assert all(bool((w[~stack.masks[n]] == 0).all()) for n, w in stack.weights.items())
        assert [count for count in counts if count is not None] == [budget]


def test_gradual_pruning_follows_the_cubic_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "EVERY", 2)
    stack = Stack([mlp(*SIZES)])
    whole, budget, steps = 24 * 13 + 13 * 6, 90, 16
    move = rivals.gradual(budget, steps)
    kept = {step: move(step, stack, {}) for step in range(1, steps + 1)}
    counts = {step: sum(int(m.sum()) for m in masks.values()) for step, masks in kept.items() if masks}
    assert counts == {s: budget + round((whole - budget) * (1 - s / 12) ** 3) for s in (2, 4, 6, 8, 10, 12)}


def test_every_rival_has_the_budget() -> None:
    settings = rivals.Settings(data="digits", trials=2, epochs=1, batch=64)
    for condition in rivals.NAMES:
        models, _ = rivals._begin(rivals.Cell(condition, 8, 2, 1), settings, 1)
        weights, budget = {fpe.nonzeros(model) for model in models}, 8 * (64 + 10)
        if condition in (rivals.GRADUAL, rivals.ONE_SHOT, rivals.WIDE):
            assert weights == {2 * budget}  # the first two are pruned on the way
        elif condition == rivals.LOW_RANK:
            assert max(weights) <= budget < max(weights) + 64 + 16
        else:
            assert weights == {budget}


def test_points_over_fpe_are_at_equal_epochs_in_all() -> None:
    def row(condition: str, before: int, epochs: int, trial: int, value: float) -> dict:
        size = {"neurons": 8, "width": 2, "condition": condition, "before": before, "epochs": epochs}
        return {**size, "trial": trial, "test_accuracy": value, "validation_accuracy": value, "nonzeros": 1}

    rows = [row(rivals.FPE, 25, 25, t, 50 + t) for t in (0, 1)] + [row(rivals.FPE, 25, 5, t, 40) for t in (0, 1)]
    rows += [row(rivals.RIGL, 0, 50, t, 53 + 2 * t) for t in (0, 1)] + [row(rivals.RIGL, 0, 5, t, 1) for t in (0, 1)]
    results = Results("rivals", {"data": "d", "trials": 2}, rows[::-1], {})
    shown = {line[0]: line for line in rivals.by_size(results).rows}
    assert shown[rivals.RIGL][-1] == "+3.5 ± 6.4" and shown[rivals.FPE][-1] == "0"
    by_epochs = {line[0]: line for line in rivals.by_epochs(results).rows}
    assert by_epochs[rivals.FPE][1:3] == ("25", "40.0 ± 0.0") and by_epochs[rivals.RIGL][1] == "0"


def test_methods_are_compared_trial_by_trial_at_equal_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(condition: str, neurons: int, epochs: int, trial: int, value: float) -> dict:
        size = {"neurons": neurons, "width": 2, "condition": condition, "before": 0, "epochs": epochs}
        return {**size, "trial": trial, "test_accuracy": value, "validation_accuracy": value, "nonzeros": 1}

    monkeypatch.setattr(rivals, "PAIRED", ((rivals.RIGL, rivals.SET),))
    rows = [row(rivals.RIGL, n, 50, t, 60 + n + 9 * t) for n in (4, 8) for t in range(3)]
    rows += [row(rivals.SET, n, 50, t, 58 + 9 * t) for n in (4, 8) for t in range(2)]
    rows += [row(rivals.SET, 8, 5, 2, 0), row(rivals.FPE, 8, 50, 0, 0), row(rivals.FPE, 4, 50, 0, 0)]
    results = Results("rivals", {"data": "d", "trials": 3}, rows[::-1], {})
    drawn = rivals.paired([results])
    assert drawn.columns[2:] == ("4 x 2", "8 x 2")
    assert drawn.rows == [("d", "RigL - SET", "+6.0 ± 0.0", "+10.0 ± 0.0")]
    assert rivals.by_size(results).columns[1] == "weights at 8 neurons, width 2", "of sizes with as many methods"


def test_rotations_are_rotations_and_go_part_of_the_way() -> None:
    torch.testing.assert_close(rotation.rotation(6, 0.0), torch.eye(6), atol=1e-6, rtol=0)
    whole, half = (rotation.rotation(7, share).double() for share in (1.0, 0.5))
    torch.testing.assert_close(half @ half, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole @ whole.T, torch.eye(7, dtype=torch.double), atol=1e-5, rtol=0)
    assert float(whole.det()) == pytest.approx(1, abs=1e-4) and not torch.allclose(whole, half, atol=0.1)


def test_rotated_data_are_centred_and_keep_their_distances() -> None:
    settings = rotation.RotationSettings(data="digits")
    plain, turned = (rotation.rotated("digits", share, settings) for share in (0.0, 1.0))
    assert settings.epochs == 100 and rotation.RotationSettings(data="boolean").lr == 3e-2
    assert len(plain.x_validation) == round(VALIDATION * 1437)
    torch.testing.assert_close(turned.x.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cdist(plain.x[:20], plain.x[:20]), torch.cdist(turned.x[:20], turned.x[:20]))
    assert not torch.allclose(plain.x, turned.x, atol=0.1)


def test_a_part_of_the_data_has_its_classes_and_its_principal_components() -> None:
    part = scarce.part_of("digits", 5, 7, 4000, "cpu")
    assert part.x.shape[1] == 7 and set(part.y.tolist()) == set(range(5)) == set(part.y_test.tolist())
    spread = torch.cov(part.x.T)
    torch.testing.assert_close(spread, spread.diagonal().diag(), atol=1e-3, rtol=0)
    assert bool((spread.diagonal().diff() <= 0).all())
    with pytest.raises(ValueError, match="expected 11 classes"):
        scarce.part_of("digits", 11, 7, 4000, "cpu")


def test_decibels_are_those_of_the_mean_squared_error() -> None:
    stack = Stack([nn.Linear(2, 3) for _ in range(2)])
    x, y = torch.randn(50, 2, generator=seeded()), torch.rand(50, 3, generator=seeded(1))
    for model, found in zip(stack.models(), field.decibels(stack, x, y), strict=True):
        error = (model(x) - y).square().mean().detach()
        assert found == pytest.approx(-10 * float(error.log10()), abs=1e-4)


def test_an_image_is_reduced_and_a_quarter_of_it_is_for_validation() -> None:
    pixels = field.image(field.Settings(pixels=20))
    count = len(pixels.x) + len(pixels.x_validation)
    assert len(pixels.x_validation) == count // 4 and pixels.x.shape[1] == field.FEATURES
    assert float(pixels.y.min()) >= 0 and float(pixels.y.max()) <= 1 and pixels.y.shape[1] == 3


def test_a_pair_is_priced_by_what_it_adds() -> None:
    """128 inputs, 16 neurons, 100 classes in 16 bits: a wide dense pair is the pair again, an expanded one an index."""
    wide, ours = (scarce.price(100, 128, 16, name, 64) for name in (scarce.WIDE, scarce.INPUT))
    assert wide[0] == 16 * (128 + 100) * 2
    assert 128 * 16 / 8 <= ours[0] < wide[0] / 10
    assert 0 < ours[1] < wide[1] < scarce.price(100, 128, 16, scarce.WIDE, 1024)[1]
    columns = {"condition": scarce.CONTINUED, "classes": 100, "inputs": 128, "neurons": 16}
    rows = [{**columns, "trial": trial, "test_accuracy": 40.0 + trial} for trial in (0, 1)]
    for condition, gain in ((scarce.INPUT, 2.0), (scarce.WIDE, 7.0)):
        rows += [{**columns, "condition": condition, "trial": t, "test_accuracy": 40.0 + t + gain} for t in (0, 1)]
    frame = scarce.priced(Results("scarce", {}, rows, {})).groupby("condition").first()
    assert frame.loc[scarce.WIDE, "per_kib"] == pytest.approx(7 / (wide[0] / 1024))
    assert frame.loc[scarce.INPUT, "per_ns"] == pytest.approx(2 / ours[1])


def test_a_head_that_cannot_pay_is_left_out() -> None:
    settings = scarce.ScarceSettings(data="digits", trials=1, epochs=1)
    with pytest.raises(rivals.ImpossibleError, match="must remove"):
        scarce.run_cell(scarce.Cell(scarce.INPUT, 10, 8, 4), settings)
