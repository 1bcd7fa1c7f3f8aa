"""A report's policy in other systems: FSDP2 runs it, torchao converts what its filter lets through."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import floatline as fl
from floatline.audit.report import AuditReport
from floatline.errors import ConfigError
from floatline.techniques.distributed.groups import join_ranks, leave_ranks


class Part(nn.Module):
    """Notes the format that it computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)
        self.seen: list[torch.dtype] = []

    def forward(self, x):
        self.seen.append(x.dtype)
        return self.inner(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = Part(), Part(), Part()

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def squared(model, batch):
    return model(*batch).square().mean()


@pytest.fixture(scope="module")
def plain() -> AuditReport:
    batch = (torch.randn(64, 32, generator=torch.Generator().manual_seed(1)),)
    return fl.audit(Net(), batch, squared, ("bf16",), mode="true", hardware="cpu", repeats=0, probes=0, fp8=True)


def with_policy(report: AuditReport, policy: str, islands: tuple[str, ...]) -> AuditReport:
    changed = replace(report.candidates["bf16"], policy=policy, islands=islands)
    return replace(report, policy=policy, candidates={"bf16": changed})


@pytest.fixture
def ranks():
    join_ranks("cpu")
    yield
    leave_ranks()


def test_the_root_comes_last_and_islands_are_fp32(plain) -> None:
    report = with_policy(plain, "bf16-true; middle=32; middle.inner=bf16", ("middle",))
    units = report.fsdp_policy()
    low, high = torch.bfloat16, torch.float32
    assert list(units) == ["middle.inner", "middle", ""]
    assert units["middle"] == MixedPrecisionPolicy(high, high, low, True)
    assert units["middle.inner"] == MixedPrecisionPolicy(low, high, high, True)
    assert units[""] == MixedPrecisionPolicy(low, high, high, True)


def test_fsdp_runs_it(plain, ranks) -> None:
    report = with_policy(plain, "bf16-true; middle=32", ("middle",))
    model = Net()
    for name, mixed in report.fsdp_policy().items():
        fully_shard(model.get_submodule(name), mp_policy=mixed)
    output = model(torch.randn(4, 32))
    output.square().mean().backward()
    assert [part.seen for part in (model.first, model.middle, model.last)] == [
        [torch.bfloat16], [torch.float32], [torch.bfloat16]
    ]  # fmt: skip
    assert output.dtype is torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_fsdp_rounds_as_the_policy_does(plain, ranks) -> None:
    """The same policy by FSDP and by Floatline's own islands: one forward, bit for bit."""
    from floatline.precision import Policy
    from floatline.precision.apply import apply_precision

    report = with_policy(plain, "bf16-true; middle=32", ("middle",))
    ours, theirs, x = Net(), Net(), torch.randn(4, 32)
    applied = apply_precision(ours, Policy.parse(report.policy))
    with applied.autocast():
        expected = ours(x)
    for name, mixed in report.fsdp_policy().items():
        fully_shard(theirs.get_submodule(name), mp_policy=mixed)
    assert torch.equal(theirs(x), expected.float())


def test_fp32_needs_no_policy(plain) -> None:
    assert replace(plain, policy="32-true").fsdp_policy() == {"": MixedPrecisionPolicy()}


def test_torchao_converts_what_the_filter_lets_through(plain) -> None:
    from torchao.float8 import convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            sizes = ((32, 4112), (4112, 1040), (1040, 16))
            self.layers = nn.ModuleList(nn.Linear(*size) for size in sizes)

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    batch = (torch.randn(16, 32, generator=torch.Generator().manual_seed(1)),)
    report = fl.audit(Large(), batch, squared, ("bf16",), hardware="cpu", repeats=0, probes=0, fp8=True)
    chosen = report.float8_filter()
    model = convert_to_float8_training(Large(), module_filter_fn=chosen)
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert converted == {"layers.1"}  # the others are first and last
    assert not chosen(nn.ReLU(), "layers.1")


def test_the_filter_needs_an_audit_of_fp8(plain) -> None:
    with pytest.raises(ConfigError, match="has not looked at fp8") as caught:
        replace(plain, fp8=()).float8_filter()
    assert "fp8=True" in caught.value.hint
    with pytest.raises(ConfigError, match="scales by 'block'"):
        plain.float8_filter("block")
