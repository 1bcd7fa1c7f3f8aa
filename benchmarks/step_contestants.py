"""Who is compared in step_overhead.py: the same training, written as each library's own documentation writes it.

All train one small causal transformer (128 tokens a batch; 5.0 M parameters, or 0.2 M) in bf16 autocast: shuffled
batches of pre-made tensors, gradients clipped to norm 1, fused AdamW, a learning rate that falls linearly in a
LambdaLR. A step lasts from one draw of a batch to the next.

What is logged. A loop that the user writes (bare, TrainStep, accelerate, Fabric) reads the loss each step into a list.
A loop that the library owns logs as it does by itself, twice: once told to log every step, once as rarely as it is set
up to by default (Lightning every 50 steps, HF Trainer every 500). Loggers are alike, TensorBoard events; progress bars
are on, as they are for users. Floatline's loop has no setting here: it writes loss, gradient norm, learning rate,
tokens and times of every step to metrics.jsonl and TensorBoard and shows a bar. Checkpoints and evaluation are off
everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from common import Clock

SHAPES = {"5M": (256, 6), "0.2M": (64, 2)}
"""Size by name: width and layers."""
WIDTH, LAYERS = SHAPES[os.environ.get("BENCHMARK_MODEL", "5M")]  # set by step_overhead.py, inherited by contestants
VOCABULARY, HEADS = 512, 4
BATCH, LENGTH = 4, 32
UPDATES = 100_000  # more than any benchmark makes
MAX_GRAD_NORM = 1.0


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """A causal language model that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids) + self.position.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


class Sequences(Dataset[dict[str, Tensor]]):
    """64 pre-made random sequences, over and over, so that an epoch never ends."""

    def __init__(self) -> None:
        tokens = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(LENGTH, dtype=torch.int64)
        self.samples = [{"input_ids": row, "labels": row, "attention_mask": mask} for row in tokens]

    def __len__(self) -> int:
        return UPDATES * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(self.samples[index % len(self.samples)])


