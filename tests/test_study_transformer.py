"""Transformers, adapters and autoencoders of the studies: what is expanded, what is frozen, which weights are kept."""

import pytest
import torch
from support import seeded
from torch import Tensor, nn

import fpe
from fpe.bench.studies import bottleneck, transformer
from fpe.bench.studies.protocol import Data, Training
from fpe.bench.studies.stack import Stack, classification_loss
from fpe.bench.studies.transformer import ATTENTION, BOTH, Attention, Cell, Settings, Transformer, pairs

SMALL = Settings(data="digits", trials=2, epochs=1, tokens=64)


@pytest.mark.parametrize("inputs", [None, 4], ids=["text", "patches"])
def test_values_and_their_projection_are_a_pair(inputs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Transformer(SMALL, "narrow", inputs, 16, 10)
    x = torch.randint(128, (2, 16), generator=seeded()) if inputs is None else torch.randn(2, 16, 4, generator=seeded())
    wide = fpe.expand(model, 2, pairs=pairs(2, BOTH), generator=seeded(), example_inputs=x)
    assert fpe.nonzeros(wide) == fpe.nonzeros(model)
    assert wide.blocks[0].attention.value.out_features == 2 * model.blocks[0].attention.value.out_features
    torch.testing.assert_close(fpe.to_dense(wide)(x), wide(x))

    def heads_first(self: Attention, x: Tensor) -> Tensor:  # a head reads channels that another head's neuron wrote
        values = self.value(x).unflatten(-1, (transformer.HEADS, -1))
        return self.out((values * torch.arange(1, 3)[:, None]).flatten(-2))

    monkeypatch.setattr(Attention, "forward", heads_first)
    with pytest.raises(ValueError, match="does not treat every neuron alike"):
        fpe.expand(model, 2, pairs=pairs(2, ATTENTION), generator=seeded(), example_inputs=x)


def test_attention_is_pytorchs() -> None:
    layer = Attention(32, 8, causal=True)
    x = torch.randn(3, 5, 32, generator=seeded())
    q, k, v = (one(x).unflatten(-1, (2, -1)).transpose(1, 2) for one in (layer.query, layer.key, layer.value))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).flatten(2)))


def test_patches_are_squares_of_the_image() -> None:
    images = torch.arange(2 * 64.0).view(2, 64)
    patches = transformer.in_patches(images)
    assert patches.shape == (2, 16, 4)
    assert torch.equal(patches[1, 6].view(2, 2), images[1].view(8, 8)[2:4, 4:6])


def test_characters_are_followed_by_the_next_and_parts_do_not_overlap() -> None:
    data = transformer.sequences("text")
    assert torch.equal(data.x[5, 1:], data.y[5, :-1]) and torch.equal(data.x[6], data.y[5])
    assert data.x.shape[1] == transformer.CONTEXT
    known = bytes(data.x[:, 0].tolist())
    for aside in (data.x_validation, data.x_test):
        assert sum(bytes(row.tolist()) in known for row in aside) < 0.1 * len(aside)


def test_the_best_weights_by_validation_are_restored() -> None:
    x = torch.eye(2).repeat(8, 1)
    y = torch.tensor([0, 1]).repeat(8)
    stack = Stack([nn.Linear(2, 2) for _ in range(2)])
    watch = transformer.Watch(Data(x, y, x, y, x, y), every=1)
    good, bad = torch.eye(2) * 3, -torch.eye(2) * 3
    with torch.no_grad():
        for step, (first, second) in enumerate(((good, bad), (bad, good), (bad, bad)), 1):
            stack.parameters["weight"].copy_(torch.stack([first, second]))
            stack.parameters["bias"].zero_()
            watch(step, stack, {})
    assert watch.at.tolist() == [1, 2] and len(watch.curve) == 3
    assert torch.equal(watch.restored(stack).parameters["weight"], torch.stack([good, good]))
    assert transformer.measured(stack, x, y)[0] == pytest.approx(watch.least.tolist())


def test_a_step_takes_its_share_of_the_step_size() -> None:
    x, y = torch.randn(2, 4, 3, generator=seeded()), torch.zeros(2, 4, dtype=torch.long)
    made = [nn.Linear(3, 2) for _ in range(2)]
    after = []
    for rate in (None, lambda step: 1.0, lambda step: float(step == 1), lambda step: 0.0):
        stack = Stack(made)
        stack.train(iter([(x, y)] * 3), Training(1, 4, 0.1), classification_loss, own=True, rate=rate)
        after.append(stack.parameters["weight"].detach().clone())
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])
    assert torch.equal(after[3], torch.stack([model.weight.detach() for model in made]))
    assert not torch.equal(after[2], after[3])


def test_a_cell_starts_from_the_dense_model_and_reports_its_best() -> None:
    rows = transformer.run_cell(Cell(transformer.PARTITION), SMALL)
    assert [row["validation_bits"] for row in rows] == pytest.approx([min(row["curve"]) for row in rows], abs=1e-3)
    assert all(len(row["curve"]) == transformer.CHECKS for row in rows)


def test_an_adapters_network_is_frozen_and_learns_other_classes() -> None:
    settings = bottleneck.BottleneckSettings(data="digits", trials=2, epochs=1)
    first, second = bottleneck.halves(settings)
    assert int(first.y.max()) == 4 == int(second.y.max()) and len(first.x) + len(second.x) == 1293
    model = bottleneck.Adapted(bottleneck.frozen(settings)[0], 4, 5)
    assert fpe.nonzeros(model) == 2 * 4 * bottleneck.HIDDEN + 5 * bottleneck.HIDDEN
    stack = Stack([model, model])
    before = {name: parameter.detach().clone() for name, parameter in stack.parameters.items()}
    batches = iter([(second.x[:8], second.y[:8])])
    stack.train(batches, Training(1, 8, 0.1), classification_loss)
    after = stack.models()[0]
    assert not any(torch.equal(before[name], stack.parameters[name]) for name in before)
    assert all(torch.equal(old, new) for old, new in zip(model.buffers(), after.buffers(), strict=True))


def test_a_sparse_autoencoder_pays_for_errors_and_for_its_code_by_the_lengths_of_directions() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    outputs = torch.tensor([[[1.0, 1.0, 0.5], [3.0, 2.0, 0.0]]])
    expected = ((1 + 2.0 * 0.5) + 4) / 2
    assert float(bottleneck.sparse_loss(outputs, x, 2.0)) == pytest.approx(expected)
    model = bottleneck.Autoencoder(2, 3)
    before = model(x[0])
    with torch.no_grad():
        for parameter, by in ((model.encode.weight, 0.5), (model.encode.bias, 0.5), (model.decode.weight, 2)):
            parameter.mul_(by)
    torch.testing.assert_close(model(x[0]), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.decode.bias.copy_(x[0].mean(0))
    explained, active = bottleneck.score(bottleneck.AUTOENCODER, Stack([model]), x[0], x[0])
    assert explained == pytest.approx([0.0]) and active == [0.0]
