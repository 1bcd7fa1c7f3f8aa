"""A plan as `transformers.TrainingArguments`, and what of it they cannot say, with what to do instead.

    arguments = trainer_arguments(plan)
    TrainingArguments(output_dir="out", **arguments)
    for name, instead in trainer_gaps(plan).items(): ...

The names are those of transformers 5. The same settings need not take the same memory: Trainer is another program, and
the plan's peak is that of Floatline's own step.

Not covered: learning rate and schedule, which a plan does not decide; DeepSpeed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from floatline.precision import Policy
from floatline.techniques import make_technique

if TYPE_CHECKING:
    from floatline.plan.plan import Plan

OPTIMIZERS = {8: "adamw_torch_8bit", 4: "adamw_torch_4bit"}
"""Bits of optimizer state -> transformers' name of torchao's AdamW with that."""
KERNELS = {"flash-attn-2": "flash_attention_2", "flash-attn-3": "flash_attention_3", "flex": "flex_attention"}


def techniques_of(plan: Plan) -> dict[str, Any]:
    """Return a plan's techniques by name."""
    return {technique.name: technique for technique in map(make_technique, plan.techniques)}


def whole_layers(technique: Any) -> bool:
    """Say whether checkpointing recomputes all layers whole, which is all that others can."""
    return not (technique.keep or technique.layers or technique.budget is not None) and technique.every == 1


def trainer_arguments(plan: Plan) -> dict[str, Any]:
    """Return the keyword arguments of `transformers.TrainingArguments` that a plan decides.

    Source: transformers 5, training_args.py.
    """
    known = techniques_of(plan)
    policy = Policy.parse(plan.precision)
    parts = plan.estimate.micro_batches
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": -(-plan.probe.samples // parts),
        "gradient_accumulation_steps": parts,
        "bf16": policy.base.mixed and policy.base.arithmetic == "bf16",
        "fp16": policy.base.loss_scaling,
        "max_grad_norm": plan.max_grad_norm or 0.0,  # 0 is Trainer's "do not clip"
    }
    if plan.probe.adam:
        arguments["optim"] = "adamw_torch_fused"
    for name, add in _ADDERS.items():
        if name in known:
            arguments |= add(known[name], plan, known)
    return arguments


def _low_bit(technique: Any, plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    if technique.bits not in OPTIMIZERS:
        return {}
    if technique.library == "bitsandbytes":
        return {"optim": "adamw_bnb_8bit"}
    rounding = {"optim_args": "bf16_stochastic_round=True"} if technique.stochastic_rounding else {}
    return {"optim": OPTIMIZERS[technique.bits], **rounding}


def _checkpointing(technique: Any, plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    if "sharding" in known:  # there it is FSDP's own, in fsdp_config
        return {}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


def _compile(technique: Any, plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    mode = {} if technique.mode == "default" else {"torch_compile_mode": technique.mode}
    return {"torch_compile": True, "torch_compile_backend": technique.backend, **mode}


def _batching(technique: Any, plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    return {"train_sampling_strategy": "group_by_length"}


def _sharding(technique: Any, plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "version": 2,
        "reshard_after_forward": technique.reshard_after_forward,
        "cpu_offload": technique.cpu_offload,
        "activation_checkpointing": "checkpointing" in known,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    if plan.probe.layer_classes:
        config |= {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": list(plan.probe.layer_classes),
        }
    return {"fsdp": True, "fsdp_config": config}


_ADDERS = {
    "low_bit_optimizer": _low_bit,
    "checkpointing": _checkpointing,
    "compile": _compile,
    "batching": _batching,
    "sharding": _sharding,
}


def trainer_gaps(plan: Plan) -> dict[str, str]:
    """Return what of a plan TrainingArguments cannot say: technique or "precision" -> what to do instead."""
    gaps = precision_gaps(plan)
    for name, technique in techniques_of(plan).items():
        instead = _instead(name, technique)
        if instead:
            gaps[name] = instead
    if plan.probe.adam is False:
        gaps["optimizer"] = f"pass optimizers=(an instance of {plan.probe.optimizer}, None) to Trainer"
    return gaps


def precision_gaps(plan: Plan) -> dict[str, str]:
    """Return what a flag for mixed precision cannot say of the plan's policy."""
    policy = Policy.parse(plan.precision)
    said = []
    if policy.name == "bf16-true":
        said.append("load the model with dtype=torch.bfloat16; no flag is set")
    if policy.base.master_weights:
        said.append("fp16 weights with fp32 masters are not there: load the model in fp32, fp16 computes the same")
    if policy.base.compute == "fp8":
        said.append(
            "no flag makes the same layers fp8: call torchao.float8.convert_to_float8_training(model, "
            f"module_filter_fn=..., config=Float8LinearConfig.from_recipe_name({policy.base.scaling!r})) before Trainer"
        )
    islands = [rule for rule in policy.rules if policy.base.compute != "fp8" or rule.format == "32"]
    said += [f"run {rule.pattern} under torch.autocast(enabled=False, ...) for {rule}" for rule in islands]
    return {"precision": "; ".join(said)} if said else {}


def _instead(name: str, technique: Any) -> str:
    if name == "checkpointing":
        return "" if whole_layers(technique) else "whole layers are recomputed: less memory, more time"
    if name == "low_bit_optimizer":
        return _instead_of_bits(technique)
    if name == "compile":
        return "" if technique.scope == "model" else "the whole model is compiled, which takes longer to start"
    if name == "batching":
        return "" if technique.max_tokens is None else f"no budget of {technique.max_tokens} tokens: cut by rows"
    if name == "attention":
        return f"load the model with attn_implementation={KERNELS.get(technique.kernel, 'sdpa')!r}"
    return _INSTEAD.get(name, "")


def _instead_of_bits(technique: Any) -> str:
    if technique.bits not in OPTIMIZERS:
        return "fp8 state is not there: optim='adamw_torch_8bit' takes as much memory"
    size = technique.block_size or {8: 256, 4: 128}[technique.bits]
    return "" if size == 256 or technique.library == "bitsandbytes" else f"blocks are of 256 values, not {size}"


_INSTEAD = {
    "chunked_loss": "use_liger_kernel=True, where Liger is installed and knows the model",
    "offload": "run trainer.train() inside torch.autograd.graph.save_on_cpu(pin_memory=True)",
    "optimizer_offload": "optim='paged_adamw_32bit' pages state out on demand (bitsandbytes)",
    "optimizer_in_backward": "leave it out, or optim='adalomo', which is another optimizer (lomo-optim)",
    "master_weights": "load the model in fp32 with bf16=True: fp32 weights and bf16 arithmetic (bf16-mixed)",
    "kahan": "pass optimizers=(optimi.AdamW(..., kahan_sum=True), None) to Trainer (torch-optimi)",
    "stochastic_rounding": "optim='adamw_torch_8bit' with optim_args='bf16_stochastic_round=True' rounds so too",
    "packing": "data_collator=DataCollatorWithFlattening(), with attn_implementation='flash_attention_2'",
    "freezing": "call requires_grad_(False) on those modules before Trainer gets the model",
    "lora": "wrap the model with peft.get_peft_model(model, LoraConfig(...)) of the same rank and targets",
}
