import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning, NonFiniteError, RunDirectoryError
from floatline.step.gradient_report import BadGradient, GradientReport
from floatline.step.norm import norms_of


class Layers(nn.Module):
    """Two equal layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).square().mean()


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(0)
    return Layers()


def backward(model: nn.Module, factor: float = 1.0, seed: int = 0) -> None:
    model.zero_grad()
    ids = torch.randint(7, (2, 3), generator=torch.Generator().manual_seed(seed))
    (model(ids) * factor).backward()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_numbers_are_those_of_fp64(model: Layers) -> None:
    monitor = fl.GradientMonitor(model)
    backward(model)
    report = monitor.check()
    every = torch.cat([gradient.flatten() for gradient in gradients(model).values()])
    assert report and report.step == 1 and report.parameters == 11
    assert report.norm == pytest.approx(float(every.norm()), rel=1e-6)
    assert report.largest == pytest.approx(float(every.abs().max()), rel=1e-6)
    assert report.mean == pytest.approx(float(every.abs().mean()), rel=1e-6)
    assert str(report).startswith("update 1: norm ") and report.hint == ""


def test_the_total_is_what_clipping_returns(model: Layers) -> None:
    backward(model)
    report = fl.GradientMonitor(model).check()
    assert report.norm == pytest.approx(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)), rel=1e-6)


def test_bad_gradients_are_named_and_counted(model: Layers) -> None:
    monitor = fl.GradientMonitor(model)
    backward(model)
    model.blocks[1][0].weight.grad[0, :3] = math.nan
    model.blocks[1][0].weight.grad[1, 1] = -math.inf
    model.head.bias.grad.fill_(math.inf)
    report = monitor.check()
    assert not report and not report.finite and math.isnan(report.norm)
    assert {one.name: (one.nan, one.inf, one.elements) for one in report.bad} == {
        "blocks.1.0.weight": (3, 1, 16),
        "head.bias": (0, 1, 1),
    }
    assert str(report) == (
        "update 1: 2 of 11 gradients are not finite: blocks.1.0.weight: 3 NaN and 1 Inf of 16 elements; "
        "head.bias: 1 Inf of 1 elements"
    )
    assert "leave this update out" in report.hint
    with pytest.raises(NonFiniteError, match="2 of 11 gradients are not finite"):
        report.raise_if_bad()


def test_only_five_are_listed() -> None:
    report = GradientReport(
        3, math.nan, bad=tuple(BadGradient(f"p{i}", 1, 0, 4, math.nan) for i in range(9)), parameters=9
    )
    assert str(report).endswith("p4: 1 NaN of 4 elements; and 4 more")


def test_finite_values_whose_norm_overflows_are_told_from_inf(model: Layers) -> None:
    backward(model)
    model.head.bias.grad.fill_(3e38)
    model.head.weight.grad.fill_(3e38)
    report = fl.GradientMonitor(model).check()
    assert [(one.name, one.nan, one.inf) for one in report.bad] == [("head.weight", 0, 0)]
    assert "values so large that their norm overflows; none NaN or Inf" in str(report)


def test_no_gradient_at_all(model: Layers) -> None:
    monitor = fl.GradientMonitor(model)
    report = monitor.check()
    assert not report and not report.finite and len(report.missing) == 11
    assert str(report) == "update 1: no parameter has a gradient"
    assert "after backward()" in report.hint
    assert monitor.history.points.kept == []
    with pytest.raises(NonFiniteError, match="no parameter has a gradient"):
        report.raise_if_bad()


def test_all_zero_is_said_but_finite(model: Layers) -> None:
    backward(model, factor=0.0)
    report = fl.GradientMonitor(model).check()
    assert not report and report.finite and report.all_zero
    assert str(report) == "update 1: all 11 gradients are zero" and "fp16 gradients that vanish" in report.hint
    report.raise_if_bad()


def test_frozen_and_unused_parameters(model: Layers) -> None:
    model.embed.requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    monitor = fl.GradientMonitor(model)
    backward(model)
    report = monitor.check()
    assert report and report.parameters == 10
    assert report.missing == ("unused.weight", "unused.bias")


def test_layers_that_were_replaced_are_found_again(model: Layers) -> None:
    monitor = fl.GradientMonitor(model)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(parameter.detach().clone()))
    backward(model)
    assert monitor.check().parameters == 11


def test_ten_times_the_clip_norm_is_reported_and_warned_of_once(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, max_grad_norm=1e-3)
    backward(model)
    with pytest.warns(FloatlineWarning, match=r"of the clip norm 0.001; clipping handles one") as caught:
        report = monitor.check()
    assert caught[0].filename == __file__
    assert not report and report.finite and report.large and "of the clip norm 0.001" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.check().large
    assert monitor.history.large_updates == 2


def test_the_line_is_at_ten() -> None:
    assert not GradientReport(1, 9.9, parameters=1, max_grad_norm=1.0).large
    assert GradientReport(1, 10.1, parameters=1, max_grad_norm=1.0).large
    assert not GradientReport(1, 1e9, parameters=1, max_grad_norm=None).large
    assert not GradientReport(1, math.inf, parameters=1, max_grad_norm=1.0).large


@pytest.mark.parametrize("how", ["number", "tensor", "scaler"])
def test_scaled_gradients_are_recorded_unscaled(model: Layers, how: str) -> None:
    backward(model)
    plain = fl.GradientMonitor(model).check()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    backward(model, factor=1024.0)
    before = {name: gradient.clone() for name, gradient in gradients(model).items()}
    monitor = fl.GradientMonitor(model)
    report = monitor.check(scale={"number": 1024.0, "tensor": torch.tensor(1024.0), "scaler": scaler}[how])
    assert report.norm == pytest.approx(plain.norm, rel=1e-6)
    assert report.largest == pytest.approx(plain.largest, rel=1e-6)
    assert report.mean == pytest.approx(plain.mean, rel=1e-6)
    assert monitor.history.rows.table()[0][0] == pytest.approx(float(before["embed.weight"].norm()) / 1024, rel=1e-6)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    model.head.bias.grad.fill_(math.inf)
    assert "routine now and then" in monitor.check(scale=scaler).hint


def test_a_scaler_that_is_off_or_not_used_yet(model: Layers) -> None:
    backward(model)
    plain = fl.GradientMonitor(model).check().norm
    assert fl.GradientMonitor(model).check(scale=torch.amp.GradScaler("cpu", enabled=False)).norm == plain
    assert fl.GradientMonitor(model).check(scale=torch.amp.GradScaler("cpu", init_scale=2.0)).norm == plain / 2


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, "2", torch.ones(3)])
def test_a_scale_that_is_none(model: Layers, scale: object) -> None:
    backward(model)
    with pytest.raises(ConfigError, match="scale is") as caught:
        fl.GradientMonitor(model).check(scale=scale)
    assert "positive number" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_summed_up_in_fp32(dtype: torch.dtype) -> None:
    linear = nn.Linear(300, 300, bias=False).to(dtype)
    linear.weight.grad = torch.full((300, 300), 3.0, dtype=dtype)
    report = fl.GradientMonitor(linear, max_grad_norm=None).check()
    assert (report.norm, report.largest, report.mean) == (900.0, 3.0, 3.0)


def test_sparse_gradients_are_those_of_dense_ones() -> None:
    reports = []
    for sparse in (True, False):
        table = nn.Embedding(6, 3, sparse=sparse)
        nn.init.ones_(table.weight)
        table(torch.tensor([1, 1, 4])).square().sum().backward()
        reports.append(fl.GradientMonitor(table).check())
    assert reports[0] == reports[1]


def test_norms_that_clipping_has_are_taken_as_they_are(model: Layers) -> None:
    backward(model)
    own, fed = fl.GradientMonitor(model), fl.GradientMonitor(model)
    norms = norms_of(model.named_parameters())
    assert fed.check(norms) == own.check()
    assert fed.history.rows.table() == own.history.rows.table()


def test_norms_of_masters_under_the_names_of_the_weights(model: Layers) -> None:
    backward(model)
    masters = []
    for name, parameter in model.named_parameters():
        master = parameter.detach().clone().requires_grad_()
        master.grad, parameter.grad = parameter.grad, None
        masters.append((name, master))
    report = fl.GradientMonitor(model).check(norms_of(masters))
    assert report.parameters == 11 and report.missing == ()


def test_rows_by_layer_in_the_models_order(model: Layers) -> None:
    monitor = fl.GradientMonitor(model)
    backward(model)
    monitor.check()
    assert monitor.history.rows.names == ["embed", "blocks.0", "blocks.1", "head"]
    parts = gradients(model)
    expected = [
        math.sqrt(sum(float(g.square().sum()) for name, g in parts.items() if name.startswith(row)))
        for row in monitor.history.rows.names
    ]
    assert monitor.history.rows.table()[0] == pytest.approx(expected, rel=1e-6)


def test_rows_by_parameter(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, per="parameter", every=2)
    for seed in range(4):
        backward(model, seed=seed)
        monitor.check()
    assert monitor.history.rows.names == [name for name, _ in model.named_parameters()]
    assert monitor.history.rows.steps == [1, 3]


def test_a_model_without_layers_goes_by_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    monitor = fl.GradientMonitor(model)
    monitor.check()
    assert monitor.history.rows.names == ["0", "1"]


def test_a_bad_update_is_in_the_rows_between_two_that_are_due(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, every=100)
    for update in range(5):
        backward(model)
        if update == 3:
            model.blocks[0][2].bias.grad[0] = math.nan
        monitor.check()
    row = dict(zip(monitor.history.rows.names, monitor.history.rows.table()[0], strict=True))
    assert [name for name, norm in row.items() if math.isnan(norm)] == ["blocks.0"]
    assert (monitor.history.points.kept[3].bad_updates, monitor.history.points.kept[3].bad_elements) == (1, 1)
    assert monitor.history.distribution.updates == 4


def test_elements_are_looked_at_as_often_as_told(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, elements_every=3)
    seen = []
    for _ in range(7):
        backward(model)
        seen.append(monitor.check().largest is not None)
    assert seen == [True, False, False, True, False, False, True]
    assert [point.looked for point in monitor.history.points.kept] == [1, 0, 0, 1, 0, 0, 1]
    model.head.bias.grad[0] = math.nan
    assert not monitor.check().finite


def test_lag_returns_the_report_of_the_update_before(model: Layers) -> None:
    late, own = fl.GradientMonitor(model, lag=True), fl.GradientMonitor(model)
    reports, expected = [], []
    for seed in range(3):
        backward(model, seed=seed)
        if seed == 1:
            model.head.bias.grad[0] = math.nan
        reports.append(late.check())
        expected.append(own.check())
        model.zero_grad()
    assert reports[0] and reports[0].step == 0 and str(reports[0]) == "no update has been read yet"
    assert reports[1] == expected[0]
    assert reports[2].bad == (BadGradient("head.bias", None, None, 1, reports[2].bad[0].norm),)
    assert "head.bias: NaN" in str(reports[2])
    assert late.flush() == expected[2] == late.flush()
    assert late.history.points.kept[1].bad_elements == own.history.points.kept[1].bad_elements == 1


def test_lag_reads_what_waits_before_it_is_saved(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, lag=True)
    backward(model)
    monitor.check()
    assert len(monitor.state_dict()["points"]["kept"]) == 1


def test_memory_is_bounded(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, every=1, history=16)
    backward(model)
    norms = norms_of(model.named_parameters())
    for _ in range(3000):
        monitor.check(norms)
    state = monitor.state_dict()
    assert len(state["points"]["kept"]) <= 16 and len(state["rows"]["steps"]) <= 4
    assert sum(point["updates"] for point in state["points"]["kept"]) == 3000
    assert len(json.dumps(state)) < 10_000


def test_it_goes_on_from_a_checkpoint(model: Layers, tmp_path: Path) -> None:
    whole, first = (fl.GradientMonitor(model, every=2, history=8) for _ in range(2))
    for seed in range(20):
        backward(model, seed=seed)
        if seed == 4:
            model.head.bias.grad[0] = math.nan
        whole.check()
        if seed < 10:
            first.check()
        if seed == 9:
            torch.save(first.state_dict(), tmp_path / "state.pt")
            resumed = fl.GradientMonitor(model, every=2, history=8)
            resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if seed > 9:
            resumed.check()
    assert json.dumps(resumed.record()) == json.dumps(whole.record())


def test_a_state_of_another_kind_is_refused(model: Layers) -> None:
    state = fl.GradientMonitor(model).state_dict()
    with pytest.raises(ConfigError, match="per layer, this monitor per parameter") as caught:
        fl.GradientMonitor(model, per="parameter").load_state_dict(state)
    assert caught.value.hint == "make it with per='layer'"
    with pytest.raises(ConfigError, match="of version 99, this one reads 1"):
        fl.GradientMonitor(model).load_state_dict({**state, "version": 99})


def test_the_file(model: Layers, tmp_path: Path) -> None:
    monitor = fl.GradientMonitor(model)
    backward(model)
    monitor.check()
    assert monitor.save(tmp_path) == tmp_path / "gradients.json"
    path = monitor.save(tmp_path / "deep" / "mine.json")
    record = json.loads(path.read_text())
    assert record["step"] == 1 and "1 finite updates so far" in record["advice"]["text"]
    assert [child.name for child in path.parent.iterdir()] == ["mine.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot write"):
        monitor.save(tmp_path / "file" / "gradients.json")


def test_advice_is_of_the_runs_own_norms(model: Layers) -> None:
    monitor = fl.GradientMonitor(model, max_grad_norm=100.0)
    for seed in range(30):
        backward(model, seed=seed)
        monitor.check()
    assert monitor.advice().updates == 30 and "max_grad_norm=100 has clipped none" in str(monitor.advice())


@pytest.mark.parametrize(
    ("settings", "said", "hint"),
    [
        ({"max_grad_norm": 0}, "max_grad_norm is 0", "positive number, or None"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan", "positive"),
        ({"every": 0}, "every is 0", "1"),
        ({"elements_every": -2}, "elements_every is -2", "1"),
        ({"history": 7}, "history is 7", "8 points"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'", "positive"),
        ({"every": None}, "every is None", "1"),
        ({"elements_every": 2.5}, "elements_every is 2.5", "1"),
        ({"history": "all"}, "history is 'all'", "8 points"),
        ({"per": "layers"}, "per is 'layers'", "did you mean 'layer'"),
    ],
)
def test_settings_are_checked(model: Layers, settings: dict, said: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        fl.GradientMonitor(model, **settings)
    assert hint in caught.value.hint


@pytest.mark.parametrize("model", [None, "model", nn.Linear])
def test_what_is_no_module(model: object) -> None:
    with pytest.raises(ConfigError, match="model is a ") as caught:
        fl.GradientMonitor(model)
    assert "torch.nn.Module" in caught.value.hint


def test_norms_from_elsewhere(model: Layers) -> None:
    monitor = fl.GradientMonitor(model)
    with pytest.raises(ConfigError, match="norms is a float") as caught:
        monitor.check(3.0)
    assert "norms_of" in caught.value.hint and monitor.step == 0


def test_a_scale_that_has_fallen_to_zero_leaves_nothing_of_the_gradients(model: Layers) -> None:
    backward(model, 0.0)
    assert not fl.GradientMonitor(model).check(scale=torch.tensor(0.0)).finite


def test_a_module_without_parameters() -> None:
    with pytest.raises(ConfigError, match="Tanh has no parameters"):
        fl.GradientMonitor(nn.Tanh())


def test_the_guides_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "gradient-monitor.md"
    code = guide.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FloatlineWarning)
        exec(compile(code, str(guide), "exec"), {})
    printed = capsys.readouterr().out
    assert "update 61: 4 of 4 gradients are not finite: 0.weight: 256 NaN of 256 elements; 0.bias" in printed
    assert "99 updates: half lie below" in printed and (tmp_path / "gradients.json").is_file()
