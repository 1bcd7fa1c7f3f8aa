"""Who shards the same model, as contestants of benchmarks/sharding.py; each as its documentation says.

All clip to norm 1.0 and step fused AdamW. A rank has as many targets as any other, so that the mean over ranks, which
is all that most of them know, is the mean over targets that ours takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import floatline as fl
from floatline.step import default_loss
from floatline.techniques.layers import repeated_layers
from race import adamw, bytes_of
from technique_models import Work

MAX_NORM = 1.0


def untied(work: Work) -> Work:
    """Return the work on a model whose output head has a weight of its own."""

    def build() -> nn.Module:
        model: Any = work.build()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model

    return replace(work, name="untied", build=build)


class CannotRunError(Exception):
    """A peer does not run here; the text says why."""


@dataclass
class Rank:
    """What a contestant is given on one rank.

    Attributes:
        batch: This rank's rows, on its device.
        all_rows: Those of all ranks.
    """

    work: Work
    device: torch.device
    batch: Any
    all_rows: Any
    size: int

    def build(self) -> nn.Module:
        return self.work.build().to(self.device)

    def loss(self, model: nn.Module) -> torch.Tensor:
        return default_loss(model, self.batch)


@dataclass
class Contestant:
    """Something that trains a model on this rank.

    Attributes:
        step: Makes one update, returns this rank's loss; None where this rank has nothing to do.
        model: Whose weights are weighed.
        note: What a reader must know to understand its numbers.
        gradients: Bytes of gradients that the optimizer found on this rank, at its last step.
    """

    step: Callable[[], torch.Tensor] | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    note: str = ""
    gradients: list[int] = field(default_factory=list)

    def weigh_gradients(self) -> None:
        """From now on, note the bytes of gradients when the optimizer steps."""

        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.gradients[:] = [bytes_of([p.grad for p in parameters if p.grad is not None])]

        self.optimizer.register_step_pre_hook(note)


def ours(rank: Rank, technique: str = "sharding") -> Contestant:
    """TrainStep with `sharding`."""
    step = fl.TrainStep(rank.build(), adamw, precision="32-true", max_grad_norm=MAX_NORM, techniques=[technique])
    return Contestant(lambda: step(rank.batch).loss, step.model, step.optimizer)


def bare(rank: Rank) -> Contestant:
    """A bare loop: `fully_shard` on each layer, then on the model."""
    model = _fully_shard(rank.build(), None)
    optimizer = adamw(model.parameters())
    return Contestant(partial(_bare_step, rank, model, optimizer), model, optimizer)


def data_parallel(rank: Rank) -> Contestant:
    """torch's DistributedDataParallel: every rank has everything."""
    model = nn.parallel.DistributedDataParallel(rank.build())
    optimizer = adamw(model.parameters())
    return Contestant(partial(_bare_step, rank, model, optimizer), model, optimizer)


def one_process(rank: Rank) -> Contestant:
    """All rows on rank 0, with the threads of all ranks; the others wait."""
    model = rank.build()
    optimizer = adamw(model.parameters())
    threads = torch.get_num_threads()

    def step() -> torch.Tensor:
        torch.set_num_threads(threads * rank.size)
        try:
            return _bare_step(rank, model, optimizer, rank.all_rows)
        finally:
            torch.set_num_threads(threads)

    return Contestant(step if dist.get_rank() == 0 else None, model, optimizer, "all rows in one process")


def _bare_step(
    rank: Rank, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any | None = None
) -> torch.Tensor:
    loss = default_loss(model, rank.batch if batch is None else batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _fully_shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in repeated_layers(model).values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def accelerate(rank: Rank) -> Contestant:
    """accelerate with its FSDP plugin, version 2."""
    accelerator, plugin = _accelerator(rank)
    contestant = _accelerated(accelerator, rank)
    if not _is_sharded(contestant.model):
        contestant.note = (
            f"fsdp_version={plugin.fsdp_version} was asked for, but accelerate takes the plugin on accelerators only "
            f"(AcceleratorState.__init__), says nothing, and wraps in {type(contestant.model).__name__}"
        )
    return contestant


def accelerate_told(rank: Rank) -> Contestant:
    """accelerate's FSDP2 wrapping, clipping and optimizer, after its state was told that this is FSDP."""
    from accelerate.utils import DistributedType

    if rank.device.type != "cpu":
        raise CannotRunError("not needed: the plugin is taken here")
    accelerator, plugin = _accelerator(rank)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    contestant = _accelerated(accelerator, rank)
    contestant.note = "its state was changed by hand to FSDP, so that its wrapping runs on CPU: not what a user gets"
    return contestant


def _accelerator(rank: Rank) -> tuple[Any, Any]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(m).__name__ for m in repeated_layers(rank.work.build()).values()}),
        cpu_ram_efficient_loading=False,
    )
    return Accelerator(cpu=rank.device.type == "cpu", fsdp_plugin=plugin), plugin


def _accelerated(accelerator: Any, rank: Rank) -> Contestant:
    model = rank.build()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))

    def step() -> torch.Tensor:
        loss = rank.loss(model)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contestant(step, model, optimizer.optimizer)


def fabric(rank: Rank) -> Contestant:
    """Lightning Fabric's ModelParallelStrategy, which has FSDP2; its user calls `fully_shard`."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        lambda model, mesh: _fully_shard(model, mesh["data_parallel"]),
        data_parallel_size=rank.size,
        tensor_parallel_size=1,
    )
    trainer = Fabric(accelerator=rank.device.type, devices=rank.size, strategy=strategy)
    trainer.launch()
    model = trainer.setup_module(rank.work.build())
    optimizer = trainer.setup_optimizers(adamw(model.parameters()))

    def step() -> torch.Tensor:
        loss = rank.loss(model)
        trainer.backward(loss)
        trainer.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contestant(step, model, optimizer.optimizer)


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


CONTESTANTS: dict[str, Callable[[Rank], Contestant]] = {
    "fully_shard, bare loop": bare,
    "fully_shard, again": bare,
    "sharding": ours,
    "sharding, kept after forward": partial(ours, technique="sharding(reshard_after_forward=False)"),
    "~ accelerate, FSDP2 plugin": accelerate,
    "~ accelerate, FSDP2 told": accelerate_told,
    "~ Lightning Fabric, FSDP2": fabric,
    "DistributedDataParallel": data_parallel,
    "one process": one_process,
}
"""Name -> makes the contestant on a rank; raises CannotRunError where it does not run."""


def site(error: BaseException) -> str:
    """Return where an error was raised, as `file:line`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
