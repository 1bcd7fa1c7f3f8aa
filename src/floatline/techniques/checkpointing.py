"""Activation checkpointing: forget a layer's activations in the forward, compute them again in the backward.

Of each chosen layer only the inputs are kept. The price is one more forward of those layers, at most a third of the
step's FLOPs. What is recomputed is bit for bit what was forgotten: random state is restored, autocast too, and so
are buffers that the forward changes (running averages, power iterations): the recomputation starts from their old
values and leaves the new ones alone.

    checkpointing                     every repeated layer of the model
    checkpointing(every=2)            each second layer of each list
    checkpointing(layers=["model.visual.blocks.*"])
    checkpointing(keep=["matmul"])    op-selective: outputs of matrix products stay, the cheap rest is recomputed
    checkpointing(budget=0.5)         compiled models: torch's partitioner keeps about this share of the activations

A layer that changes its inputs in place would be recomputed from the changed values; that is an error at its first
forward. A key-value cache handed to a layer in training is left out, for the recomputation would append to it twice;
where the cache lays keys out anew (T5) the plain step without cache is what the numbers equal to the bit. With `keep`
under autocast a weight that several layers share is cast in each, so its gradient is summed in fp32: equal to rounding.

Not covered: reentrant checkpointing (it needs inputs that require gradients and breaks with frozen embeddings); lists
of plain ops such as a Sequential of Linear and ReLU, where you name the modules yourself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from floatline.errors import ConfigError
from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict
from floatline.patch import ForwardPatch
from floatline.techniques.base import Applied, Stage, Technique
from floatline.techniques.checkpointing_buffers import ChangedBuffers, Written, version_of
from floatline.techniques.freezing import requires_grad
from floatline.techniques.layers import chosen_layers, outermost
from floatline.techniques.placement import holds_fakes

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm")
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math_for_mps",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
KEPT_OPS = {"matmul": _MATMULS, "attention": _ATTENTIONS}
"""What `keep` names -> the aten ops whose outputs are not recomputed."""

ContextFunction = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


@dataclass(frozen=True, kw_only=True)
class Checkpointing(Technique):
    """Recompute activations in the backward.

    Args:
        layers: Patterns of modules to recompute; empty takes the model's repeated layers.
        every: Of each list of layers the first and then each n-th; 1 takes all.
        keep: Kinds of ops whose outputs are kept: "matmul" (and convolutions), "attention" (fused kernels).
        budget: For compiled models: share of activations to keep, 0 to 1 (torch's `activation_memory_budget`; its
            peak is not monotonic, pytorch#197838). Nothing else is wrapped then.

    Raises:
        ConfigError: A setting out of range, or a budget together with `layers`, `every` or `keep`.
    """

    name = "checkpointing"
    stage = Stage.RECOMPUTE
    exact = True

    layers: tuple[str, ...] = ()
    every: int = 1
    keep: tuple[Literal["matmul", "attention"], ...] = ()
    budget: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("every", 1)
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise self.bad("budget", "give a share from 0 (recompute all) to 1 (keep all)")
        if self.budget is not None and (self.layers or self.keep or self.every != 1):
            raise self.bad("budget", "the compiler chooses what to keep then: drop layers, every and keep")

    def needs(self) -> dict[str, str]:
        return {} if self.budget is None else {"compile": "the budget is kept by the compiler's partitioner"}

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        on = next((n for n, m in model.named_modules() if getattr(m, "gradient_checkpointing", False) is True), None)
        if on is not None:
            where = on or type(model).__name__
            return Verdict(
                False, f"transformers' own is on in {where}; call model.gradient_checkpointing_disable() first"
            )
        return Verdict(True, "recomputation runs everywhere")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        if self.budget is not None:
            notes = (
                ("not traced: fake tensors are not compiled, so nothing is recomputed",) if holds_fakes(model) else ()
            )
            return Applied(technique=self, touched=("",), notes=notes, during=partial(_memory_budget, self.budget))
        chosen = outermost(chosen_layers(model, self.layers, setting="checkpointing.layers"))
        layers = _every_nth(chosen, self.every)
        contexts = _context_function(self.keep)
        patches = [ForwardPatch(layer).install(_checkpointed(name, contexts)) for name, layer in layers.items()]

        def undo() -> None:
            for patch in reversed(patches):
                patch.undo()

        notes = () if layers else (f"no layers repeat in {type(model).__name__}: name modules in checkpointing.layers",)
        return Applied(technique=self, touched=tuple(layers), undo=undo, notes=notes)


@contextmanager
def _memory_budget(budget: float) -> Iterator[None]:
    """Compilation happens in the first forward, so that is where the partitioner must find the budget."""
    import torch._functorch.config as config

    with config.patch(activation_memory_budget=budget):
        yield


def _every_nth(layers: dict[str, nn.Module], every: int) -> dict[str, nn.Module]:
    """Take the first and then each n-th of the layers that share a parent: each tower counts for itself."""
    counts: dict[str, int] = defaultdict(int)
    kept = {}
    for name, layer in layers.items():
        parent = name.rpartition(".")[0]
        if counts[parent] % every == 0:
            kept[name] = layer
        counts[parent] += 1
    return kept


def _context_function(keep: tuple[str, ...]) -> ContextFunction | None:
    """Return what makes the contexts of forward and recomputation, None where every op is recomputed."""
    packets = [getattr(torch.ops.aten, op) for kind in keep for op in KEPT_OPS[kind] if hasattr(torch.ops.aten, op)]
    ops = [packet.default for packet in packets if "default" in packet.overloads()]
    return partial(create_selective_checkpoint_contexts, ops) if ops else None


def _checkpointed(name: str, selective: ContextFunction | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the wrapper that recomputes a module's forward."""
    written = Written()

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(self, *args, **kwargs)
            if torch.compiler.is_compiling():  # the compiler sees mutations itself and recomputes pure ops only
                more: dict[str, Any] = {"context_fn": selective} if selective else {}
                body = _Uncompiled(name, forward, self, written)
                return checkpoint(body, *args, use_reentrant=False, **more, **kwargs)
            if self.training:
                args, kwargs = _without_cache((args, kwargs))
            return _recomputed(name, forward, self, args, kwargs, selective, written)

        return checkpointed_forward

    return wrap


class _Uncompiled:
    """A forward that the compiler may put into a graph with its recomputation, or leave to Python both times.

    It does the latter where the forward has effects besides its result, such as buffers that it assigns.
    """

    def __init__(self, name: str, forward: Callable[..., Any], module: nn.Module, written: Written) -> None:
        self.name, self.forward, self.module, self.written = name, forward, module, written
        self.buffers: ChangedBuffers | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.forward(self.module, *args, **kwargs)
        if self.buffers is not None:
            with self.buffers.as_before(nullcontext()):
                return self.forward(self.module, *args, **kwargs)
        # op-selective checkpointing counts ops, and these copies are none of the forward's
        self.buffers = ChangedBuffers(self.name, self.module, self.written, copying=_disable_current_modes)
        output = self.forward(self.module, *args, **kwargs)
        self.buffers.note_changes()
        return output


def _recomputed(
    name: str,
    forward: Callable[..., Any],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    selective: ContextFunction | None,
    written: Written,
) -> Any:
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not requires_grad((args, kwargs)) and not any(p.requires_grad for p in module.parameters()):
        return forward(module, *args, **kwargs)  # no graph, nothing is saved anyway
    before = [version_of(tensor) for tensor in inputs]
    buffers = ChangedBuffers(name, module, written)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        first, again = selective() if selective else (nullcontext(), nullcontext())
        return first, buffers.as_before(again)

    if selective:  # autocast's cache holds weights that an earlier layer cast, and is empty in the recomputation
        torch.clear_autocast_cache()
    output = checkpoint(partial(forward, module), *args, use_reentrant=False, context_fn=contexts, **kwargs)
    buffers.note_changes()
    changed = next((t for t, version in zip(inputs, before, strict=True) if version_of(t) != version), None)
    if changed is not None:
        raise ConfigError(
            f"checkpointing {name}: its forward changes an input of shape {tuple(changed.shape)} in place, and would "
            "be recomputed from the changed values",
            hint=f"make {type(module).__name__} work on a copy (inplace=False), or leave it out with "
            "checkpointing.layers",
        )
    return output


def _without_cache(tree: Any) -> Any:
    """Replace key-value caches by None and switch `use_cache` off."""
    if _holds_cache(tree):  # asked first, for mapping a tree takes as long as all else that a layer's call costs here
        tree = tree_map(
            lambda leaf: None if _is_cache(leaf) else leaf, tree, is_leaf=lambda leaf: _is_cache(leaf) or leaf is None
        )
    args, kwargs = tree
    return args, {key: False if key == "use_cache" else value for key, value in kwargs.items()}


def _holds_cache(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_cache, value))
    return any(map(_holds_cache, value.values())) if isinstance(value, dict) else _is_cache(value)


def _is_cache(value: Any) -> bool:
    return _is_cache_kind(type(value))  # type: ignore[arg-type]  # a class is hashable


@cache
def _is_cache_kind(kind: type) -> bool:
    """Say whether a class is transformers' cache or one of its kin, without importing transformers."""
    return any(base.__name__ == "Cache" and base.__module__.startswith("transformers") for base in kind.__mro__)
