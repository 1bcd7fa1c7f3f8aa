"""Low-bit Adam: close to fp32, as small as promised, exact on resume, loads with and without, refuses clearly."""

import subprocess
import sys
import types

import pytest
import torch

import floatline as fl
from floatline.errors import ConfigError
from floatline.hardware import resolve as resolve_hardware
from floatline.techniques import low_bit_optimizer
from floatline.techniques.optim_steps.low_bit_state import is_quantised, plain_state
from floatline.techniques.optim_steps.partial_step import state_bytes

from .optimizer_cases import adamw, data, furthest, make, mse, net, resumed, same, through_a_file, train

pytest.importorskip("torchao")
BITS = [8, 4, "fp8"]


def low(**settings):
    return fl.techniques.LowBitOptimizer(**settings)


def careful(parameters):
    """With an eps that keeps updates from hanging on the sign of gradients near zero."""
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("bits", BITS)
def test_close_to_plain_adamw_on_every_model(case, bits, precision):
    """Three updates of at most 1e-3; tensors here are small, so most state is full precision."""
    models = []
    for techniques in ([], [low(bits=bits)]):
        model, step = make(techniques, precision, model=case.build(), loss=case.loss, optimizer=careful)
        train(step, [case.batch(0), [case.batch(1), case.batch(2)], case.batch(3)])
        models.append(model)
    assert furthest(*models) < (3e-4 if bits != 4 else 1e-3)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.04), ("fp8", 0.06), (4, 0.4)])
def test_quantised_updates_are_near_those_of_fp32(bits, error):
    models = []
    for techniques in ([], [low(bits=bits)]):
        model, step = make(techniques, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-4))
        train(step, map(data, range(20)))
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in net().parameters()])
    assert (models[1] - models[0]).norm() < error * (models[0] - start).norm()
    assert not torch.equal(*models)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_full_precision_state_gives_torchs_numbers_and_settings(kind):
    """Blocks that fit no tensor: the maths is Adam's or AdamW's, with each group's own settings."""
    models = []
    for techniques in ([], [low(block_size=10_000)]):
        model = net()
        groups = [{"params": [model[0].weight], "weight_decay": 0.3, "betas": (0.5, 0.9)},
                  {"params": [*model[2].parameters(), model[3].weight], "lr": 3e-3, "eps": 1e-2}]  # fmt: skip
        _, step = make(techniques, model=model, optimizer=kind(groups, lr=1e-3, eps=1e-3, weight_decay=0.1))
        train(step, map(data, range(5)))
        models.append(model)
    assert furthest(*models) < 2e-6


def test_existing_state_is_taken_over():
    models = []
    for techniques in ([], [low()]):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        mse(model, data(9)).backward()
        optimizer.step()
        optimizer.zero_grad()
        _, step = make(techniques, model=model, optimizer=optimizer)
        train(step, map(data, range(3)))
        models.append(model)
    state = step.optimizer.state[model[0].weight]
    assert state["step"] == 4 and is_quantised(state["exp_avg_sq"])
    assert furthest(*models) < 2e-4


@pytest.mark.parametrize(("bits", "share"), [(8, 0.27), ("fp8", 0.26), (4, 0.14)])
def test_state_is_small(bits, share):
    """Of fp32 Adam's 8 bytes, on tensors of 4096 elements, the smallest that are quantised."""
    model = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(10))
    sizes = []
    for techniques in ([], [low(bits=bits)]):
        _, step = make(techniques, model=model, loss=lambda m, b: sum(layer(b[0]).sum() for layer in m))
        train(step, [data(0)])
        sizes.append(state_bytes(step.optimizer))
        facts = step.stack.facts()
        step.undo()
    assert sizes[1] < share * sizes[0]
    assert facts == {"low_bit_optimizer.state_bytes": sizes[1]}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_resumes_bit_for_bit(bits, precision):
    assert same(*resumed([low(bits=bits)], precision))


@pytest.mark.parametrize("bits", BITS)
def test_the_state_dict_holds_plain_tensors_only(bits):
    _, step = make([low(bits=bits)])
    train(step, [data(0)])
    moment = step.state_dict()["optimizer"]["state"][0]["exp_avg"]
    assert moment["low_bit"] == str(bits) and type(moment["codes"]) is type(moment["scale"]) is torch.Tensor


