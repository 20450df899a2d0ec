"""Trainers that people use, on expanded models: a few steps, removed weights at zero, states that come back."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from architectures import ARCHITECTURES
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fpe
from fpe.layers import ExpandedLinear


def tokens(count: int = 16) -> Tensor:
    return torch.randint(3, 60, (count, 8), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    torch.manual_seed(0)
    return fpe.expand(ARCHITECTURES[0].make(), generator=torch.Generator().manual_seed(0))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    return fpe.expand(dense, generator=torch.Generator().manual_seed(0))


def pairs() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 12, generator=generator), torch.randint(3, (32,), generator=generator))


def assert_removed_are_zero(model: nn.Module) -> None:
    layers = [m for m in model.modules() if isinstance(m, ExpandedLinear)]
    assert layers
    for layer in layers:
        assert torch.equal(layer.weight != 0, layer.kept())


def assert_equal_states(ours: nn.Module, theirs: nn.Module) -> None:
    one, other = ours.state_dict(), theirs.state_dict()
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# transformers


def trainer(folder: Path, model: Any, steps: int, **options: Any) -> hf.Trainer:
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    return hf.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:4])


def test_the_trainer_of_transformers_resumes(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", llama(), 4)
    whole.train()
    assert_removed_are_zero(whole.model)
    first = trainer(tmp_path / "parts", llama(), 4)
    first.add_callback(StopAt(2))
    first.train()
    second = trainer(tmp_path / "parts", llama(), 4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert_equal_states(second.model, whole.model)


class StopAt(hf.TrainerCallback):
    """Ends a training early, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_the_trainer_of_transformers_loads_the_best(tmp_path: Path) -> None:
    best = trainer(tmp_path, llama(), 6, load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=3)
    best.train()
    again = hf.AutoModelForCausalLM.from_pretrained(best.state.best_model_checkpoint)
    assert_equal_states(best.model, again)
    assert_removed_are_zero(best.model)


def test_a_loaded_model_goes_into_the_trainer(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    run = trainer(tmp_path / "run", loaded, 2, gradient_checkpointing=True)
    run.train()
    assert_removed_are_zero(run.model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain, saving = llama().train(), llama().train()
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# accelerate


def test_accelerate_trains_saves_and_resumes(tmp_path: Path) -> None:
    def steps(accelerator: Accelerator, model: Any, optimizer: Any, loader: Any) -> None:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    def prepared() -> tuple[Any, ...]:
        accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=2), classifier()
        loader = DataLoader(pairs(), batch_size=8)
        return accelerator, *accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2), loader)

    accelerator, model, optimizer, loader = prepared()
    steps(accelerator, model, optimizer, loader)
    accelerator.save_state(tmp_path)
    steps(accelerator, model, optimizer, loader)
    again, other, other_optimizer, other_loader = prepared()
    again.load_state(tmp_path)
    steps(again, other, other_optimizer, other_loader)
    assert_equal_states(other, model)
    assert_removed_are_zero(accelerator.unwrap_model(model))


# Lightning


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = classifier()

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(folder: Path, module: Module, epochs: int, *callbacks: Any, resume: Path | None = None) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = lightning.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=bool(callbacks),
        **quiet,
    )
    run.fit(module, DataLoader(pairs(), batch_size=8), ckpt_path=resume)
    return run


def test_lightning_resumes(tmp_path: Path) -> None:
    whole = Module()
    fit(tmp_path, whole, 2)
    first = Module()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="first")
    fit(tmp_path, first, 1, saved)
    second = Module()
    fit(tmp_path, second, 2, resume=tmp_path / "first.ckpt")
    assert_equal_states(second, whole)
    assert_removed_are_zero(second)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_of_lightning_keep_the_edges(kind: str, tmp_path: Path) -> None:
    module, plain = Module(), Module()
    average = EMAWeightAveraging(decay=0.5) if kind == "ema" else StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    fit(tmp_path, module, 3, average)
    fit(tmp_path, plain, 3)
    assert_removed_are_zero(module)
    fresh = classifier()
    for ours, theirs in zip(module.model.modules(), fresh.modules(), strict=True):
        if isinstance(ours, ExpandedLinear):
            assert torch.equal(ours.kept(), theirs.kept())  # type: ignore[operator]
    assert not torch.equal(module.model[0].edge_weight, plain.model[0].edge_weight)
    module.model.eval()(torch.randn(2, 12))
    assert_equal_states(copy.deepcopy(module), module)
