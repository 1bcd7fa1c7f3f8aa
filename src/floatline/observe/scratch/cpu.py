"""CPU: ATen's own kernels as formulas; everything else is run once, small (libraries.py).

The rules that weigh most in training:

    operands of two dtypes      TensorIterator copies each operand that is not in the common dtype
    means and sums in 16 bits   the operand is copied to fp32 first, where its dimensions do not allow a cascade
    batch norm, backward        the gradient of the input is written to a temporary of the input's size
    gather, scatter in 16 bits  an fp32 copy of what is indexed

Buffers per thread count `torch.get_num_threads()` of this process: plan with the number that you will train with.

Sources are files of PyTorch under aten/src/ATen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from floatline.observe.real import tensors_in
from floatline.observe.scratch import NOTHING, Need
from floatline.observe.scratch.libraries import Libraries
from floatline.observe.scratch.shared import HALVES, SHARED, Rule, argument, size_of

aten = torch.ops.aten
_FREE_NAMES = (
    "_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_local_scalar_dense", "_log_softmax",
    "_log_softmax_backward_data", "_reshape_alias", "_softmax", "_softmax_backward_data", "_to_copy", "_unsafe_view",
    "alias", "arange", "as_strided", "cat", "clone", "constant_pad_nd", "copy_", "detach", "embedding",
    "embedding_dense_backward", "empty", "empty_like", "empty_strided", "expand", "fill", "fill_", "full",
    "full_like", "index_select", "lift_fresh", "linspace", "new_empty", "new_empty_strided", "new_full", "new_ones",
    "new_zeros", "nll_loss_backward", "nll_loss_forward", "normal_", "ones", "ones_like", "permute", "rand",
    "rand_like", "randint", "randn", "randn_like", "random_", "reshape", "resize_", "scalar_tensor",
    "select_backward", "set_", "slice_backward", "split_with_sizes", "stack", "t", "transpose", "tril", "triu",
    "unbind", "uniform_", "unsafe_split", "unsqueeze", "view", "zero_", "zeros", "zeros_like",
)  # fmt: skip
_FREE = {getattr(aten, name) for name in _FREE_NAMES}
"""Ops whose kernels allocate their results and nothing else."""
_UNCAST = {aten.masked_fill, aten.masked_fill_, aten.clone, aten.fill, aten.fill_, aten.copysign}


class CpuScratch:
    """The scratch rules of the processor that this process runs on."""

    def __init__(self) -> None:
        self.libraries = Libraries()

    def __call__(self, func: Any, args: Any, kwargs: Any, out: Any) -> Need:
        packet = func._overloadpacket
        if packet in _FREE or func._schema.name.startswith(("aten::_foreach", "prim")):
            return NOTHING
        if not any(isinstance(tensor, FakeTensor) for tensor in (*tensors_in(args), *tensors_in(out))):
            return NOTHING  # it ran for real, and was small
        rule = RULES.get(packet)
        if rule is not None:
            return rule(args, kwargs, out)
        if torch.Tag.pointwise in func.tags:
            return _casts(packet, args, out)
        return self.libraries(func, args, kwargs, out)


def _casts(packet: Any, args: Any, out: Any) -> Need:
    """TensorIterator.cpp, `compute_types`: operands and results of another than the common dtype are copied.

    The result that is written in place is one of the operands, and gets a temporary when it is narrower.
    """
    operands = [tensor for tensor in args if isinstance(tensor, torch.Tensor) and tensor.dim()]
    if packet is aten.where:
        operands = [tensor for tensor in operands[1:] if tensor.dim()]  # the condition stays as it is
    if packet in _UNCAST or len({tensor.dtype for tensor in operands}) < 2:
        return NOTHING
    common = operands[0].dtype
    for tensor in operands[1:]:
        common = torch.promote_types(common, tensor.dtype)
    copies = [tensor.numel() for tensor in operands if tensor.dtype != common]
    first = next(tensors_in(out), None)
    if first is not None and first.dtype not in (common, torch.bool):
        copies.append(first.numel())
    return Need(sum(copies) * common.itemsize)


def _layer_norm(args: Any, kwargs: Any, out: Any) -> Need:
    """layer_norm.cpp: with weights of a wider dtype, mean and inverse deviation are kept in it."""
    weight = next((tensor for tensor in args[2:4] if tensor is not None), None)
    if weight is None or weight.dtype == args[0].dtype:
        return NOTHING
    result, mean, _ = out
    return Need(0, (size_of(result), *(2 * (mean.numel() * weight.element_size(),))))


def _batch_norm_backward(args: Any, kwargs: Any, out: Any) -> Need:
    """Normalization.cpp, `batch_norm_backward_cpu`: the input's gradient goes through one temporary of its size."""
    return Need(size_of(args[1]) if args[-1][0] else 0)