@pytest.mark.parametrize("bits", BITS)
def test_loads_the_state_of_a_plain_adamw_and_of_other_bits(bits):
    plain_model, plain = make(optimizer=careful)
    train(plain, map(data, range(3)))
    saved = plain.state_dict()
    for middle in BITS:
        model, step = make([low(bits=bits)], optimizer=careful)
        model.load_state_dict(plain_model.state_dict())
        _, between = make([low(bits=middle)], optimizer=careful)
        between.load_state_dict(through_a_file(saved))
        step.load_state_dict(through_a_file(between.state_dict()))
        state = step.optimizer.state[model[0].weight]
        assert is_quantised(state["exp_avg"]) and state["step"] == 3
        want = plain.optimizer.state[plain_model[0].weight]["exp_avg"]
        assert (state["exp_avg"].dequantize() - want).norm() < (0.3 if 4 in (bits, middle) else 0.06) * want.norm()
        assert bool(step(data(3)).applied)


@pytest.mark.parametrize("bits", BITS)
def test_a_plain_adamw_gets_dequantised_state(bits):
    model, step = make([low(bits=bits)])
    train(step, map(data, range(3)))
    state = through_a_file(step.state_dict())
    plain_model, plain = make()
    plain_model.load_state_dict(model.state_dict())
    plain.load_state_dict(state)
    for one, other in zip(plain_model.parameters(), model.parameters(), strict=True):
        got, kept = plain.optimizer.state[one], step.optimizer.state[other]
        for key in ("exp_avg", "exp_avg_sq"):
            want = kept[key].dequantize() if is_quantised(kept[key]) else kept[key]
            assert type(got[key]) is torch.Tensor and torch.equal(got[key], want)
    train(plain, [data(3)]), train(step, [data(3)])
    assert furthest(plain_model, model) < 1e-3


def test_plain_state_leaves_plain_states_alone():
    _, plain = make()
    train(plain, [data(0)])
    state = plain.optimizer.state_dict()
    assert plain_state(state) is state


def test_the_learning_rate_stays_a_number_that_schedules_change():
    model = net()
    optimizer = adamw(model.parameters())
    group = optimizer.param_groups[0]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    _, step = make([low()], model=model, optimizer=optimizer, schedule=schedule)
    rates = []
    for seed in range(3):
        rates.append(group["lr"])
        step(data(seed))
    assert rates == pytest.approx([1e-4, 5.5e-4, 1e-3]) and all(type(rate) is float for rate in rates)
    step.load_state_dict(through_a_file(step.state_dict()))
    assert step.optimizer.param_groups[0] is group and type(group["lr"]) is float


