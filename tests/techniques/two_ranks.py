"""What two gloo processes do for test_sharding: each function runs on both, on its half of the rows.

    python two_ranks.py RESULTS_DIRECTORY    under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, with tests/ importable

Every rank writes `rank{N}.pt`: scenario -> what it returned.
"""

import sys
from dataclasses import replace
from pathlib import Path

import contract
import torch
from contract import SPECS
from torch import nn

import floatline as fl
import zoo
from floatline.errors import ConfigError, FloatlineError
from floatline.techniques.batches.rows import cut_rows
from floatline.techniques.distributed.groups import join_ranks
from floatline.techniques.distributed.shards import full_tensor
from floatline.techniques.optim_steps.select_step import step_by_select

ZOO = {case.name: case for case in zoo.CASES}


def untied_gpt2():
    """A GPT-2 whose head has a weight of its own."""
    model = ZOO["gpt2"].build()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


ZOO["untied"] = replace(ZOO["gpt2"], name="untied", build=untied_gpt2)
UPDATES = 3


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def make(name, precision="32-true", techniques=("sharding",), optimizer=sgd, **kwargs):
    case = ZOO[name]
    model = case.build()
    return fl.TrainStep(
        model, optimizer, precision=precision, loss=case.loss, techniques=list(techniques), max_grad_norm=0.5, **kwargs
    )


def share(step, batch, rank, size):
    """The rows of one rank; all of them for a single process."""
    rows = torch.arange(4).tensor_split(size)[rank]
    return cut_rows(step.model, batch, rows)


def numbers(outputs):
    return [(float(o.loss), float(o.grad_norm), bool(o.applied)) for o in outputs]


def whole(step):
    """Parameters by name, taken off the shards."""
    step.undo()
    return {name: p.detach().clone() for name, p in step.model.named_parameters()}


def train(rank, size, name, precision="32-true", techniques=("sharding",), optimizer=sgd, edit=None):
    step = make(name, precision, techniques if size > 1 else techniques[1:], optimizer)
    batches = [ZOO[name].batch(seed) for seed in range(UPDATES)]
    for batch in batches:
        if edit:
            edit(batch)
    outputs = [step(share(step, batch, rank, size)) for batch in batches]
    return {"updates": numbers(outputs), "parameters": whole(step)}


def no_targets_in_the_second_half(batch):
    batch["labels"][2:] = -100


def uneven_targets(batch):
    batch["labels"][2:, 5:] = -100


SAME = {
    "gpt2": lambda r, n: train(r, n, "gpt2"),
    "qwen3_vl": lambda r, n: train(r, n, "qwen3_vl"),
    "tied": lambda r, n: train(r, n, "tied"),
    "mlp": lambda r, n: train(r, n, "mlp"),
    "gpt2 accumulated": lambda r, n: train(r, n, "gpt2", techniques=("sharding", "accumulation(micro_batches=2)")),
    "gpt2 batched": lambda r, n: train(r, n, "gpt2", techniques=("sharding", "batching(max_tokens=14)")),
    "gpt2 packed": lambda r, n: train(r, n, "gpt2", techniques=("sharding", "packing(max_tokens=14)")),
    "gpt2 uneven": lambda r, n: train(r, n, "gpt2", edit=uneven_targets),
    "gpt2 without targets": lambda r, n: train(r, n, "gpt2", edit=no_targets_in_the_second_half),
    "qwen3_vl kept": lambda r, n: train(r, n, "qwen3_vl", techniques=("sharding(reshard_after_forward=False)",)),
    "untied": lambda r, n: train(r, n, "untied"),
    "untied accumulated": lambda r, n: train(r, n, "untied", techniques=("sharding", "accumulation(micro_batches=2)")),
    "untied chunked": lambda r, n: train(r, n, "untied", techniques=("sharding", "chunked_loss(chunk_tokens=5)")),
    "untied recomputed": lambda r, n: train(
        r, n, "untied", techniques=("sharding", "checkpointing(layers=['transformer.wte', 'transformer.h.*'])")
    ),
    "qwen3_vl layers": lambda r, n: train(r, n, "qwen3_vl", techniques=('sharding(layers=["model.visual"])',)),
}
"""Scenarios that must equal one process with all the rows, in fp32."""

