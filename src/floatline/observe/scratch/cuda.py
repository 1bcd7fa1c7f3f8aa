"""CUDA: what ATen's kernels allocate inside, as formulas read from their sources.

    flash attention, backward      dq is added up in fp32; with fewer heads of keys than of queries dk and dv are
                                   computed for each head of queries first
    efficient attention, backward  dq in fp32 tiles, and dk and dv too where they do not fit in registers
    embedding, backward            ids are sorted; partial sums in fp32, a row per different id and per ten ids
    index_put with accumulate      ids are sorted; this is the backward of indexing
    layer norm, backward           partial rows of dgamma and dbeta, when there are far more rows than columns
    foreach norms                  one number per chunk of 65536 elements
    convolution                    a bound: see `_convolution`

Products need cuBLAS's workspace, which lives as long as the process and is counted elsewhere. Pointwise ops, softmax,
cross entropy, dropout, fused optimizers and the gradient scaler's unscaling need nothing: they cast while they load.

Not covered: sorts, top-k and scans that are called by the model, reductions that are split over blocks (kilobytes),
cuDNN's recurrent layers, FFT plans, linear algebra.

Sources are files of PyTorch under aten/src/ATen/native.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from floatline.observe.scratch import NOTHING, Need
from floatline.observe.scratch.shared import HALVES, SHARED, Rule, argument, size_of, up
from floatline.techniques.placement import is_fake

aten = torch.ops.aten


class CudaScratch:
    """The scratch rules of NVIDIA GPUs."""

    def __call__(self, func: Any, args: Any, kwargs: Any, out: Any) -> Need:
        rule = RULES.get(func._overloadpacket)
        return NOTHING if rule is None else rule(args, kwargs, out)


def _flash_backward(args: Any, kwargs: Any, out: Any) -> Need:
    """transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`: rows round up to 128, the head to 32 (to 64 above 128)."""
    query, key = args[1], args[2]
    batch, heads, length, width = query.shape
    rows, columns = up(length, 128), up(width, 32 if width <= 128 else 64)
    extra = batch * heads * rows * (columns + 1) * 4  # dq_accum and softmax_d
    if key.shape[1] != heads:  # dk_expanded and dv_expanded
        extra += 2 * batch * heads * key.shape[2] * width * key.element_size()
    return Need(extra)


def _efficient_backward(args: Any, kwargs: Any, out: Any) -> Need:
    """transformers/cuda/attention_backward.cu and mem_eff_attention/kernel_backward.h, `workspace_size`.

    Tiles are 64 x 64, and 128 rows and columns for wider heads in 16 bits on GPUs with the shared memory for it (the
    larger tile is taken here). dk and dv stay in registers in 16 bits up to a head of 128; above, they need fp32
    accumulators per split of the keys, as do none in fp32, where the result is the accumulator.
    """
    query, key, value = args[1:4]
    batch, heads, length, width = query.shape
    keys, half = key.shape[2], query.dtype in HALVES
    tile = 128 if half and 64 < max(width, value.shape[3]) <= 128 else 64
    floats = up(length, tile) // tile * (up(width, tile) // tile) * (tile * tile + 4)  # a tile has 16 bytes of locks
    if half and max(width, value.shape[3]) > 128:
        splits = max(1, min(-(-keys // tile), 200 // (batch * heads)))
        floats += splits * tile * (up(width, tile) + up(value.shape[3], tile))
    delta = batch * heads * length * 4
    workspace = batch * heads * floats * 4 + delta
    product = 0 if half else 4 * batch * heads * length * value.shape[3] + delta  # gone before the workspace comes
    return Need(max(workspace, product))


def _embedding_backward(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """cuda/Embedding.cu, `embedding_dense_backward_cuda`; cuda/EmbeddingBackwardKernel.cu.

    Up to 3072 ids one kernel adds up directly. More are sorted: sorted ids, their order, a range, and cub's second copy
    of both. Then come partial sums: at most one per different id and one per ten ids, in fp32, beside six lists of
    indices and the table of gradients itself.
    """
    gradient, ids, count = args[0], args[1], args[2]
    number, width = ids.numel(), gradient.shape[-1]
    copied = 0 if gradient.is_contiguous() else size_of(gradient)
    if number <= 3072 and not argument(args, kwargs, 4, "scale_grad_by_freq", False):
        return Need(copied)
    index = ids.element_size()
    different = min(number, count)
    partial = number // 10 + different
    wide = 4 if gradient.dtype in HALVES else gradient.element_size()
    sorting = 5 * number * index
    adding = (3 * number + 2 * different + partial) * index + partial * width * wide
    return Need(copied + max(sorting - size_of(out), adding))  # the table of gradients comes after the sort


def _index_put(args: Any, kwargs: Any, out: torch.Tensor) -> Need:
    """cuda/Indexing.cu, `index_put_with_sort_kernel`: linear ids, sorted ids, their order, a range, cub's second copy
    of keys and values, all int64; and the values expanded where they are broadcast."""
    if not argument(args, kwargs, 3, "accumulate", False):
        return NOTHING
    found = _places(args[0], args[1])
    if found is None:
        return NOTHING
    number, slices = found
    whole = number * slices * args[2].element_size()
    return Need(6 * 8 * number + (0 if size_of(args[2]) == whole and args[2].is_contiguous() else whole))


def _places(tensor: torch.Tensor, indices: Any) -> tuple[int, int] | None:
    """Return how many places indices name, and the elements of each; a mask names those that are true."""
    shapes, counts, dimension, slices = [], [], 0, tensor.numel()
    for index in indices:
        if index is None:
            dimension += 1
            continue
        mask = index.dtype in (torch.bool, torch.uint8)
        for _ in range(index.dim() if mask else 1):
            slices //= max(1, tensor.shape[dimension])
            dimension += 1
        if mask:
            counts.append(index.numel() // 2 if is_fake(index) else _true_in(index))
        else:
            shapes.append(tuple(index.shape))
    if not shapes and not counts:
        return None
    return max([*counts, torch.broadcast_shapes(*shapes).numel() if shapes else 1]), slices


def _true_in(mask: torch.Tensor) -> int:
    with unset_fake_temporarily():
        return int(mask.count_nonzero())


def _layer_norm(args: Any, kwargs: Any, out: Any) -> Need:
    """cuda/layer_norm_kernel.cu: mean and inverse deviation are fp32 for 16-bit inputs, on a GPU always."""
    result, mean, deviation = out
    if args[0].dtype not in HALVES:
        return NOTHING
    return Need(0, (size_of(result), 4 * mean.numel(), 4 * deviation.numel()))


def _layer_norm_backward(args: Any, kwargs: Any, out: Any) -> Need:
    """cuda/layer_norm_kernel.cu, `LaunchGammaBetaBackwardCUDAKernel`: more than 65536 rows of few columns are added in
    blocks of 32 rows, a partial row each. Few: fewer blocks of 32 columns than half the multiprocessors (108 here)."""
    wanted, weight = args[-1], args[5]
    columns = weight.numel() if weight is not None else 0
    rows = args[1].numel() // max(1, columns)
    if not columns or rows <= 64 * 1024 or columns // 32 >= 54:
        return NOTHING
    blocks = min(32 * 1024 // -(-columns // 32), -(-rows // 32))
    return Need(sum(map(bool, wanted[1:])) * blocks * size_of(weight))


def _foreach_norm(args: Any, kwargs: Any, out: Any) -> Need:
    """cuda/ForeachReduceOp.cu: one partial per chunk of 65536 elements, as many for each tensor as the largest has."""
    tensors = args[0]
    chunks = max(-(-tensor.numel() // 65536) for tensor in tensors)
    return Need(len(tensors) * chunks * (8 if tensors[0].dtype is torch.float64 else 4))


def _convolution(args: Any, kwargs: Any, out: Any) -> Need:
    """A bound on cuDNN's workspace, not a formula of it: what its heuristics choose is not public.

    In 16 bits its tensor-core kernels work on channels-last data, so that contiguous operands and the result may each
    be copied once; operands that are channels-last already are used where they are.
    """
    operand, weight = args[0], args[1]
    if operand.dtype not in HALVES or not operand.is_contiguous():
        return NOTHING
    return Need(size_of(operand) + size_of(weight) + size_of(out))


def _convolution_backward(args: Any, kwargs: Any, out: Any) -> Need:
    """As `_convolution`: two kernels, one after the other, of which each sees three tensors."""
    gradient, operand, weight = args[:3]
    if operand.dtype not in HALVES or not operand.is_contiguous():
        return NOTHING
    return Need(size_of(gradient) + size_of(operand) + size_of(weight))


RULES: dict[Any, Rule] = {
    **SHARED,
    aten._scaled_dot_product_flash_attention_backward: _flash_backward,
    aten._scaled_dot_product_efficient_attention_backward: _efficient_backward,
    aten.embedding_dense_backward: _embedding_backward,
    aten.index_put: _index_put,
    aten.index_put_: _index_put,
    aten._index_put_impl_: _index_put,
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._foreach_norm: _foreach_norm,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
}
