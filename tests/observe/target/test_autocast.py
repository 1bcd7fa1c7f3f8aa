"""CUDA's autocast lists on CPU tensors: each rule, the cache of casts, and nothing left behind."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from floatline.errors import PrecisionError
from floatline.observe.target import autocast, autocast_lists
from floatline.observe.target.autocast import cuda_autocast

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LISTED = (
    autocast_lists.LOWER
    | autocast_lists.FP32
    | autocast_lists.FP32_DTYPE
    | set(autocast_lists.APPENDED)
    | autocast_lists.PROMOTE
    | {autocast_lists.BANNED}
    | autocast_lists.CUDA_ONLY
)


def half(*shape, dtype=BF16):
    return torch.randn(*shape).to(dtype)


OPS = {
    "exp": (lambda: half(3).exp(), FP32),
    "rsqrt": (lambda: half(3).abs().rsqrt(), FP32),
    "pow": (lambda: half(3) ** 2, FP32),
    "scalar_pow": (lambda: 2 ** half(3), FP32),
    "layer_norm": (lambda: F.layer_norm(half(2, 4), (4,)), FP32),
    "rms_norm": (lambda: F.rms_norm(half(2, 4), (4,)), FP32),
    "group_norm": (lambda: F.group_norm(half(2, 4, 3), 2), FP32),
    "mse_loss": (lambda: F.mse_loss(half(3), half(3)), FP32),
    "cross_entropy": (lambda: F.cross_entropy(half(3, 4), torch.tensor([0, 1, 2])), FP32),
    "interpolate": (lambda: F.interpolate(half(1, 1, 4, 4), scale_factor=2, mode="bilinear"), FP32),
    "softmax": (lambda: half(2, 3).softmax(-1), FP32),
    "softmax_asked": (lambda: half(2, 3).softmax(-1, dtype=BF16), BF16),
    "softmax_fp64": (lambda: torch.randn(2, 3).double().softmax(-1), FP64),
    "log_softmax": (lambda: F.log_softmax(half(2, 3), -1), FP32),
    "sum": (lambda: half(3).sum(), FP32),
    "sum_dim": (lambda: half(3, 2).sum(1), FP32),
    "sum_ints": (lambda: torch.arange(3).sum(), torch.int64),
    "cumsum": (lambda: half(3).cumsum(0), FP32),
    "prod": (lambda: half(3).prod(), FP32),
    "vector_norm": (lambda: torch.linalg.vector_norm(half(3)), FP32),
    "norm": (lambda: torch.ops.aten.norm.Scalar(half(3)), FP32),
    "norm_dim": (lambda: torch.ops.aten.norm.ScalarOpt_dim(half(3, 2), 2, [1]), FP32),
    "norm_dim_kept": (lambda: torch.ops.aten.norm.ScalarOpt_dim(half(3, 2), 2, [1], True), FP32),
    "norm_fp64": (lambda: torch.ops.aten.norm.Scalar(torch.randn(3).double()), FP64),
    "linear": (lambda: F.linear(torch.randn(2, 3), torch.randn(4, 3)), BF16),
    "matmul": (lambda: torch.randn(2, 3) @ torch.randn(3, 2), BF16),
    "conv": (lambda: F.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)), BF16),
    "conv_same": (lambda: F.conv2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3), padding="same"), BF16),
    "einsum": (lambda: torch.einsum("ij,jk->ik", torch.randn(2, 3), torch.randn(3, 2)), BF16),
    "mv": (lambda: torch.mv(torch.randn(2, 3), torch.randn(3)), BF16),
    "addr": (lambda: torch.addr(torch.randn(2, 3), torch.randn(2), torch.randn(3)), BF16),
    "multi_dot": (lambda: torch.linalg.multi_dot([torch.randn(2, 2)] * 3), BF16),
    "gru_cell": (lambda: nn.GRUCell(3, 4)(torch.randn(2, 3)), BF16),
    "lstm_cell": (lambda: nn.LSTMCell(3, 4)(torch.randn(2, 3))[0], BF16),
    "fp64_matmul": (lambda: torch.randn(2, 2).double() @ torch.randn(2, 2).double(), FP64),
    "attention": (lambda: F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8)), BF16),
    "addcmul": (lambda: torch.addcmul(half(3), half(3), torch.randn(3)), FP32),
    "addcmul_halves": (lambda: torch.addcmul(half(3), half(3), half(3)), BF16),
    "scatter_add": (lambda: half(3).scatter_add(0, torch.tensor([0]), torch.randn(1)), FP32),
    "index_put": (lambda: half(3).index_put((torch.tensor([0]),), torch.randn(1)), FP32),
    "dot": (lambda: torch.dot(half(3), torch.randn(3)), FP32),
    "add": (lambda: half(3) + half(3), BF16),
    "mean": (lambda: half(3).mean(), BF16),
    "cat": (lambda: torch.cat([half(3), half(3)]), BF16),
    "pool": (lambda: F.avg_pool3d(half(1, 1, 2, 2, 2), 2), BF16),
    "max_pool": (lambda: F.adaptive_avg_pool3d(half(1, 1, 2, 2, 2), 1), BF16),
    "reflect": (lambda: F.pad(half(1, 1, 4), (1, 1), mode="reflect"), BF16),
    "trace": (lambda: half(2, 2).trace(), BF16),
}  # fmt: skip
NO_CPU_KERNEL = {"pool"}
"""What CUDA computes in half precision and a CPU cannot: fake tensors only."""
OF_THE_CPU = {"exp": BF16, "softmax": BF16, "layer_norm": BF16, "sum": BF16, "pool": FP32, "trace": FP32}


def dtypes():
    found = {}
    for name, (compute, _) in OPS.items():
        with torch.autocast("cpu", dtype=BF16):
            try:
                found[name] = compute().dtype
            except RuntimeError as error:  # the CPU's own lists cannot do all of these mixtures
                found[name] = str(error).splitlines()[0]
    return found


def test_the_lists_are_those_that_this_torch_registers_for_cuda():
    """A name that torch adds, drops or moves between lists must be looked at."""
    assert autocast.registered("AutocastCUDA") == LISTED
    lists = [
        autocast_lists.LOWER,
        autocast_lists.FP32,
        autocast_lists.FP32_DTYPE,
        set(autocast_lists.APPENDED),
        autocast_lists.PROMOTE,
    ]
    assert len(LISTED) == sum(map(len, lists)) + 1 + len(autocast_lists.CUDA_ONLY)


@pytest.mark.parametrize("name", sorted(OPS.keys() - NO_CPU_KERNEL))
def test_each_rule_on_real_tensors(name):
    compute, expected = OPS[name]
    with cuda_autocast(), torch.autocast("cpu", dtype=BF16):
        assert compute().dtype == expected


@pytest.mark.parametrize("name", OPS)
def test_each_rule_on_fake_tensors(name):
    compute, expected = OPS[name]
    with FakeTensorMode(), cuda_autocast(), torch.autocast("cpu", dtype=BF16):
        assert compute().dtype == expected


def test_the_cpu_casts_by_its_own_lists_before_and_after():
    before = dtypes()
    cudas = {name: expected for name, (_, expected) in OPS.items() if name not in NO_CPU_KERNEL}
    assert {name: before[name] for name in OF_THE_CPU} == OF_THE_CPU
    with cuda_autocast():
        assert {name: dtypes()[name] for name in cudas} == cudas
        with cuda_autocast():
            assert {name: dtypes()[name] for name in cudas} == cudas
        assert {name: dtypes()[name] for name in cudas} == cudas
    assert dtypes() == before
    with pytest.raises(ZeroDivisionError), cuda_autocast():
        _ = 1 / 0
    assert dtypes() == before


def test_contexts_may_end_in_any_order():
    outer, inner = cuda_autocast(), cuda_autocast()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    with torch.autocast("cpu", dtype=BF16):
        assert half(2).exp().dtype == FP32
    inner.__exit__(None, None, None)
    with torch.autocast("cpu", dtype=BF16):
        assert half(2).exp().dtype == BF16
    assert torch.clear_autocast_cache.__module__ != autocast.__name__


def test_fp16_regions_disabled_islands_and_no_region():
    x = torch.randn(2, 4)
    with cuda_autocast():
        assert half(2).exp().dtype == BF16
        with torch.autocast("cpu", dtype=FP16):
            assert torch.einsum("ij,kj->ik", x, x).dtype == FP16
            with torch.autocast("cpu", enabled=False):
                assert torch.einsum("ij,kj->ik", x, x).dtype == FP32
                assert half(2).exp().dtype == BF16
            assert half(2, dtype=FP16).exp().dtype == FP32


def test_backward_goes_through_the_casts():
    x, weight = torch.randn(3, 4, requires_grad=True), nn.Parameter(torch.randn(4, 4))
    with cuda_autocast(), torch.autocast("cpu", dtype=BF16):
        hidden = torch.einsum("ij,jk->ik", x, weight)
        F.layer_norm(hidden, (4,)).softmax(-1).pow(2).sum().backward()
    plain_x, plain = x.detach().requires_grad_(), weight.detach().requires_grad_()
    F.layer_norm(plain_x @ plain, (4,)).softmax(-1).pow(2).sum().backward()
    assert x.grad.dtype == weight.grad.dtype == FP32
    torch.testing.assert_close(weight.grad, plain.grad, rtol=0.1, atol=0.03)


def count_casts(use):
    """Return how often a region casts a tensor of the weight's shape down."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and tuple(out.shape) == (4, 4):
                Casts.count += 1
            return out

    with Casts():
        use()
    return Casts.count


