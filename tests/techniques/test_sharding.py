"""Sharding: two real gloo processes make the updates of one; a group of one and pretended ranks; undo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError
from floatline.techniques import Sharding
from floatline.techniques.distributed.groups import fake_ranks, leave_ranks
from floatline.techniques.distributed.ranks import is_connection_fault
from floatline.techniques.distributed.shards import Unit, end_units, is_sharded, local_bytes, plan_units

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="module")
def scenarios():
    """The functions that the two processes run, to run them here as one."""
    import two_ranks

    return two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found, by scenario."""
    home = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = os.pathsep.join([*sys.path, str(HERE.parent), str(HERE.parent / "contracts")])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common = {**os.environ, "PYTHONPATH": places, **meeting}
    line = [sys.executable, str(HERE / "two_ranks.py"), str(home)]
    both = [
        subprocess.Popen(line, env={**common, "RANK": str(rank), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
    return [torch.load(home / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(autouse=True)
def one_group_a_test():
    yield
    leave_ranks()


SAME = ["gpt2", "qwen3_vl", "tied", "mlp", "gpt2 accumulated", "gpt2 batched", "gpt2 packed", "gpt2 uneven",
        "gpt2 without targets", "qwen3_vl kept", "qwen3_vl layers", "untied", "untied accumulated", "untied chunked",
        "untied recomputed"]  # fmt: skip
NEAR = {"gpt2 bf16-mixed": 2e-2, "gpt2 bf16 in fp32": 2e-2, "qwen3_vl bf16-mixed": 2e-2, "gpt2 island": 2e-2,
        "qwen3_vl island": 2e-2, "gpt2 bf16-true": 2e-2, "gpt2 16-mixed": 2e-3, "gpt2 16-true": 2e-3,
        "untied bf16-mixed": 2e-2, "qwen3_vl fp8": 2e-2}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_two_ranks_equal_one_process_in_fp32(ranks, scenarios, name):
    """Losses, gradient norms and, after SGD with momentum, all parameters: to 1e-5."""
    one = scenarios.SAME[name](0, 1)
    for rank in ranks:
        torch.testing.assert_close(rank[name]["updates"], one["updates"], rtol=1e-5, atol=1e-5)
        assert rank[name]["parameters"].keys() == one["parameters"].keys()
        for key, value in one["parameters"].items():
            torch.testing.assert_close(rank[name]["parameters"][key], value, rtol=1e-5, atol=1e-5)
    assert ranks[0][name]["updates"] == ranks[1][name]["updates"]


@pytest.mark.parametrize("name", NEAR)
def test_two_ranks_are_near_one_process_in_half_precision(ranks, scenarios, name):
    one = scenarios.NEAR[name](0, 1)
    for rank in ranks:
        for (loss, norm, applied), (mine, my_norm, my_applied) in zip(
            one["updates"], rank[name]["updates"], strict=True
        ):
            assert mine == pytest.approx(loss, rel=NEAR[name]) and my_norm == pytest.approx(norm, rel=3 * NEAR[name])
            assert applied == my_applied
    first, second = ranks[0][name]["parameters"], ranks[1][name]["parameters"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_techniques_work_on_two_ranks_as_on_one(ranks, scenarios):
    assert {"checkpointing", "offload", "chunked_loss", "lora", "compile"} <= set(scenarios.TOGETHER)
    for name in scenarios.TOGETHER:
        one = scenarios.together(0, 1, name)
        for rank in ranks:
            torch.testing.assert_close(rank[f"with {name}"], one, rtol=1e-5, atol=1e-5, msg=f"{name}: {one}")


def test_batch_norms_keep_their_format(ranks):
    for name in ("conv bf16-mixed", "conv bf16-true"):
        parameters = ranks[0][name]["parameters"]
        assert all(p.isfinite().all() for p in parameters.values()) and ranks[0][name]["updates"][0][2]
        assert parameters["blocks.0.norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("name", ["a nan", "an overflow"])
def test_a_bad_gradient_on_one_rank_is_skipped_by_both(ranks, name):
    for rank in ranks:
        found = rank[name]
        assert [applied for *_, applied in found["updates"]] == [True, False, True] and found["skipped"] == 1
        before, at, after = found["weights"]
        assert torch.equal(before, at) and not torch.equal(at, after)
    assert ranks[0][name]["updates"][2] == ranks[1][name]["updates"][2]
    expected = {"a nan": [None] * 3, "an overflow": [64.0, 32.0, 32.0]}[name]
    assert [rank[name]["scales"] for rank in ranks] == [expected, expected]


def test_a_bad_batch_on_one_rank_takes_both_back(ranks):
    for rank in ranks:
        found = rank["goes back"]
        assert found["back"] == [None, None, None, 2, None] and found["updates"] == 3
        _, second, third, fourth, fifth = found["weights"]
        assert torch.equal(second, fourth) and not torch.equal(second, third) and not torch.equal(fourth, fifth)
    pairs = zip(*(rank["goes back"]["weights"] for rank in ranks), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["replicas nan", "replicas statistics", "replicas go back"])
def test_replicas_of_the_caller_decide_together(ranks, name):
    for rank in ranks:
        found = rank[name]
        assert found["applied"] == [True, True, True, False, True] and found["buffers"]
        assert found["back"] == [None, None, None, 2 if name == "replicas go back" else None, None]
    assert torch.equal(ranks[0][name]["weights"], ranks[1][name]["weights"])


def test_a_rank_with_fewer_micro_batches_joins_in(ranks, scenarios):
    one = scenarios.make("gpt2", techniques=())
    output = one(scenarios.ZOO["gpt2"].batch(0))
    for rank in ranks:
        ((loss, norm, _),) = rank["uneven micro-batches"]["updates"]
        assert loss == pytest.approx(float(output.loss), rel=1e-5)
        assert norm == pytest.approx(float(output.grad_norm), rel=1e-5)


def test_ranks_that_would_run_different_modules_are_refused_on_all(ranks):
    for rank, has in zip(ranks, (True, False), strict=True):
        message = rank["other kinds"]
        assert "the ranks' micro-batches are of different kinds" in message and "hint: give every rank" in message
        assert ("pixel_values" in message) == has


def test_fused_optimizers_select_on_shards(ranks):
    assert [rank["selecting"] for rank in ranks] == [[True, False]] * 2


def test_ranks_agree(ranks):
    for number, rank in enumerate(ranks):
        found = rank["agreeing"]
        assert found["sum"] == 3.0 and found["any"] == (True, False) and found["members"] == 2
        assert found["tell"] == [[0, 2**50 + 1], [1, 2**50 + 1]]
        assert found["on first"] == {"rank": 0} and found["all well"] == number
        assert found["first fails"] == ("bad on rank 0", "mend it", number == 1)
        assert found["second fails"] == ("bad on rank 1", "mend it", number == 0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_a_group_of_one_is_the_plain_step_bit_for_bit(case, scenarios, precision):
    results = []
    for techniques in ([], ["sharding"]):
        step = scenarios.make(case.name, precision, techniques, scenarios.adamw)
        updates = scenarios.numbers([step(case.batch(seed)) for seed in range(2)])
        results.append((updates, scenarios.whole(step)))
    (plain, weights), (sharded, others) = results
    assert plain == sharded and all(torch.equal(weights[name], others[name]) for name in weights)


def test_undo_restores_everything(case):
    model = case.build()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in parameters.items()}
    attributes = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    hooks = {name: {k: dict(v) for k, v in vars(m).items() if "_hooks" in k} for name, m in model.named_modules()}
    applied = Sharding().apply(model)
    assert all(is_sharded(p) for p in model.parameters())
    with torch.no_grad():  # leaves the root's weights gathered
        model(**case.batch(0)) if isinstance(case.batch(0), dict) else model(case.batch(0)[0])
    model.load_state_dict(model.state_dict())
    applied.undo()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is parameters[name] and torch.equal(parameter, values[name])
    for name, module in model.named_modules():
        kind, before = attributes[name]
        assert type(module) is kind and vars(module).keys() == before.keys()
        assert {k: dict(v) for k, v in vars(module).items() if "_hooks" in k} == hooks[name]
    Sharding().apply(model).undo()


def test_an_optimizer_with_state_follows_into_the_shards_and_back(zoo):
    case = zoo["gpt2"]
    results = []
    for shard in (False, True):
        model = case.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        plain = fl.TrainStep(model, optimizer, precision="32-true")
        plain(case.batch(0))
        plain.undo()
        step = fl.TrainStep(model, optimizer, precision="32-true", techniques=["sharding"] if shard else [])
        results.append((float(step(case.batch(1)).loss), float(step(case.batch(2)).loss)))
        step.undo()
        assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
        assert not any(is_sharded(value) for state in optimizer.state.values() for value in state.values())
    assert results[0] == results[1]


def test_another_ranks_share_of_the_memory(zoo):
    """At 8 pretended ranks a model's shards are an eighth, plus padding, and an update runs."""
    case = zoo["gpt2"]
    whole = sum(p.nbytes for p in case.build().parameters())
    with fake_ranks(8):
        model = case.build()
        step = fl.TrainStep(model, torch.optim.AdamW, precision="bf16-mixed", techniques=["sharding"])
        rows = sum(-(-p.shape[0] // 8) * p[0].numel() * 4 for p in case.build().parameters())
        assert local_bytes(model) == rows == pytest.approx(whole / 8, rel=0.05)
        assert step.ranks.size == 8
        step(case.batch(0))
        moments = [state["exp_avg"].to_local().nbytes for state in step.optimizer.state.values()]
        assert sum(moments) == rows
        facts = step.stack.applied[0].facts()
        assert facts == {"ranks": 8, "units": 5, "local_parameter_bytes": rows}
    with pytest.raises(RuntimeError, match="needs a process without a process group"), fake_ranks(2), fake_ranks(2):
        pass


def test_ranks_are_planned_on_fake_tensors(zoo):
    from torch._subclasses import FakeTensorMode

    case = zoo["gpt2"]
    with fake_ranks(4), FakeTensorMode(allow_non_fake_inputs=True):
        step = fl.TrainStep(
            case.build(), torch.optim.AdamW, precision="bf16-mixed", techniques=["sharding"], count=lambda batch: 4
        )
        step.sentinel.make_update = lambda optimizer, finite: optimizer.step()  # a verdict on fakes cannot be read
        step.sentinel.record = lambda *_: None
        assert step(case.batch(0)).loss.shape == ()
        assert {tuple(state["exp_avg"].to_local().shape) for state in step.optimizer.state.values()} >= {(24, 16), (4,)}


def test_what_is_gathered_together(zoo):
    applied = Sharding().apply(zoo["qwen3_vl"].build())
    assert set(applied.touched) == {
        "", "model.visual.blocks.0", "model.visual.blocks.1", "model.language_model.layers.0",
        "model.language_model.layers.1", "model.language_model.embed_tokens", "lm_head",
    }  # fmt: skip
    assert applied.notes == ("1 rank, 6 units, all in fp32",)


def ends(model, **taken):
    """The end units of a model, each with whether it stays gathered."""
    units = [Unit({name: model.get_submodule(name)}) for name in taken.get("units", ())]
    return [(list(unit.modules), unit.stays) for unit in end_units(model, units)]


def test_embedding_and_head_are_units(zoo, scenarios):
    tied, untied = zoo["gpt2"].build(), scenarios.untied_gpt2()
    assert ends(tied) == [(["transformer.wte", "lm_head"], True)]
    assert ends(untied) == [(["transformer.wte"], False), (["lm_head"], True)]
    assert ends(untied, units=["lm_head"]) == [(["transformer.wte"], False)]
    assert ends(untied, units=["transformer"]) == [(["lm_head"], True)]
    assert ends(tied, units=["lm_head"]) == []
    untied.extra = nn.Linear(1, 1)
    untied.extra.weight = untied.lm_head.weight  # a third module, which is in the root's unit
    assert ends(untied) == [(["transformer.wte"], False)]
    assert ends(zoo["mlp"].build()) == ends(zoo["tied"].build()) == []


def test_an_untied_embedding_is_not_gathered_for_the_backward(scenarios):
    def gathers(techniques):
        model = scenarios.untied_gpt2()
        fl.TrainStep(model, torch.optim.AdamW, precision="32-true", techniques=techniques)
        return [group.unshard_in_backward for group in model.transformer.wte._get_fsdp_state()._fsdp_param_groups]

    assert gathers(["sharding"]) == [False] and gathers(["sharding", "checkpointing"]) == [False]
    assert gathers(["sharding", "checkpointing(layers=['transformer.wte'])"]) == [True]


def test_tied_weights_are_in_one_unit(zoo):
    model = zoo["gpt2"].build()
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in ("transformer.h.0", "lm_head")}
    units, notes = plan_units(model, layers, {})
    assert [list(unit.modules) for unit in units] == [["transformer.h.0"]]
    assert notes == ["lm_head is gathered with its surroundings: it shares a weight with other modules"]
    units, notes = plan_units(model, {"transformer.h.0": layers["transformer.h.0"]}, {"lm_head": layers["lm_head"]})
    assert [set(unit.modules) for unit in units] == [{"transformer.h.0"}, {"lm_head", "transformer.wte"}] and not notes


def test_frozen_parameters_are_sharded_too(zoo):
    case = zoo["qwen3_vl"]
    model = case.build()
    model.model.visual.requires_grad_(False)
    step = fl.TrainStep(model, torch.optim.AdamW, precision="bf16-mixed", techniques=["sharding"])
    assert bool(step(case.batch(0)).applied)
    assert all(is_sharded(p) for p in model.parameters())
    assert {p.requires_grad for p in model.model.visual.parameters()} == {False}


def test_bad_input(zoo):
    with pytest.raises(ConfigError, match=r"sharding.layers: 'model.layer.\*' matches no module of GPT2.*\nhint: "):
        Sharding(layers=("model.layer.*",)).apply(zoo["gpt2"].build())
    with pytest.raises(
        ConfigError, match=r"transformer.h is a ModuleList that is never called itself\nhint: .*\.h\.\*"
    ):
        Sharding(layers=("transformer.h",)).apply(zoo["gpt2"].build())
    with pytest.raises(ConfigError, match=r"sharding\.gather is 'bf16'\nhint: allowed: policy, fp32"):
        Sharding(gather="bf16")
    scalar = nn.Linear(2, 2)
    scalar.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="scale has no dimension to split"):
        Sharding().apply(scalar)
    model = zoo["mlp"].build()
    Sharding().apply(model)
    with pytest.raises(ConfigError, match="already applied"):
        Sharding().apply(model)


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["before", "forward", "backward"])
@pytest.mark.parametrize("seed", [0, 1], ids=["first update", "later"])
def test_an_exception_in_an_update_leaves_nothing_to_the_next(zoo, where, seed):
    """FSDP2 would go on believing that it is in that forward or backward, with the gradients of a part of it."""
    case, results = zoo["gpt2"], []
    for fails in (False, True):
        model = case.build()
        step = fl.TrainStep(model, torch.optim.AdamW, precision="32-true", loss=case.loss, techniques=["sharding"])
        if seed:
            step(case.batch(0))
        if fails:
            layer, before = model.transformer.h[1], step.loss
            if where == "before":
                step.loss = interrupt
            elif where == "forward":
                handle = layer.mlp.register_forward_hook(interrupt)
            else:
                handle = layer.register_forward_hook(lambda *given: given[-1].register_hook(interrupt) and None)
            with pytest.raises(KeyboardInterrupt):
                step(case.batch(7))
            step.loss = before
            if where != "before":
                handle.remove()
        output = step(case.batch(1))
        step.undo()
        results.append([float(output.loss), float(output.grad_norm), [p.detach().clone() for p in model.parameters()]])
    (loss, norm, plain), (other_loss, other_norm, torn) = results
    assert (loss, norm) == (other_loss, other_norm)
    assert all(map(torch.equal, plain, torn))


def test_an_older_torch_cannot_go_on_after_an_exception_in_a_backward(zoo, monkeypatch):
    from torch.distributed.fsdp import FSDPModule

    monkeypatch.delattr(FSDPModule, "reset_iter_state", raising=False)
    case = zoo["gpt2"]
    model = case.build()
    step = fl.TrainStep(model, torch.optim.AdamW, precision="32-true", loss=case.loss, techniques=["sharding"])
    good, step.loss = step.loss, interrupt
    with pytest.raises(KeyboardInterrupt):
        step(case.batch(0))
    step.loss = good
    assert bool(step(case.batch(0)).applied)
    handle = model.transformer.h[1].register_forward_hook(lambda *given: given[-1].register_hook(interrupt) and None)
    with pytest.raises(KeyboardInterrupt):
        step(case.batch(0))
    handle.remove()
    for call in (step, step.warm_up):
        with pytest.raises(ConfigError, match=r"ended an earlier update, .* not recovered.*\nhint: make model"):
            call(case.batch(0))


def test_cpu_offload_on_a_cpu_says_so(zoo):
    applied = Sharding(cpu_offload=True).apply(zoo["mlp"].build())
    assert "cpu_offload changes nothing: the model is on the CPU already" in applied.notes


def test_which_errors_mean_a_lost_rank():
    assert is_connection_fault(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:5] Connection closed by peer [::1]"))
    assert not is_connection_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
