"""The torch half inside training libraries: what they save resumes bit for bit, what they scale, skip or clip is done once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from anarcho_optim import OptimConfig, schedules
from anarcho_optim.torch import MuonAdamW, param_groups
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

STEPS = 12
CONFIG = OptimConfig(lr=0.01, warmup_steps=2, normuon=True)


def autoencoder() -> nn.Module:
    """Matrices of both orientations and biases."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def optimizer_of(model: nn.Module) -> tuple[MuonAdamW, LambdaLR]:
    optimizer = MuonAdamW(param_groups(model, config=CONFIG))
    return optimizer, LambdaLR(optimizer, lambda step: schedules.lr_scale(CONFIG, step, total_steps=STEPS))


def vectors() -> TensorDataset:
    return TensorDataset(torch.randn(6 * 8, 16, generator=torch.Generator().manual_seed(0)))


def tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights and optimizer state by name."""
    state = optimizer.state_dict()["state"]
    return dict(model.state_dict()) | {f"{i}.{key}": value for i, own in state.items() for key, value in own.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the first device that a process asks for; the tests here want the CPU, and others may not."""
    state = pytest.importorskip("accelerate.state")

    def reset() -> None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

    reset()
    yield
    reset()


def prepared(*, accumulate: int = 1) -> tuple[Any, ...]:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True, gradient_accumulation_steps=accumulate), autoencoder()
    return accelerator, *accelerator.prepare(model, *optimizer_of(model), DataLoader(vectors(), batch_size=8))


def epoch(accelerator: Any, model: Any, optimizer: Any, scheduler: Any, data: Any) -> None:
    for (x,) in data:
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - x).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate_resumes_bit_for_bit(tmp_path):
    first = prepared()
    epoch(*first)
    first[0].save_state(str(tmp_path))
    epoch(*first)
    second = prepared()
    second[0].load_state(str(tmp_path))
    epoch(*second)
    assert same(tensors(first[1], first[2]), tensors(second[1], second[2]))
    assert first[3].get_last_lr() == second[3].get_last_lr()


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate_takes_the_steps_of_a_plain_loop():
    prepared_ones = prepared()
    epoch(*prepared_ones)
    model = autoencoder()
    optimizer, scheduler = optimizer_of(model)
    for (x,) in DataLoader(vectors(), batch_size=8):
        (model(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert same(tensors(prepared_ones[1], prepared_ones[2]), tensors(model, optimizer))


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate_steps_once_per_accumulated_gradient():
    accelerator, model, optimizer, scheduler, data = prepared(accumulate=3)
    epoch(accelerator, model, optimizer, scheduler, data)
    biases = [own["step"] for own in optimizer.state_dict()["state"].values() if "step" in own]
    assert [step.item() for step in biases] == [2.0, 2.0]


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=24, max_position_embeddings=16, **sizes))


def hugging_face_trainer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama()
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    counting = [{"input_ids": t, "labels": t} for t in torch.arange(8) + torch.arange(16)[:, None]]
    return transformers.Trainer(model, arguments, train_dataset=counting, optimizers=optimizer_of(model))


@pytest.mark.usefixtures("_fresh_accelerate")
def test_the_trainer_of_transformers_resumes_bit_for_bit(tmp_path):
    first = hugging_face_trainer(tmp_path)
    before = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    first.train()
    assert not any(torch.equal(p, before[name]) for name, p in first.model.named_parameters())
    second = hugging_face_trainer(tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert same(tensors(first.model, first.optimizer), tensors(second.model, second.optimizer))


def test_a_model_of_transformers_is_routed_like_its_parts():
    routed = {group["name"]: [name for name, _ in group["params"]] for group in param_groups(tiny_llama())}
    assert routed["embeddings"] == ["model.embed_tokens.weight"]
    assert routed["heads"] == ["lm_head.weight"]
    assert len(routed["matrices"]) == 2 * 7
    assert all(name.endswith("norm.weight") for name in routed["gains and biases"])


def scaled_step(optimizer: MuonAdamW, model: nn.Module, scaler: Any, *, spoil: bool) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (model(x) - x).square().mean()
    scaler.scale(loss).backward()
    if spoil:
        model[0].weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def test_a_gradient_scaler_skips_infinite_gradients_and_changes_neither_weights_nor_state():
    model = autoencoder()
    optimizer, _ = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_step(optimizer, model, scaler, spoil=False)
    before = {name: value.clone() for name, value in tensors(model, optimizer).items()}
    scaled_step(optimizer, model, scaler, spoil=True)
    assert same(tensors(model, optimizer), before)
    assert scaler.get_scale() == 2.0**9
    scaled_step(optimizer, model, scaler, spoil=False)
    after = tensors(model, optimizer)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not any(torch.equal(value, before[name]) for name, value in after.items())


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning")


def lightning_fit(lightning: Any, folder: Path, *, epochs: int, checkpoint: Path | None = None) -> Any:
    """A trainer that has trained an autoencoder on the CPU, from the start or from a checkpoint."""

    class Autoencoder(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = autoencoder()
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = (self.layers(batch[0]) - batch[0]).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer, scheduler = optimizer_of(self)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Autoencoder(), DataLoader(vectors(), batch_size=8), ckpt_path=checkpoint)
    return trainer


def test_fitting_with_lightning_lowers_the_loss_and_resumes_bit_for_bit(lightning, tmp_path):
    whole = lightning_fit(lightning, tmp_path / "whole", epochs=2)
    losses = whole.lightning_module.losses
    assert all(late < early for early, late in zip(losses[:6], losses[6:], strict=True))
    half = lightning_fit(lightning, tmp_path / "half", epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = lightning_fit(lightning, tmp_path / "resumed", epochs=2, checkpoint=tmp_path / "half.ckpt")
    assert same(
        tensors(whole.lightning_module, whole.optimizers[0]), tensors(resumed.lightning_module, resumed.optimizers[0])
    )
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (whole, resumed)]
    assert rates[0] == rates[1]
