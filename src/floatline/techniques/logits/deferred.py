"""Logits that are not computed yet: a tensor that stands for `head(hidden)` and remembers what is done to it.

`DeferredLogits` has the shape, dtype and device of the logits but no memory. Ops on it fall into three kinds:

    recorded      casts, and arithmetic with scalars (temperature, soft-capping by tanh, a bias over the vocabulary);
                  views, flattening and indexing of the leading dimensions (recipe.py)
    intercepted   `F.cross_entropy`, which goes through the rows in chunks (cross_entropy.py)
    all others    the logits are computed whole after all, once, and the op runs on them; gradients flow as ever

The tensor is the output of an autograd function, so that code which never asks `__torch_function__` (an autograd
function of somebody else, C++) still gets the right values and passes gradients on.

The head itself is called for each chunk, under the autocast state in which it was called. Whatever it is (tied, with
adapters, an fp32 island), its gradients are autograd's own. Autocast's weight cache is off in there: it would sum the
chunks' weight gradients in the low format, where the parameter's own gradient sums them in fp32.

Not covered: an op in place on logits of which a view was taken before (an error says so); a hook on the logits makes
them whole, except those of torch.distributed, which wait for any gradient and are put on the hidden states too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from floatline.errors import ConfigError
from floatline.techniques.logits.cross_entropy import chunked_cross_entropy
from floatline.techniques.logits.recipe import CASTS, SCALAR_MATHS, Ledger, Recipe, Rows, with_op, with_view

_ASKED = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "is_contiguous",
          "stride", "get_device", "element_size", "is_signed", "requires_grad_", "__len__", "__hash__"}  # fmt: skip
_PROPERTIES = ("shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "ndim", "is_cuda", "is_cpu", "is_meta",
               "is_sparse", "is_quantized", "is_nested", "grad_fn", "itemsize", "nbytes", "output_nr",
               "_base", "_version")  # fmt: skip
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ifloordiv__", "__imod__",
             "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}  # fmt: skip


class _Connect(torch.autograd.Function):
    """Makes deferred logits a node of the graph, for code that takes them without asking `__torch_function__`."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.recipe, ctx.given = recipe, inputs  # not as saved tensors, which might be offloaded: the graph holds them
        return DeferredLogits(recipe)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        wanted = [tensor for tensor in ctx.given if tensor.requires_grad]
        with torch.enable_grad():
            logits = ctx.recipe.whole()
        found = torch.autograd.grad(logits, wanted, gradient.to(logits.dtype), allow_unused=True)
        by_id = dict(zip(map(id, wanted), found, strict=True))
        return None, *(by_id.get(id(tensor)) for tensor in ctx.given)


class DeferredLogits(torch.Tensor):
    """Logits by recipe; see the module's text.

    Attributes:
        recipe: How to compute them.
        whole: They themselves, once something needed them.
        viewed: Whether they are a view of others, or others of them.
    """

    recipe: Recipe
    whole: torch.Tensor | None
    viewed: bool

    @staticmethod
    def __new__(cls, recipe: Recipe) -> DeferredLogits:
        made: DeferredLogits = torch.Tensor._make_wrapper_subclass(
            cls, recipe.shape, dtype=recipe.probe.dtype, device=recipe.hidden.device
        )
        made.recipe, made.whole, made.viewed = recipe, None, False
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # of a property, which its descriptor names
            name = getattr(func.__self__, "__name__", name)
        if name in _ASKED or func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DeferredLogits)]
        if len(found) == 1 and found[0].whole is None:
            answer = _lazily(found[0], func, name, args, kwargs)
            if answer is not None:
                return answer
        return _wholly(found, func, name, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Below autograd: the values; gradients come back through `_Connect`."""
        name = func.overloadpacket.__name__

        def value(leaf: Any) -> Any:
            return _made_whole(leaf, name).detach() if isinstance(leaf, DeferredLogits) else leaf

        return func(*tree_map(value, args), **tree_map(value, kwargs or {}))


def defer(head: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, ledger: Ledger) -> Any:
    """Return the deferred logits of `hidden`, or plain ones where nothing requires grad.

    Args:
        head: Whose parameters get gradients.
        call: The head's computation, (..., hidden) -> (..., vocabulary).
        hidden: (..., hidden).
        ledger: Chunk size and counters.
    """
    parameters = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
    if hidden.numel() == 0 or not (parameters or hidden.requires_grad):
        return call(hidden)
    state = _autocast_state(hidden.device.type)

    def head_as_called(rows: torch.Tensor) -> torch.Tensor:
        with state():
            return call(rows)

    probe = head_as_called(hidden.detach().reshape(-1, hidden.shape[-1])[:0]).detach()
    random = any(isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 for part in head.modules())
    return _connected(Recipe(head_as_called, parameters, hidden, probe, random, ledger))


def _autocast_state(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of the present autocast context, without its weight cache."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _connected(recipe: Recipe) -> DeferredLogits:
    made: DeferredLogits = _Connect.apply(recipe, recipe.hidden, *recipe.parameters)
    return made


def _lazily(logits: DeferredLogits, func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Record or intercept an op; None where it needs the logits."""
    if name == "register_hook" and getattr(args[1], "__module__", "").startswith("torch.distributed"):
        return _hook(logits, args[1])
    if name in CASTS or name in SCALAR_MATHS:
        given, named = tree_map(lambda leaf: Rows if leaf is logits else leaf, (args, kwargs))
        recipe = with_op(logits.recipe, func, name, given, named)
        return logits if recipe is logits.recipe else recipe and _connected(recipe)
    if not args or args[0] is not logits:
        return None
    if func is F.cross_entropy:
        return chunked_cross_entropy(logits.recipe, *args[1:], **kwargs)
    recipe = with_view(logits.recipe, name, args[1:], kwargs)
    return recipe and _view(logits, recipe)


def _view(logits: DeferredLogits, recipe: Recipe) -> DeferredLogits:
    view = _connected(recipe)
    logits.viewed = view.viewed = True
    return view


def _hook(logits: DeferredLogits, hook: Callable[[torch.Tensor], Any]) -> Any:
    """Put a hook that waits for any gradient on the hidden states, and on the logits in case they are made whole."""

    def wait(gradient: torch.Tensor) -> None:
        hook(gradient)

    if logits.recipe.hidden.requires_grad:
        logits.recipe.hidden.register_hook(wait)
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.register_hook(logits, hook)


def _made_whole(logits: DeferredLogits, name: str) -> torch.Tensor:
    if logits.whole is None:
        logits.recipe.ledger.whole(name, logits.recipe.shape)
        logits.recipe.ledger.count("whole")
        with torch.enable_grad():  # kept for ops that need the graph, even if this one does not
            logits.whole = logits.recipe.whole()
    return logits.whole


def _wholly(found: list[DeferredLogits], func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an op on logits that are computed whole."""
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    target = args[0] if in_place and args and isinstance(args[0], DeferredLogits) else None
    if target is not None and target.viewed:
        raise ConfigError(
            f"{name} changes logits in place of which a view was taken before, which chunked_loss cannot follow",
            hint="drop chunked_loss, or change the logits before they are viewed or sliced",
        )
    real = {id(logits): _made_whole(logits, name) for logits in found}
    args, kwargs = tree_map(lambda leaf: real.get(id(leaf), leaf), (args, kwargs))
    answer = func(*args, **kwargs)
    return target if target is not None and answer is target.whole else answer