def test_the_compiler_is_left_as_it_was():
    _, step = make([low()])
    train(step, [data(0)])
    assert torch._dynamo.eval_frame._stance.stance == "default"
    double = torch.compile(lambda x: 2 * x, backend="eager")
    double(torch.ones(2))
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", BITS)
def test_runs_on_fake_tensors_also_the_first_time(bits):
    """In an interpreter where torchao has made no table yet."""
    code = (
        "import torch; from torch import nn; from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "from floatline.techniques.optim_steps.low_bit_adam import to_torchao\n"
        "from floatline.techniques.optim_steps.partial_step import state_bytes\n"
        "with FakeTensorMode():\n"
        "    weight = nn.Parameter(torch.ones(64, 64)); weight.grad = torch.ones(64, 64)\n"
        f"    plain = torch.optim.AdamW([weight]); bits = {bits!r}\n"
        "    low = to_torchao(plain, bits, block_size=128, stochastic_rounding=True, eager=True)\n"
        "    low.step(); low.step(); print(state_bytes(low))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, scales, tables = 2 * 4096 // (2 if bits == 4 else 1), 2 * 32 * 4, {8: 2 * 256 * 4, 4: 2 * 16 * 4, "fp8": 0}
    assert int(done.stdout) == codes + scales + tables[bits] + 4


def test_undo_dequantises():
    model = net()
    optimizer = adamw(model.parameters())
    _, step = make([low()], model=model, optimizer=optimizer)
    train(step, map(data, range(2)))
    step.undo()
    for state in optimizer.state.values():
        assert type(state["exp_avg"]) is type(state["exp_avg_sq"]) is torch.Tensor
    before = [p.detach().clone() for p in model.parameters()]
    mse(model, data(2)).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_stochastic_rounding_moves_bf16_weights():
    moved = []
    for stochastic in (False, True):
        model, step = make([low(stochastic_rounding=stochastic)], "bf16-true", optimizer=lambda p: adamw(p, lr=1e-5))
        before = model[0].weight.detach().clone()
        torch.manual_seed(0)
        train(step, map(data, range(10)))
        moved.append((model[0].weight != before).float().mean().item())
    assert moved[1] > 1.5 * moved[0]


def test_notes_say_what_is_used_and_what_stays():
    applied = low().apply(net())
    assert applied.touched == ("0.weight", "2.weight")
    assert applied.notes[0] == "uses torchao: it is installed and has every format"
    assert applied.notes[1].startswith("2 of 6 parameters; 1.5 % of elements keep full precision (fewer than 4096")
    assert applied.notes[2].startswith("torchao's step runs eagerly on ")
    small = low().apply(torch.nn.Linear(2, 2))
    assert small.notes[1].startswith("saves nothing: every parameter keeps full-precision state")


def test_fp8_needs_ada_on_cuda():
    assert low(bits="fp8").supports(resolve_hardware("cpu"), net())
    verdict = low(bits="fp8").supports(resolve_hardware("t4"), net())
    assert not verdict and "8.9" in verdict.reason
    assert low(bits="fp8").supports(resolve_hardware("h100"), net()) and low().supports(resolve_hardware("t4"), net())
    compiles = low_bit_optimizer.compiles
    assert not compiles(resolve_hardware("cpu"), triton=True) and not compiles(resolve_hardware("p100"), triton=True)
    assert compiles(resolve_hardware("t4"), triton=True) and not compiles(resolve_hardware("t4"), triton=False)


class FakeBitsAndBytes(torch.optim.SGD):
    """Takes what bitsandbytes' AdamW8bit takes."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        self.given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, lr=lr)


def test_bitsandbytes_gets_the_settings(monkeypatch):
    fake = types.ModuleType("bitsandbytes")
    fake.optim = types.SimpleNamespace(AdamW8bit=FakeBitsAndBytes)
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    plain = torch.optim.AdamW(net().parameters(), lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    made = low_bit_optimizer.to_bitsandbytes(plain)
    assert made.given == {"lr": 2e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    assert made.param_groups is plain.param_groups and made.state is plain.state
    plain.state[plain.param_groups[0]["params"][0]] = {"step": torch.tensor(1.0)}
    with pytest.raises(ConfigError, match="cannot take over the state of an optimizer that has stepped already"):
        low_bit_optimizer.to_bitsandbytes(plain)


def installed(monkeypatch, *names):
    monkeypatch.setattr(low_bit_optimizer, "find_spec", lambda name: object() if name in names else None)


def test_the_library_is_chosen_with_a_reason(monkeypatch):
    cpu, t4 = resolve_hardware("cpu"), resolve_hardware("t4")
    installed(monkeypatch, "bitsandbytes")
    assert low()._chosen_library(t4) == ("bitsandbytes", "torchao is not installed")
    for technique, hardware in ((low(), cpu), (low(bits=4), t4), (low(stochastic_rounding=True), t4)):
        with pytest.raises(ConfigError, match=r'needs torchao, which is not installed\nhint: pip install "floatline'):
            technique._chosen_library(hardware)
    verdict = low(library="bitsandbytes").supports(cpu, net())
    assert not verdict and verdict.reason == "bitsandbytes' 8-bit optimizers need CUDA; write library='torchao'"
    installed(monkeypatch, "torchao", "bitsandbytes")
    assert low()._chosen_library(t4)[0] == "torchao"
    installed(monkeypatch)
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes, which is not installed\nhint: pip install bitsandbytes"
    ):
        low(library="bitsandbytes")._chosen_library(t4)


def test_bad_input():
    for settings, text in (
        ({"bits": 16}, r"low_bit_optimizer.bits is 16\nhint: allowed: 8, 4, fp8"),
        ({"block_size": 1}, r"low_bit_optimizer.block_size is 1\nhint: give 2 or more"),
        ({"block_size": 33}, r"low_bit_optimizer.block_size is 33\nhint: give an even number"),
        ({"library": "apex"}, r"library is 'apex'\nhint: allowed: auto, torchao, bitsandbytes"),
        ({"library": "bitsandbytes", "bits": 4}, r"bits is 4\nhint: bitsandbytes has 8 bits"),
        ({"library": "bitsandbytes", "block_size": 128}, r"block_size is 128\nhint: bitsandbytes has blocks of 256"),
        ({"library": "bitsandbytes", "stochastic_rounding": True}, "bitsandbytes rounds to nearest"),
    ):
        with pytest.raises(ConfigError, match=text):
            low(**settings)


def test_other_optimizers_are_refused_and_the_model_is_left_as_it_was():
    model = net()
    before = dict(vars(model))
    with pytest.raises(ConfigError, match=r"converts torch\.optim\.Adam and AdamW, not SGD") as error:
        make([low()], "bf16-true", model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    assert "use optimizer_offload" in error.value.hint
    assert vars(model) == before and model[0].weight.dtype is torch.float32
    for setting in ("maximize", "amsgrad"):
        with pytest.raises(ConfigError, match=f"low_bit_optimizer cannot do {setting}=True"):
            make([low()], optimizer=lambda p, setting=setting: torch.optim.AdamW(p, **{setting: True}))
