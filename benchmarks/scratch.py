"""What ops allocate inside: the planner's rule beside the real allocator, for every op of a list of small programs.

    OMP_NUM_THREADS=1 python benchmarks/scratch.py                 # all, rows where the two differ
    OMP_NUM_THREADS=2 python benchmarks/scratch.py --all           # every op that allocates more than its results
    OMP_NUM_THREADS=1 python benchmarks/scratch.py --only conv --scaled

Each program runs for real, forward and backward; each op that it calls is then run once alone, with torch's allocator
reporting (observe/scratch/measure.py), and given to the rules as fake tensors. `measured` and `rule` are bytes at the
op's peak beyond its results; `held` is what its results' storages take, where that is not what the tensors say.
`--scaled` pretends that no op is small enough to run, so that the rules for large ops are seen beside the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from common import print_table, report
from floatline.hardware import resolve
from floatline.observe.scratch import libraries, scratch_of
from floatline.observe.scratch.measure import measure
from floatline.observe.scratch.shared import plain_sizes

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAST = 4096
"""Differences below this many bytes are not shown."""


class Calls(TorchDispatchMode):
    """Collects the ops of a program with their arguments, each kind of call once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[Any, Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            kept = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            self.seen.setdefault(f"{func} {shown(args)} {shown(kwargs)}", (func, *kept))
        return func(*args, **kwargs)


def shown(tree: Any) -> str:
    """Return arguments as short text: dtype, shape, and strides where they are not the plain ones."""
    if isinstance(tree, Tensor):
        name = str(tree.dtype).removeprefix("torch.").replace("float", "f")
        return f"{name}{list(tree.shape)}" + ("" if tree.is_contiguous() else f"/{list(tree.stride())}")
    if isinstance(tree, (list, tuple)):
        return "(" + ", ".join(shown(item) for item in tree) + ")"
    if isinstance(tree, dict):
        return ", ".join(f"{key}={shown(value)}" for key, value in tree.items())
    return str(tree)


def rows_of(name: str, program: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Run a program forward and backward; yield a row for each op."""
    with Calls() as calls:
        outputs = [leaf for leaf in tree_leaves(program()) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(leaf) for leaf in outputs])
    rules = scratch_of(resolve("cpu"))
    for text, (func, args, kwargs) in calls.seen.items():
        row = row_of(rules, func, args, kwargs)
        if row is not None:
            yield {"program": name, **row, "op": text[:150]}


def row_of(rules: Any, func: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Measure one op and ask the rules about it; None where either cannot be done."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_args, fake_kwargs = tree_map(
            lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
            (args, kwargs),
        )
        try:
            out = func(*fake_args, **fake_kwargs)
        except Exception:  # no fake kernel, or values matter: a trace would say so
            return None
        need = rules(func, fake_args, fake_kwargs, out)
        sizes = need.storages or plain_sizes(out)
    truth = measure(func, args, kwargs)
    if truth is None:
        return None
    held = (0, 0) if func._schema.is_mutable else (sum(truth.storages), sum(sizes))
    return {"measured": truth.extra, "rule": need.extra, "held": held[0], "held by rule": held[1]}


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=dtype).requires_grad_()


def programs(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The programs: layers and losses as users write them."""
    made: dict[str, Callable[[], Any]] = {}
    for part in (convolutions, recurrent, norms, pooling, attention, products, indexing, reductions, losses, pointwise):
        made.update(part(lambda *shape: leaf(*shape, dtype=dtype), dtype))
    return made


def convolutions(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = make(8, 32, 28, 28)
    last = torch.channels_last
    return {
        "conv 3x3": lambda: F.conv2d(x, make(48, 32, 3, 3), make(48), padding=1),
        "conv 3x3 large": lambda: F.conv2d(make(32, 32, 28, 28), make(48, 32, 3, 3), make(48), padding=1),
        "conv stride 2": lambda: F.conv2d(x, make(48, 32, 3, 3), make(48), padding=1, stride=2),
        "conv 1x1": lambda: F.conv2d(x, make(48, 32, 1, 1)),
        "conv odd channels": lambda: F.conv2d(make(8, 20, 28, 28), make(36, 20, 3, 3), padding=1),
        "conv image": lambda: F.conv2d(make(8, 3, 56, 56), make(32, 3, 7, 7), padding=3, stride=2),
        "conv depthwise": lambda: F.conv2d(x, make(32, 1, 3, 3), padding=1, groups=32),
        "conv grouped": lambda: F.conv2d(x, make(64, 8, 3, 3), padding=1, groups=4),
        "conv channels last": lambda: F.conv2d(x.contiguous(memory_format=last), make(48, 32, 3, 3), padding=1),
        "conv dilated": lambda: F.conv2d(x, make(48, 32, 3, 3), padding=2, dilation=2),
        "conv patches": lambda: F.conv2d(make(4, 3, 64, 64), make(128, 3, 16, 16), stride=16),
        "conv 1d": lambda: F.conv1d(make(8, 32, 400), make(48, 32, 3), padding=1),
        "conv 1d causal depthwise": lambda: F.conv1d(make(8, 32, 400), make(32, 1, 4), padding=3, groups=32),
        "conv 3d": lambda: F.conv3d(make(4, 16, 8, 14, 14), make(32, 16, 3, 3, 3), padding=1),
        "conv transposed": lambda: F.conv_transpose2d(make(8, 32, 14, 14), make(32, 16, 2, 2), stride=2),
        "unfold": lambda: F.unfold(x, 3, padding=1),
    }


def recurrent(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = make(16, 50, 64)
    return {
        f"{kind.__name__} {layers}": lambda kind=kind, layers=layers: kind(64, 128, layers, batch_first=True).to(dtype)(
            x
        )[0]
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for layers in (1, 2)
    }


def norms(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x, rows = make(8, 32, 28, 28), make(64, 16, 256)
    stats = torch.zeros(32), torch.ones(32)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    return {
        "batch norm": lambda: F.batch_norm(x, *stats, leaf(32), leaf(32), True),
        "batch norm channels last": lambda: F.batch_norm(last, *stats, leaf(32), leaf(32), True),
        "batch norm eval": lambda: F.batch_norm(x, *stats, leaf(32), leaf(32), False),
        "batch norm 1d": lambda: F.batch_norm(make(1024, 256), None, None, leaf(256), leaf(256), True),
        "group norm": lambda: F.group_norm(x, 8, make(32), make(32)),
        "group norm channels last": lambda: F.group_norm(last, 8, make(32), make(32)),
        "instance norm": lambda: F.instance_norm(x),
        "layer norm": lambda: F.layer_norm(rows, (256,), make(256), make(256)),
        "layer norm fp32 weight": lambda: F.layer_norm(rows, (256,), leaf(256), leaf(256)),
        "rms norm": lambda: F.rms_norm(rows, (256,), make(256)),
        "weight norm": lambda: torch._weight_norm(make(128, 512), make(128, 1), 0),
    }


def pooling(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = make(8, 32, 28, 28)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    made = {
        "max pool": lambda: F.max_pool2d(x, 2),
        "average pool": lambda: F.avg_pool2d(x, 2),
        "adaptive pool 1": lambda: F.adaptive_avg_pool2d(x, 1),
        "adaptive pool 7": lambda: F.adaptive_avg_pool2d(x, 7),
        "reflect pad": lambda: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        "pixel shuffle": lambda: F.pixel_shuffle(x, 2),
        "roll": lambda: x.roll((1, 2), (2, 3)),
        "bicubic": lambda: F.interpolate(x, scale_factor=2, mode="bicubic"),
    }
    for mode in ("nearest", "bilinear"):
        made[f"{mode}"] = lambda mode=mode: F.interpolate(x, scale_factor=2, mode=mode)
        made[f"{mode} channels last"] = lambda mode=mode: F.interpolate(last, scale_factor=2, mode=mode)
    if dtype is torch.float32:
        made["grid sample"] = lambda: F.grid_sample(x, leaf(8, 28, 28, 2), align_corners=False)
        made["fft"] = lambda: torch.fft.rfft2(x)
    return made


def attention(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    attend = F.scaled_dot_product_attention
    q, few, long, short = make(2, 8, 256, 64), make(2, 2, 256, 64), make(1, 4, 1024, 64), make(4, 8, 64, 32)
    mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
    return {
        "attention": lambda: attend(q, q, q),
        "attention causal": lambda: attend(q, q, q, is_causal=True),
        "attention long": lambda: attend(long, long, long, is_causal=True),
        "attention short": lambda: attend(short, short, short, is_causal=True),
        "attention masked": lambda: attend(q, q, q, attn_mask=mask),
        "attention grouped": lambda: attend(q, few, few, is_causal=True, enable_gqa=True),
        "attention dropout": lambda: attend(q, q, q, dropout_p=0.1),
        "softmax": lambda: q.softmax(-1),
    }


def products(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    return {
        "linear": lambda: F.linear(make(256, 512), make(384, 512), make(384)),
        "linear wide": lambda: F.linear(make(1024, 512), make(2048, 512)),
        "batched": lambda: make(16, 64, 128) @ make(16, 128, 96),
        "batched large": lambda: make(64, 64, 128) @ make(64, 128, 96),
        "einsum": lambda: torch.einsum("bhid,bhjd->bhij", make(2, 8, 128, 64), make(2, 8, 128, 64)),
        "vector": lambda: make(256, 512) @ make(512),
        "bilinear layer": lambda: F.bilinear(make(64, 32), make(64, 48), make(16, 32, 48)),
    }


def indexing(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    ids, table = torch.arange(1024).reshape(16, 64) % 1000, make(1000, 64)
    scores = make(128, 1000)
    return {
        "embedding": lambda: F.embedding(ids, table),
        "index": lambda: table[ids],
        "gather": lambda: table.gather(0, ids),
        "scatter add": lambda: table.scatter_add(0, ids, make(16, 64)),
        "index add": lambda: table.index_add(0, ids.view(-1), make(1024, 64)),
        "index put": lambda: table.index_put((ids,), make(16, 64, 64), accumulate=True),
        "sort": lambda: scores.sort(-1)[0],
        "top-k": lambda: scores.topk(10)[0],
        "cumulative sum": lambda: scores.cumsum(-1),
        "cumulative product": lambda: scores.cumprod(-1),
    }


def reductions(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x, grid = make(128, 1000), make(8, 32, 28, 28)
    return {
        "mean": lambda: x.mean(-1),
        "mean of all": lambda: x.mean(),
        "mean of grid": lambda: grid.mean((2, 3)),
        "sum": lambda: x.sum(-1),
        "sum first": lambda: x.sum(0),
        "sum of channels": lambda: grid.sum((0, 2, 3)),
        "bias by broadcast": lambda: grid * make(32, 1, 1),
        "variance": lambda: torch.var_mean(x, -1),
        "norm": lambda: x.norm(dim=-1),
        "normalize": lambda: F.normalize(x, dim=-1),
        "maximum": lambda: x.amax(-1),
        "logsumexp": lambda: x.logsumexp(-1),
        "distances": lambda: torch.cdist(leaf(4, 100, 32), leaf(4, 120, 32)),
    }


def losses(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x, like = make(128, 1000), torch.rand(128, 1000, dtype=dtype)
    classes = torch.arange(128)
    return {
        "cross entropy": lambda: F.cross_entropy(x, classes),
        "cross entropy smooth": lambda: F.cross_entropy(x, classes, label_smoothing=0.1),
        "binary cross entropy logits": lambda: F.binary_cross_entropy_with_logits(x, like),
        "binary cross entropy": lambda: F.binary_cross_entropy(x.sigmoid(), like),
        "squares": lambda: F.mse_loss(x, like),
        "squares each": lambda: F.mse_loss(x, like, reduction="none"),
        "absolute": lambda: F.l1_loss(x, like),
        "smooth absolute": lambda: F.smooth_l1_loss(x, like),
        "huber": lambda: F.huber_loss(x, like),
        "divergence": lambda: F.kl_div(x, like, reduction="batchmean"),
    }


def pointwise(make: Any, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x = make(128, 1000)
    wide, whole, mask = torch.rand(128, 1000), torch.ones(128, 1000, dtype=torch.int64), torch.ones(128, 1000) > 0
    names = [
        "gelu",
        "silu",
        "relu",
        "elu",
        "mish",
        "hardswish",
        "leaky_relu",
        "softplus",
        "tanh",
        "sigmoid",
        "logsigmoid",
        "glu",
        "dropout",
    ]
    return {
        **{name: lambda name=name: getattr(F, name)(x) for name in names},
        "times fp32": lambda: x * wide,
        "times integers": lambda: x * whole,
        "times mask": lambda: x * mask,
        "masked fill": lambda: x.masked_fill(mask, 0.0),
        "where": lambda: torch.where(mask, x, wide.to(dtype)),
        "where mixed": lambda: torch.where(mask, x, wide),
        "less than": lambda: (x < wide, x * 1),
        "concatenate": lambda: torch.cat([x, x]),
        "in place fp32": lambda: (x * 1).add_(wide),
        "triangle": lambda: x.tril(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="programs whose name holds this")
    parser.add_argument("--all", action="store_true", help="rows where rule and truth agree too")
    parser.add_argument("--scaled", action="store_true", help="as if every op were too large to be run")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    if options.scaled:
        libraries.MOST_FLOPS, libraries.MOST_BYTES = 2 * 10**6, 0
    rows = []
    for format_name, dtype in FORMATS.items():
        for name, program in programs(dtype).items():
            if options.only in name:
                rows += rows_of(f"{name} {format_name}", program)
    far = [row for row in rows if differs(row)]
    shown_rows = [row for row in rows if row["measured"] >= LEAST] if options.all else far
    columns = ("program", "measured", "rule", "held", "held by rule", "op")
    print_table(columns, [[str(row[column]) for column in columns] for row in shown_rows])
    print(f"{len(rows)} calls, {len(far)} differ by {LEAST} bytes or more, {torch.get_num_threads()} threads")
    report(rows, ("floatline", "torch"), options.json, threads=torch.get_num_threads())


def differs(row: dict[str, Any]) -> bool:
    return max(abs(row["measured"] - row["rule"]), abs(row["held"] - row["held by rule"])) >= LEAST


if __name__ == "__main__":
    main()