def make_model(clock: Clock) -> nn.Module:
    """Return the model, the same for all; at the end of each turn its loss on all sequences is noted."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    model = TinyTransformer()
    data = Sequences()
    batch = default_collate([data[index] for index in range(64)])

    def check() -> float:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return float(model(**batch)["loss"])

    clock.check = check
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 - step / UPDATES)


def make_loader(clock: Clock) -> DataLoader[Any]:
    return DataLoader(Sequences(), batch_size=BATCH, shuffle=True, collate_fn=clock.watch(default_collate))


# ---------------------------------------------------------------------------------------------------------------------
# Loops that the user writes


def clip(model: nn.Module) -> bool:
    """What every loop does between backward and step; says whether to step."""
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    return True


def bare_losses(clock: Clock, between: Callable[[nn.Module], bool] = clip) -> Iterator[Tensor]:
    """The loop that everything is compared with; `between` runs between backward and step."""
    model = make_model(clock)
    optimizer = make_optimizer(model)
    schedule = make_schedule(optimizer)
    for batch in make_loader(clock):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch)["loss"]
        loss.backward()
        if between(model):
            optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss


def bare(clock: Clock, folder: Path) -> None:
    losses = []
    for loss in bare_losses(clock):
        losses.append(loss.item())


def bare_unread(clock: Clock, folder: Path) -> None:
    for _ in bare_losses(clock):
        pass


def train_step(clock: Clock, folder: Path) -> None:
    from floatline import Guard, TrainStep

    model = make_model(clock)
    optimizer = make_optimizer(model)
    step = TrainStep(
        model,
        optimizer,
        precision="bf16-mixed",
        max_grad_norm=MAX_GRAD_NORM,
        guard=Guard(),
        schedule=make_schedule(optimizer),
    )
    losses = []
    for batch in make_loader(clock):
        losses.append(step(batch).loss.item())


def accelerate(clock: Clock, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    raw = make_model(clock)
    optimizer = make_optimizer(raw)
    model, optimizer, loader, schedule = accelerator.prepare(
        raw, optimizer, make_loader(clock), make_schedule(optimizer)
    )
    losses = []
    for batch in loader:
        loss = model(**batch)["loss"]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())


def fabric(clock: Clock, folder: Path) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    raw = make_model(clock)
    model, optimizer = fabric.setup(raw, make_optimizer(raw))
    loader = fabric.setup_dataloaders(make_loader(clock))
    schedule = make_schedule(optimizer)
    losses = []
    for batch in loader:
        loss = model(**batch)["loss"]
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())


# ---------------------------------------------------------------------------------------------------------------------
# Loops that the library owns


def full_loop(clock: Clock, folder: Path) -> None:
    """The loop of `floatline train`, from its data loader to its run directory, around the benchmark's model."""
    from rich.console import Console

    from floatline import Guard, TrainStep
    from floatline.techniques import OneRank
    from floatline.train.data import Collator, make_loader
    from floatline.train.loop import Loop
    from floatline.train.manifest import Manifest
    from floatline.train.recipe import parse_recipe
    from floatline.train.rundir import RunDirectory
    from floatline.train.setup import Run

    recipe = parse_recipe(
        {
            "model": {"path": "none"},
            "data": {"train": "none"},
            "train": {"steps": UPDATES, "batch_size": BATCH, "checkpoint_every": UPDATES},
            "run": {"dir": str(folder / "run"), "log_every": 1},
        }
    )
    model = make_model(clock)
    optimizer = make_optimizer(model)
    step = TrainStep(
        model,
        optimizer,
        precision="bf16-mixed",
        max_grad_norm=MAX_GRAD_NORM,
        guard=Guard(),
        schedule=make_schedule(optimizer),
    )
    data: Any = Sequences()
    loader = make_loader(data, batch_size=BATCH, collate=clock.watch(Collator(pad_token_id=0)))
    unused: Any = None  # processor, evaluator, and how weights are written
    with RunDirectory(recipe.run.dir) as rundir:
        run = Run(
            rundir=rundir,
            manifest=Manifest(rundir),
            recipe=recipe,
            processor=unused,
            datasets={"train": data},
            loader=loader,
            step=step,
            evaluator=unused,
            weights=unused,
            ranks=OneRank(),
            state=None,
        )
        Loop(run, Console(stderr=True, force_terminal=True)).run()


def _lightning(clock: Clock, folder: Path, log_every: int) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(clock)

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = self.model(**batch)["loss"]
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            # Trainer(gradient_clip_val=...) refuses fused optimizers, so the hook clips by itself.
            nn.utils.clip_grad_norm_(self.parameters(), MAX_GRAD_NORM)

        def configure_optimizers(self) -> Any:
            optimizer = make_optimizer(self.model)
            return [optimizer], [{"scheduler": make_schedule(optimizer), "interval": "step"}]

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=UPDATES,
        log_every_n_steps=log_every,
        logger=TensorBoardLogger(folder),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), make_loader(clock))


def lightning_every(clock: Clock, folder: Path) -> None:
    _lightning(clock, folder, 1)


def lightning_default(clock: Clock, folder: Path) -> None:
    _lightning(clock, folder, 50)


def _transformers(clock: Clock, folder: Path, **logging: Any) -> None:
    from transformers import Trainer, TrainingArguments, default_data_collator

    model = make_model(clock)
    optimizer = make_optimizer(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=UPDATES,
        per_device_train_batch_size=BATCH,
        bf16=True,
        use_cpu=True,
        max_grad_norm=MAX_GRAD_NORM,
        save_strategy="no",
        report_to=["tensorboard"],
        **logging,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Sequences(),
        data_collator=clock.watch(default_data_collator),
        optimizers=(optimizer, make_schedule(optimizer)),
    )
    trainer.train()


def transformers_every(clock: Clock, folder: Path) -> None:
    _transformers(clock, folder, logging_steps=1)


def transformers_default(clock: Clock, folder: Path) -> None:
    _transformers(clock, folder)