@pytest.mark.parametrize("op", [F.linear, lambda x, w: torch.einsum("ij,jk->ik", x, w)], ids=["linear", "einsum"])
@pytest.mark.parametrize(
    ("trainable", "options", "casts"), [(True, {}, 2), (False, {}, 6), (True, {"cache_enabled": False}, 6)]
)
def test_only_trainable_weights_are_cached_and_only_within_the_outermost_region(op, trainable, options, casts):
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=trainable)

    def use():
        for _ in range(2):
            with torch.autocast("cpu", dtype=BF16, **options):
                op(torch.randn(2, 4), weight)
                op(torch.randn(2, 4), weight)
                with torch.autocast("cpu", dtype=BF16, **options):
                    op(torch.randn(2, 4), weight)

    with cuda_autocast():
        assert count_casts(use) == casts


def test_a_view_or_a_result_is_cast_at_each_use():
    weight = nn.Parameter(torch.randn(4, 4))

    def use():
        with torch.autocast("cpu", dtype=BF16):
            for tensor in (weight.t(), weight + 1):
                torch.einsum("ij,jk->ik", torch.randn(2, 4), tensor)
                torch.einsum("ij,jk->ik", torch.randn(2, 4), tensor)

    with cuda_autocast():
        assert count_casts(use) == 4


