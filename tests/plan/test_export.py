"""A plan as other programs' settings: they accept them, and what they cannot say is told."""

from dataclasses import fields, replace

import pytest
import torch
import yaml
from torch import nn

import floatline as fl
from floatline.plan.export import accelerate_config, fsdp_config, not_expressible, recipe_of, trainer_arguments
from floatline.techniques import HOMES, fake_ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).relu()


def work(rows=8):
    model = lambda: nn.Sequential(nn.Linear(8, 8), nn.ModuleList([Block(), Block()])[0], Block(), nn.Linear(8, 1))  # noqa: E731
    return fl.Workload(
        model=model,
        batch=lambda: (torch.ones(rows, 8),),
        loss=lambda model, batch: model(*batch).square().mean(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True),
    )


@pytest.fixture(scope="module")
def plain():
    return fl.plan(work(), hardware="a100", precision="bf16-mixed")


@pytest.fixture(scope="module")
def sharded():
    with fake_ranks(4):
        return fl.plan(work(), hardware="a100", precision="bf16-mixed", techniques=["sharding"])


@pytest.fixture
def accepted(tmp_path):
    """Makes the TrainingArguments that a plan says; a flag that this machine's CPU refuses is left out."""
    transformers = pytest.importorskip("transformers")

    def make(arguments):
        given = {**arguments, "use_cpu": True}
        if given.get("fp16"):
            given["fp16"] = False  # needs a GPU
        return transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], **given)

    return make


def with_techniques(plan, *texts, **changes):
    return replace(plan, techniques=texts, **changes)


def test_a_plain_plan(plain, accepted):
    arguments = trainer_arguments(plain)
    assert arguments == {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "bf16": True,
        "fp16": False,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
    }
    made = accepted(arguments)
    assert made.per_device_train_batch_size == 8 and made.optim == "adamw_torch_fused"
    assert not_expressible(plain)["trainer"] == {} and fsdp_config(plain) == {}
    assert recipe_of(plain)["precision"] == "bf16-mixed"


def test_accumulation_is_in_both_numbers():
    cut = fl.plan(work(), hardware="a100", techniques=["accumulation(micro_batches=4)"], max_grad_norm=None)
    arguments = trainer_arguments(cut)
    assert arguments["per_device_train_batch_size"] == 2 and arguments["gradient_accumulation_steps"] == 4
    assert arguments["max_grad_norm"] == 0.0
    gaps = not_expressible(cut)["accelerate"]
    assert gaps == {"accumulation": "Accelerator(gradient_accumulation_steps=4), a DataLoader with batch_size=2"}


def test_a_batch_that_is_a_list_keeps_its_cut():
    given = fl.Workload(
        model=work().model,
        batch=lambda: [(torch.ones(3, 8),), (torch.ones(3, 8),)],
        loss=work().loss,
        optimizer=work().optimizer,
    )
    arguments = trainer_arguments(fl.plan(given, hardware="a100"))
    assert arguments["per_device_train_batch_size"] == 3 and arguments["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("checkpointing", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ("low_bit_optimizer", {"optim": "adamw_torch_8bit"}),
        ("low_bit_optimizer(bits=4)", {"optim": "adamw_torch_4bit"}),
        ("low_bit_optimizer(library='bitsandbytes')", {"optim": "adamw_bnb_8bit"}),
        (
            "low_bit_optimizer(stochastic_rounding=True)",
            {"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"},
        ),
        ("compile", {"torch_compile": True, "torch_compile_backend": "inductor"}),
        ("compile(mode='max-autotune')", {"torch_compile": True, "torch_compile_mode": "max-autotune"}),
        ("batching", {"train_sampling_strategy": "group_by_length"}),
    ],
)
def test_techniques_that_trainer_has(plain, accepted, monkeypatch, text, expected):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "")  # TrainingArguments sets them for good
    arguments = trainer_arguments(with_techniques(plain, text))
    assert expected.items() <= arguments.items()
    made = accepted(arguments)
    assert all(getattr(made, key) == value for key, value in expected.items())


def test_optimizer_names_are_known_to_transformers(plain):
    names = {o.value for o in pytest.importorskip("transformers.training_args").OptimizerNames}
    texts = ["low_bit_optimizer", "low_bit_optimizer(bits=4)", "low_bit_optimizer(library='bitsandbytes')", "lora"]
    assert {trainer_arguments(with_techniques(plain, text))["optim"] for text in texts} <= names
    told = " ".join(gap for text in HOMES if text not in ("precision", "freezing")
                    for gap in not_expressible(with_techniques(plain, text))["trainer"].values())  # fmt: skip
    named = {part.split("'")[1] for part in told.split("optim=")[1:]}
    assert named and named <= names


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("checkpointing(keep='matmul')", "whole layers are recomputed: less memory, more time"),
        ("low_bit_optimizer(bits='fp8')", "fp8 state is not there"),
        ("low_bit_optimizer(bits=4)", "blocks are of 256 values, not 128"),
        ("attention(kernel='flash-attn-2')", "attn_implementation='flash_attention_2'"),
        ("attention", "attn_implementation='sdpa'"),
        ("batching(max_tokens=64)", "no budget of 64 tokens"),
        ("freezing(modules=['a'])", "requires_grad_(False)"),
        ("lora", "peft.get_peft_model"),
        ("kahan", "kahan_sum=True"),
        ("offload", "save_on_cpu(pin_memory=True)"),
    ],
)
def test_what_trainer_cannot_say(plain, text, instead):
    gaps = not_expressible(with_techniques(plain, text))["trainer"]
    assert instead in gaps[text.split("(")[0]]


