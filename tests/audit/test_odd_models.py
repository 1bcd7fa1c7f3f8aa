"""Models and batches from outside: each is audited, or refused with what to do, and the user's own are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.audit.report import AuditReport
from floatline.audit.tolerance import Tolerance
from floatline.errors import ConfigError, ModelError


def audited(model: nn.Module, batch: Any, loss: Any = None, **settings: Any) -> AuditReport:
    given: dict[str, Any] = {"candidates": ("bf16",), "hardware": "a100-40gb", "repeats": 0, "probes": 0, **settings}
    return fl.audit(model, batch, loss, **given)


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.add_(1.0))  # type: ignore[no-any-return]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16, sparse=True), nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids).mean(1))  # type: ignore[no-any-return]


@dataclass
class Answer:
    count: int
    scores: torch.Tensor


class Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(3, self.linear(x))


def test_a_batch_that_the_forward_writes_into_stays_as_it_is() -> None:
    batch = torch.randn(8, 16)
    before, version = batch.clone(), batch._version
    report = audited(Writes(), batch)
    assert torch.equal(batch, before) and batch._version == version
    assert report.policy == "bf16-mixed"
    assert not any("differ" in note for note in report.notes)


@pytest.mark.parametrize(
    ("model", "batch"),
    [(Bag, torch.randint(0, 20, (8, 5))), (Answers, torch.randn(8, 16))],
    ids=["sparse gradients", "a dataclass"],
)
def test_it_is_audited(model: Callable[[], nn.Module], batch: torch.Tensor) -> None:
    assert audited(model(), batch).policy == "bf16-mixed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_batch_in_the_format_of_the_weights(dtype: torch.dtype) -> None:
    assert audited(nn.Linear(16, 4).to(dtype), torch.randn(8, 16, dtype=dtype)).policy == "bf16-mixed"


def test_a_compiled_model_runs_eager() -> None:
    def refuse(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    assert audited(torch.compile(nn.Linear(16, 4), backend=refuse), torch.randn(8, 16)).policy == "bf16-mixed"  # type: ignore[arg-type]
    inner = nn.Sequential(nn.Linear(16, 16), torch.compile(nn.Linear(16, 4), backend=refuse))  # type: ignore[arg-type]
    assert audited(inner, torch.randn(8, 16)).policy == "bf16-mixed"


def test_a_recurrent_layer_has_an_exact_step() -> None:
    """oneDNN's layer has no fp64 kernel: its own result stood for the exact one, and bf16 was off by 0."""
    report = audited(nn.LSTM(16, 8, batch_first=True), torch.randn(4, 6, 16))
    assert report.candidates["bf16"].all_lowered.gradient_error > 1e-4


class Selects(Answers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        scores = self.linear(x)
        return scores[scores > 1e-3]


def test_an_output_of_another_shape_is_as_wrong_as_can_be() -> None:
    torch.manual_seed(0)
    report = audited(Selects(), torch.randn(512, 16))
    assert report.candidates["bf16"].all_lowered.loss_error == math.inf
    assert report.policy != "bf16-mixed"


def test_weights_of_the_loss_get_no_gradient() -> None:
    head = nn.Linear(4, 1)
    head.weight.grad = torch.ones(1, 4)
    assert audited(nn.Linear(16, 4), torch.randn(8, 16), lambda model, x: head(model(x)).mean()).policy == "bf16-mixed"
    assert torch.equal(head.weight.grad, torch.ones(1, 4)) and head.bias.grad is None


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (lambda y: y.to_sparse(), "sparse tensor of float32"),
        (lambda y: torch.nested.as_nested_tensor([y, y[:2]]), "nested tensor of float32"),
        (lambda y: {"loss": y.argmax()}, "tensor of int64"),
        (lambda y: torch.fft.fft(y), "tensor of complex64"),
    ],
)
def test_outputs_that_have_no_error(output: Callable[[torch.Tensor], Any], kind: str) -> None:
    class Gives(Answers):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return output(self.linear(x))

    with pytest.raises(ModelError, match=f"returned no floating tensor.*{kind}"):
        audited(Gives(), torch.randn(8, 16))


