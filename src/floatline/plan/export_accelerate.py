"""A plan as the YAML of `accelerate config`, and as the arguments of torch's `fully_shard`.

    yaml.safe_dump(accelerate_config(plan), open("accelerate.yaml", "w"))
    accelerate launch --config_file accelerate.yaml script.py

The file decides where and in which precision a script runs. What the script itself decides (how a batch is cut, the
optimizer, clipping) is in `accelerate_gaps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from floatline.plan.export_trainer import OPTIMIZERS, precision_gaps, techniques_of, trainer_gaps, whole_layers
from floatline.precision import Policy

if TYPE_CHECKING:
    from floatline.plan.plan import Plan

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def accelerate_config(plan: Plan) -> dict[str, Any]:
    """Return the contents of an accelerate config file; its number of processes is that of the plan.

    Source: accelerate 1.x, commands/config/config_args.py (`ClusterConfig`) and cluster.py.
    """
    known = techniques_of(plan)
    policy = Policy.parse(plan.precision)
    bf16 = policy.base.mixed and policy.base.arithmetic == "bf16"
    mixed = "fp16" if policy.base.loss_scaling else "bf16" if bf16 else "no"
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if "sharding" in known else "NO",
        "mixed_precision": mixed,
        "num_machines": 1,
        "num_processes": plan.ranks,
        "machine_rank": 0,
        "main_training_function": "main",
        "use_cpu": plan.hardware.kind == "cpu",
    }
    if "sharding" in known:
        config["fsdp_config"] = _accelerate_fsdp(known, plan)
    if "compile" in known:
        config["dynamo_config"] = _dynamo(known["compile"])
    return config


def _accelerate_fsdp(known: dict[str, Any], plan: Plan) -> dict[str, Any]:
    sharding = known["sharding"]
    config: dict[str, Any] = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": sharding.reshard_after_forward,
        "fsdp_offload_params": sharding.cpu_offload,
        "fsdp_activation_checkpointing": "checkpointing" in known,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_auto_wrap_policy": "NO_WRAP",
    }
    if plan.probe.layer_classes:
        config["fsdp_auto_wrap_policy"] = "TRANSFORMER_BASED_WRAP"
        config["fsdp_transformer_layer_cls_to_wrap"] = ",".join(plan.probe.layer_classes)
    return config


def _dynamo(technique: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "dynamo_backend": technique.backend.upper(),
        "dynamo_mode": technique.mode,
        "dynamo_use_fullgraph": technique.fullgraph,
        "dynamo_use_regional_compilation": technique.scope == "layers",
    }
    return config if technique.dynamic is None else {**config, "dynamo_use_dynamic": technique.dynamic}


def accelerate_gaps(plan: Plan) -> dict[str, str]:
    """Return what of a plan the script must do itself: what -> how."""
    known = techniques_of(plan)
    gaps = {key: text for key, text in trainer_gaps(plan).items() if key not in _SCRIPT and key != "precision"}
    gaps |= precision_gaps(plan)
    parts, samples = plan.estimate.micro_batches, plan.probe.samples
    if parts > 1:
        gaps["accumulation"] = (
            f"Accelerator(gradient_accumulation_steps={parts}), a DataLoader with batch_size={-(-samples // parts)}"
        )
    if plan.max_grad_norm is not None:
        gaps["max_grad_norm"] = f"call accelerator.clip_grad_norm_(model.parameters(), {plan.max_grad_norm:g})"
    if "checkpointing" in known and "sharding" not in known:
        how = "" if whole_layers(known["checkpointing"]) else "; whole layers are recomputed then"
        gaps["checkpointing"] = f"call model.gradient_checkpointing_enable({{'use_reentrant': False}}){how}"
    if "low_bit_optimizer" in known:
        bits = known["low_bit_optimizer"].bits
        gaps["low_bit_optimizer"] = f"use torchao.optim.AdamW{f'{bits}bit' if bits in OPTIMIZERS else 'Fp8'}"
    return gaps


_SCRIPT = ("checkpointing", "low_bit_optimizer", "compile")
"""Gaps of Trainer's arguments that are none here, or are told otherwise."""


def fsdp_config(plan: Plan) -> dict[str, Any]:
    """Return the settings of torch's `fully_shard` (FSDP2), as plain values; empty where the plan does not shard.

    `wrap` are the class names of the modules that are sharded one by one before the root; `mp_policy` are arguments of
    MixedPrecisionPolicy by dtype name; `offload_policy` is the class to make. The root keeps its weights gathered.

    Source: torch.distributed.fsdp, `fully_shard`.
    """
    known = techniques_of(plan)
    if "sharding" not in known:
        return {}
    sharding, base = known["sharding"], Policy.parse(plan.precision).base
    lower = base.mixed and sharding.gather == "policy"
    return {
        "wrap": list(plan.probe.layer_classes),
        "mp_policy": {
            "param_dtype": _DTYPES[base.arithmetic] if lower else None,
            "reduce_dtype": None if base.compute == "fp32" else "float32",
        },
        "reshard_after_forward": sharding.reshard_after_forward,
        "root_reshard_after_forward": False,
        "offload_policy": "CPUOffloadPolicy" if sharding.cpu_offload else "OffloadPolicy",
    }