def _batch_norm(args: Any, kwargs: Any, out: Any) -> Need:
    """Normalization.cpp, `batch_norm_cpu`: channel sums by thread, and the scale and shift of each channel."""
    channels, threads = args[0].shape[1], torch.get_num_threads()
    partial = 0 if args[0].is_contiguous() and args[0].dim() > 2 else threads
    return Need((2 + partial) * channels * 4 if args[5] else 2 * channels * 4)


def _layer_norm_backward(args: Any, kwargs: Any, out: Any) -> Need:
    """layer_norm_kernel.cpp: one row of dgamma and one of dbeta for each thread, in their dtype."""
    rows = sum(1 for wanted in args[-1][1:] if wanted)
    width = next((tensor for tensor in args[5:7] if tensor is not None), None)
    return NOTHING if width is None else Need(rows * torch.get_num_threads() * size_of(width))


def _with_mean(rule: Rule) -> Rule:
    """A loss that ends in a mean: `_mean` of its elements comes on top."""

    def both(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
        extra, storages = rule(args, kwargs, out)
        averages = argument(args, kwargs, _REDUCTION.get(rule, 2), "reduction", 1) == 1 and args[0].dtype in HALVES
        return Need(extra + (4 * max(args[0].numel(), args[1].numel()) + 4 if averages else 0), storages)

    return both


def _binary_cross_entropy(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """Loss.cpp, `binary_cross_entropy_cpu`: the mean is written where the losses were, whose storage it keeps."""
    reduction = argument(args, kwargs, 3, "reduction", 1)
    if reduction == 0:
        return NOTHING
    averages = reduction == 1 and args[0].dtype in HALVES
    return Need(4 * args[0].numel() if averages else 0, (size_of(args[0]),))


def _mean(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """ReduceOps.cpp, `mean`: sums of 16-bit floats are taken in fp32, from an fp32 copy."""
    operand = args[0]
    return Need(4 * operand.numel() + 4 * out.numel() if operand.dtype in HALVES else 0)


def _sum(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """ReduceOps.cpp, `sum`: integers are added as int64, from a copy; 16-bit floats from an fp32 copy where the reduced
    dimensions lie on both sides of a kept one."""
    operand = args[0]
    if not operand.is_floating_point():
        return Need(0 if operand.dtype == out.dtype else operand.numel() * out.element_size())
    dims = argument(args, kwargs, 1, "dim")
    if operand.dtype not in HALVES or not dims or out.dtype != operand.dtype:
        return NOTHING
    reduced = [dim % operand.dim() for dim in dims if operand.shape[dim] > 1]
    kept = [dim for dim in range(operand.dim()) if dim not in reduced and operand.shape[dim] > 1]
    split = kept and reduced and min(reduced) < max(kept) and max(reduced) > min(kept)
    return Need(4 * operand.numel() + 4 * out.numel() if split else 0)


def _gather(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """ScatterGatherKernel.cpp: 16-bit floats pass through an fp32 buffer of the result's shape."""
    return Need(4 * out.numel() if out.dtype in HALVES else 0)


def _running(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """ReduceOps.cpp, `cumsum`: the operand is copied to the dtype of the result."""
    return Need(0 if args[0].dtype == out.dtype else size_of(out))


def _upsample(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """UpSampleKernel.cpp: what is contiguous may be worked on as channels last, input and output."""
    return NOTHING if not args[0].is_contiguous() else _upsampled(args[0], out)


def _upsampled(operand: torch.Tensor, out: torch.Tensor) -> Need:
    return Need(size_of(operand) + size_of(out)) if operand.shape[1] > 3 and operand.dim() == 4 else NOTHING


_REDUCTION = {SHARED[aten.binary_cross_entropy_with_logits]: 4}
_LOSSES = (aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss, aten.binary_cross_entropy_with_logits)
RULES: dict[Any, Rule] = {
    **SHARED,
    **{loss: _with_mean(SHARED[loss]) for loss in _LOSSES},
    aten.native_layer_norm: _layer_norm,
    aten.native_batch_norm: _batch_norm,
    aten.native_batch_norm_backward: _batch_norm_backward,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten.binary_cross_entropy: _binary_cross_entropy,
    aten.mean: _mean,
    aten.cumsum: _running,
    aten.cumprod: _running,
    aten.sum: _sum,
    aten.gather: _gather,
    aten.scatter: _gather,
    aten.scatter_add: _gather,
    aten.scatter_reduce: _gather,
    aten.upsample_nearest2d: _upsample,
    aten.upsample_bilinear2d: _upsample,
}