def test_an_empty_batch_is_no_proof() -> None:
    with pytest.raises(ModelError, match="its output is empty\nhint: give a batch with samples"):
        audited(nn.Linear(16, 4), torch.randn(0, 16))


def test_a_batch_without_values() -> None:
    with pytest.raises(ModelError, match="the batch is on the meta device\nhint: give it values"):
        audited(nn.Linear(16, 4), torch.randn(8, 16, device="meta"))


class Cancels(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1e4) - 1e4


@pytest.mark.parametrize("name", ["größe", "a b", "x*", "a=32", "a;b", "c\nd", "32", "--"])
def test_names_that_no_rule_can_hold_as_they_are(name: str) -> None:
    layers = nn.ModuleDict({"first": nn.Linear(16, 16), name: Cancels(), "last": nn.Linear(16, 4)})
    model = nn.Sequential(*layers.values())
    model._modules = dict(layers._modules)
    report = audited(model, torch.randn(8, 16), probes=None)
    assert report.candidates["bf16"].islands == (name,)
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision=report.policy,
                        loss=lambda model, batch: model(batch).square().mean())  # fmt: skip
    step(torch.randn(8, 16))
    assert list(report.fsdp_policy()) == [name, ""]


def test_fp8_keeps_islands_and_leaves_nothing_behind() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cancel, self.last = nn.Linear(16, 16), Cancels(), nn.Linear(16, 4)
            self.seen: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.append(self.first(x))
            return self.last(self.cancel(sum(self.seen)) * (1 + torch.rand(())))  # type: ignore[no-any-return]

    head = nn.Linear(4, 1)
    model, batch = Draws(), torch.randn(8, 16)
    before = torch.get_rng_state()
    with torch.no_grad():
        report = audited(model, batch, lambda model, x: head(model(x)).mean(), fp8=True)
    assert report.fp8_policy == "fp8-mixed; cancel=32" and len(report.fp8) == 2
    assert not model.seen and head.weight.grad is None
    assert torch.equal(before, torch.get_rng_state())


def test_torchscript_is_refused() -> None:
    script = torch.jit.script(nn.Linear(16, 4))
    with pytest.raises(ModelError, match=r"holds TorchScript.*\nhint: audit the Python module"):
        audited(nn.Sequential(script), torch.randn(8, 16))


def test_models_without_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="lazy parameters without a shape\nhint: run it on a batch once"):
        audited(nn.LazyLinear(4), torch.randn(8, 16))
    with pytest.raises(ModelError, match="Linear is on the meta device"):
        audited(nn.Linear(16, 4, device="meta"), torch.randn(8, 16))


def test_a_loss_that_runs_another_model_is_refused_before_it_leaves_gradients() -> None:
    model = nn.Linear(16, 4)
    with pytest.raises(ModelError, match="the loss runs your model and not the one that it is given"):
        audited(model, torch.randn(8, 16), lambda _, batch: model(batch).mean())
    assert model.weight.grad is None
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"most_trials": 1},
        {"most_trials": True},
        {"seed": "a"},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": True},
        {"repeats": None},
        {"candidates": 5},
        {"candidates": {"bf16"}},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        audited(nn.Linear(16, 4), torch.randn(8, 16), **settings)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_the_caller_has_switched_on_changes_nothing(around: Callable[[], Any]) -> None:
    model, batch = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(8, 16)
    plain = audited(model, batch)
    with around():
        inside = audited(model, batch)
    assert inside.fp32 == plain.fp32
    assert inside.candidates["bf16"].all_lowered == plain.candidates["bf16"].all_lowered