NEAR = {
    "gpt2 bf16-mixed": lambda r, n: train(r, n, "gpt2", "bf16-mixed"),
    "gpt2 bf16 in fp32": lambda r, n: train(r, n, "gpt2", "bf16-mixed", ('sharding(gather="fp32")',)),
    "untied bf16-mixed": lambda r, n: train(r, n, "untied", "bf16-mixed"),
    "qwen3_vl bf16-mixed": lambda r, n: train(r, n, "qwen3_vl", "bf16-mixed"),
    "qwen3_vl fp8": lambda r, n: train(r, n, "qwen3_vl", "fp8-mixed; model.language_model.layers=fp8"),
    "gpt2 island": lambda r, n: train(r, n, "gpt2", "bf16-mixed; lm_head=32; transformer.h.0.attn=32"),
    "qwen3_vl island": lambda r, n: train(r, n, "qwen3_vl", "bf16-mixed; model.visual=32; lm_head=32"),
    "gpt2 bf16-true": lambda r, n: train(r, n, "gpt2", "bf16-true"),
    "gpt2 16-mixed": lambda r, n: train(r, n, "gpt2", "16-mixed"),
    "gpt2 16-true": lambda r, n: train(r, n, "gpt2", "16-true"),
    "conv bf16-mixed": lambda r, n: train(r, n, "conv", "bf16-mixed"),
    "conv bf16-true": lambda r, n: train(r, n, "conv", "bf16-true"),
}
"""Scenarios that must be near one process."""