def test_a_first_use_without_grad_does_not_hide_the_weight():
    weight = nn.Parameter(torch.randn(4, 4))
    with cuda_autocast(), torch.autocast("cpu", dtype=BF16):
        with torch.no_grad():
            torch.einsum("ij,jk->ik", torch.randn(2, 4), weight)
        torch.einsum("ij,jk->ik", torch.randn(2, 4), weight).sum().backward()
    assert weight.grad is not None


def test_a_failed_region_leaves_no_cast_behind():
    weight = nn.Parameter(torch.ones(4, 4))
    with cuda_autocast():
        with pytest.raises(ZeroDivisionError), torch.autocast("cpu", dtype=BF16):
            torch.einsum("ij,jk->ik", torch.randn(2, 4), weight)
            _ = 1 / 0
        with torch.no_grad():
            weight.zero_()
        with torch.autocast("cpu", dtype=BF16):
            assert torch.einsum("ij,jk->ik", torch.ones(2, 4), weight).sum() == 0


def test_binary_cross_entropy_is_refused_as_on_cuda():
    p, y = torch.rand(3), torch.ones(3)
    with cuda_autocast():
        assert F.binary_cross_entropy(p, y).dtype == FP32
        with (
            torch.autocast("cpu", dtype=BF16),
            pytest.raises(PrecisionError, match=r"CUDA's autocast.*\nhint: use binary_cross_entropy_with_"),
        ):
            F.binary_cross_entropy(p, y)


def test_promotion_refuses_a_third_format_as_cuda_does():
    with (
        cuda_autocast(),
        torch.autocast("cpu", dtype=BF16),
        pytest.raises(PrecisionError, match=r"got torch.float16 in autocast to torch.bfloat16"),
    ):
        torch.addcmul(half(3, dtype=FP16), torch.randn(3), torch.randn(3))