def test_every_technique_is_an_argument_or_a_gap(plain):
    bottom = trainer_arguments(plain)
    for name in HOMES:
        text = "freezing(modules=['a'])" if name == "freezing" else name
        plan = with_techniques(plain, text)
        if name not in ("precision", "accumulation"):  # these are in precision and in the batch's numbers
            assert trainer_arguments(plan) != bottom or not_expressible(plan)["trainer"], name


@pytest.mark.parametrize(
    ("precision", "flags", "told"),
    [
        ("32-true", (False, False), None),
        ("16-mixed", (False, True), None),
        ("bf16-true", (False, False), "dtype=torch.bfloat16"),
        ("16-true", (False, True), "load the model in fp32"),
        ("bf16-mixed; a.b=32", (True, False), "run a.b under torch.autocast(enabled=False"),
    ],
)
def test_precision(plain, precision, flags, told):
    plan = replace(plain, precision=precision)
    arguments = trainer_arguments(plan)
    assert (arguments["bf16"], arguments["fp16"]) == flags
    gaps = not_expressible(plan)
    for program in ("trainer", "accelerate"):
        assert ("precision" in gaps[program]) == (told is not None) and (not told or told in gaps[program]["precision"])
    mixed = {(True, False): "bf16", (False, True): "fp16", (False, False): "no"}[flags]
    assert accelerate_config(plan)["mixed_precision"] == mixed


def test_shards(sharded, accepted):
    plan = replace(sharded, techniques=("sharding(reshard_after_forward=False)", "checkpointing"))
    assert plan.ranks == 4 and plan.probe.layer_classes == ("Block",)
    arguments = trainer_arguments(plan)
    assert arguments["fsdp"] is True and "gradient_checkpointing" not in arguments
    made = accepted(arguments)
    assert made.fsdp_plugin_args["fsdp_version"] == 2 and made.fsdp_plugin_args["activation_checkpointing"]
    assert made.fsdp_plugin_args["reshard_after_forward"] is False
    assert made.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "Block"


def test_the_accelerate_file_loads(sharded, plain, tmp_path):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    plans = [plain, sharded, with_techniques(sharded, "sharding(cpu_offload=True)", "compile(dynamic=True)")]
    for plan in plans:
        config = accelerate_config(plan)
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump(config))
        assert yaml.safe_load(path.read_text()) == config
        loaded = config_args.load_config_from_file(str(path))
        assert loaded.mixed_precision == "bf16" and loaded.num_processes == plan.ranks
        assert loaded.distributed_type.value == ("NO" if plan is plain else "FSDP")
    assert loaded.fsdp_config["fsdp_offload_params"] is True and loaded.dynamo_config["dynamo_use_dynamic"] is True


def test_accelerate_launch_knows_the_keys(sharded):
    launch = pytest.importorskip("accelerate.commands.launch")
    known = set(vars(launch.launch_command_parser().parse_args(["script.py"])))
    config = accelerate_config(with_techniques(sharded, "sharding", "compile(dynamic=True)"))
    assert set(config["fsdp_config"]) | set(config["dynamo_config"]) <= known


def test_fully_shard_takes_the_settings(sharded):
    from torch.distributed import fsdp

    plan = with_techniques(sharded, "sharding(cpu_offload=True)")
    settings = fsdp_config(plan)
    assert settings["wrap"] == ["Block"] and settings["reshard_after_forward"] is True
    dtypes = {key: name and getattr(torch, name) for key, name in settings["mp_policy"].items()}
    policy = fsdp.MixedPrecisionPolicy(**dtypes)
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert isinstance(getattr(fsdp, settings["offload_policy"])(), fsdp.CPUOffloadPolicy)
    stored = fsdp_config(with_techniques(sharded, "sharding(gather='fp32')"))["mp_policy"]
    assert stored == {"param_dtype": None, "reduce_dtype": "float32"}
    assert fsdp_config(replace(sharded, precision="32-true"))["mp_policy"] == {
        "param_dtype": None,
        "reduce_dtype": None,
    }


def test_what_an_accelerate_script_does_itself(plain):
    plan = with_techniques(plain, "checkpointing(keep='matmul')", "low_bit_optimizer", "compile", "chunked_loss")
    gaps = not_expressible(plan)["accelerate"]
    assert gaps["max_grad_norm"] == "call accelerator.clip_grad_norm_(model.parameters(), 1)"
    assert gaps["checkpointing"].endswith("{'use_reentrant': False}); whole layers are recomputed then")
    assert gaps["low_bit_optimizer"] == "use torchao.optim.AdamW8bit"
    assert "compile" not in gaps and "Liger" in gaps["chunked_loss"]


def test_another_optimizer_is_passed_by_hand():
    given = fl.Workload(
        model=work().model, batch=work().batch, loss=work().loss, optimizer=lambda p: torch.optim.SGD(p)
    )
    plan = fl.plan(given, hardware="a100")
    assert "optim" not in trainer_arguments(plan)
    assert "an instance of SGD" in not_expressible(plan)["trainer"]["optimizer"]


def test_every_argument_is_one_of_trainings(plain, sharded):
    known = {f.name for f in fields(pytest.importorskip("transformers").TrainingArguments)}
    for name in ("checkpointing", "low_bit_optimizer", "compile", "batching", "sharding"):
        assert set(trainer_arguments(with_techniques(sharded, name))) <= known