def test_gradients_that_nearly_vanish_make_no_island() -> None:
    """DETR: its queries start alike, so that gradients of attention's queries and keys are 1e-7 to 1e-12 of all."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder")
             for name, value in {"layers": 2, "ffn_dim": 128, "attention_heads": 4}.items()}  # fmt: skip
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                        backbone_config=backbone, d_model=64, num_queries=10, num_labels=5, **sizes)  # fmt: skip
    labels = [{"class_labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4) * 0.4 + 0.1} for _ in range(2)]
    model, batch = DetrForObjectDetection(config), {"pixel_values": torch.randn(2, 3, 64, 64), "labels": labels}
    report = audited(model, batch, candidates=("bf16", "fp16"))
    assert {name: c.policy for name, c in report.candidates.items()} == {"bf16": "bf16-mixed", "fp16": "16-mixed"}
    with pytest.raises(ModelError, match=r"under bf16-true at .*cdist") as told:
        audited(model, batch, mode="true")
    assert "audit the other mode" in told.value.hint


def test_islands_are_told_with_the_error_that_they_are_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    batch, settings = torch.randn(8, 16), {"candidates": ("fp16",), "tolerance": Tolerance(loss=1e-5)}
    assert "the loss's error is" in audited(model, batch, squared, **settings).verdict
    settings["tolerance"] = Tolerance(gradient=1e-5)
    assert "the gradient's error is" in audited(model, batch, squared, **settings).verdict
    settings["tolerance"] = Tolerance(tensor=1e-4)
    told = audited(model, batch, squared, **settings)
    worst = told.candidates["fp16"].all_lowered.tensor
    assert f"the error of {worst}'s gradient is" in told.verdict and "at most" in told.verdict


def squared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


class Energy(nn.Module):
    """A plane wave: what its slope loses is the rounding of the phase."""

    def __init__(self, steep: float) -> None:
        super().__init__()
        self.phase, self.head = nn.Linear(3, 32), nn.Linear(32, 1)
        with torch.no_grad():
            self.phase.weight.mul_(steep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sin(self.phase(x))).float().squeeze(-1)  # type: ignore[no-any-return]


class Forces(nn.Module):
    def __init__(self, steep: float) -> None:
        super().__init__()
        self.energy = Energy(steep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return (slope + x).square().mean()


class FunctionalForces(Forces):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slope = torch.func.vmap(torch.func.grad(self.energy))(x)
        return (slope + x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Forces, FunctionalForces], ids=["autograd.grad", "torch.func"])
def test_a_forward_that_takes_gradients(kind: Callable[[float], nn.Module]) -> None:
    """A force field, a gradient penalty: the forward needs a graph, and wrappers of torch.func have no storage."""
    torch.manual_seed(0)
    x = 3 * torch.randn(64, 3)
    assert audited(kind(1.0), x).policy == "bf16-mixed"
    report = audited(kind(60.0), x)
    assert report.candidates["bf16"].islands in (("energy",), ("energy.phase",))
    assert report.candidates["bf16"].all_lowered.gradient_error > 0.1


class Pools(nn.Module):
    """Attention pooling over few tokens: the gradient of its score's bias is exactly zero, at times in fp32 too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.score, self.head = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head((self.score(x).softmax(1) * x).sum(1)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [2, 4])
def test_gradients_that_are_exactly_zero_ask_for_nothing(tokens: int) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        report = audited(Pools(), torch.randn(8, tokens, 16), hardware="cpu")
        assert report.policy == "bf16-mixed" and report.fp32.gradient_error < 1e-5


class Threshold(nn.Module):
    """Decides by differences that bf16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64) * 5e-4), nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) > 1.001


class Masks(nn.Module):
    """A metric of its own that nobody uses, and inside a mask that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gain = Threshold(), nn.Parameter(torch.tensor(1.0))
        self.weight, self.bias = nn.Parameter(torch.randn(64, 64) * 5e-4), nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.share = (nn.functional.linear(x, self.weight, self.bias) > 1.001).float().mean()
        return x * self.gain * self.inner(x)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.part = nn.Linear(64, 64), Masks()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 0.02 * self.part(x) + 0.1 * self.body(x)).square().mean()


def test_a_mask_inside_of_what_has_a_metric_is_not_pardoned_with_it() -> None:
    torch.manual_seed(0)
    report = audited(Masked(), torch.randn(256, 64), hardware="cpu", tolerance=0.5)
    assert "part" in " ".join(report.candidates["bf16"].islands)
    assert any(row.module == "part.inner" and row.failure == "rounding" for row in report.failures)