class Poisoned(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.factor = inner, 1.0

    def forward(self, x):
        return self.inner(x) * self.factor


def one_bad_rank(rank, size, precision, factor):
    """On rank 1 the second of three updates is not finite."""
    model = Poisoned(ZOO["mlp"].build())
    step = fl.TrainStep(model, adamw, precision=precision, loss=zoo.squares, techniques=["sharding"])
    if precision == "16-mixed":  # a scale at which the good updates do not overflow
        step.scaling.load_state_dict({**step.scaling.state_dict(), "scale": 64.0})
    outputs, weights, scales = [], [], []
    for update in range(3):
        model.factor = factor if update == 1 and rank == 1 else 1.0
        outputs.append(step(share(step, ZOO["mlp"].batch(update), rank, size)))
        weights.append(full_tensor(next(model.parameters()).detach()).clone())
        scales.append(step.scaling.current())
    return {"updates": numbers(outputs), "weights": weights, "scales": scales, "skipped": step.sentinel.skipped}


def uneven_micro_batches(rank, size):
    """Rank 0 has two micro-batches, rank 1 one."""
    step = make("gpt2", techniques=["sharding"])
    batch = ZOO["gpt2"].batch(0)
    parts = [cut_rows(step.model, batch, torch.tensor(rows)) for rows in ([[0], [1]] if rank == 0 else [[2, 3]])]
    output = step(parts)
    return {"updates": numbers([output]), "parameters": whole(step)}


def other_kinds(rank, size):
    step = make("qwen3_vl")
    batch = ZOO["qwen3_vl"].batch(0)
    with_image, without = (cut_rows(step.model, batch, torch.tensor([row])) for row in (0, 1))
    try:
        step(with_image if rank == 0 else without)
    except ConfigError as error:
        return str(error)


def selecting(rank, size):
    """A fused optimizer leaves shards alone on a bad verdict, and steps on a good one."""
    step = make("mlp", optimizer=adamw)
    batch = share(step, ZOO["mlp"].batch(0), rank, size)
    parameter = next(step.model.parameters())
    results = []
    for finite in (False, True):
        zoo.squares(step.model, batch).backward()
        before = full_tensor(parameter.detach()).clone()
        step_by_select(step.optimizer, torch.tensor(finite))
        step.optimizer.zero_grad()
        results.append(torch.equal(before, full_tensor(parameter.detach())))
    return results


def agreeing(rank, size):
    ranks = join_ranks("cpu").introduce()

    def fail():
        raise ConfigError(f"bad on rank {rank}", hint="mend it")

    def outcome(action):
        try:
            return action()
        except FloatlineError as error:
            return error.message, error.hint, error.told

    return {
        "sum": float(ranks.sum(torch.tensor(rank + 1.0))),
        "tell": ranks.tell([rank, 2**50 + 1]),
        "any": (ranks.any(rank == 1), ranks.any(False)),
        "on first": ranks.on_first(lambda: {"rank": rank}),
        "first fails": outcome(lambda: ranks.on_first(fail)),
        "second fails": outcome(lambda: ranks.together(lambda: fail() if rank else "fine")),
        "all well": ranks.together(lambda: rank),
        "members": len({pid for _, pid in ranks.members}),
    }


def together(rank, size, name):
    """Another technique beside sharding, as the contract runs it."""
    spec, case = SPECS[name], ZOO["qwen3_vl"]
    techniques = [spec.on(case.name), *["sharding"] * (size > 1)]
    step = contract.make_step(case, techniques, "32-true", clip=spec.clip)
    updates = numbers([step(share(step, case.batch(seed), rank, size)) for seed in range(UPDATES)])
    step.undo()
    return updates


TOGETHER = [
    name
    for name, spec in SPECS.items()
    if "qwen3_vl" in spec.models
    and name not in ("sharding", "precision", "batching")  # batching cuts by tokens: its own tests
    and not contract.conflict(spec, SPECS["sharding"])
]


def goes_back(rank, size):
    """On rank 1 the fourth update is not finite; both go back to the second."""
    model = Poisoned(ZOO["mlp"].build())
    guard = fl.Guard(on_fault="rollback", snapshot_every=2)
    step = fl.TrainStep(model, adamw, "32-true", loss=zoo.squares, techniques=["sharding"], guard=guard)
    outputs, weights = [], []
    for update in range(5):
        model.factor = float("nan") if update == 3 and rank == 1 else 1.0
        outputs.append(step(share(step, ZOO["mlp"].batch(update), rank, size)))
        weights.append(full_tensor(next(model.parameters()).detach()).clone())
    return {"back": [out.rolled_back_to for out in outputs], "updates": step.updates, "weights": weights}


def replicas(rank, size, on_fault, bad):
    """The caller's own DistributedDataParallel; on rank 1 one update has a bad loss, or bad statistics alone."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = nn.parallel.DistributedDataParallel(inner)
    guard = fl.Guard(on_fault=on_fault, snapshot_every=2)
    step = fl.TrainStep(model, adamw, "32-true", loss=lambda m, b: m(b).square().mean(), guard=guard)
    outputs = []
    for update in range(5):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * update + rank))
        outputs.append(step(batch * bad if update == 3 and rank == 1 else batch))
    return {
        "applied": [bool(out.applied) for out in outputs],
        "back": [out.rolled_back_to for out in outputs],
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "buffers": all(bool(buffer.isfinite().all()) for buffer in model.buffers()),
    }


OTHER = {
    "goes back": goes_back,
    "replicas nan": lambda r, n: replicas(r, n, "skip", float("nan")),
    "replicas statistics": lambda r, n: replicas(r, n, "skip", 1e25),
    "replicas go back": lambda r, n: replicas(r, n, "rollback", float("nan")),
    "a nan": lambda r, n: one_bad_rank(r, n, "32-true", float("nan")),
    "an overflow": lambda r, n: one_bad_rank(r, n, "16-mixed", 3e4),
    "uneven micro-batches": uneven_micro_batches,
    "other kinds": other_kinds,
    "selecting": selecting,
    "agreeing": agreeing,
}


def main(home):
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    results = {name: run(ranks.rank, ranks.size) for name, run in {**SAME, **NEAR, **OTHER}.items()}
    results |= {f"with {name}": together(ranks.rank, ranks.size, name) for name in TOGETHER}
    torch.save(results, Path(home) / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
