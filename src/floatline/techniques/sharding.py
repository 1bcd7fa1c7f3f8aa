"""Sharding by FSDP2: each rank keeps a share of every weight, gradient and optimizer state.

Of N ranks each stores 1/N of the parameters, split along their first dimension. A layer's weights are gathered from all
ranks just before its forward, freed after it, gathered again for its backward; then its gradients are summed and each
rank keeps its share. Weights, gradients and optimizer state shrink to 1/N, activations stay; the price is that every
update moves about three times the weights over the wire. Each rank trains on its own part of the data, and the update
is that of one process with all of it: the step weights every rank's loss by its number of targets.

    torchrun --nproc-per-node 8 -m floatline train recipe.yaml techniques.sharding=true

What the step's precision means for it:

| policy              | gathered in     | gradients summed in | shards, optimizer |
|---------------------|-----------------|---------------------|-------------------|
| 32-true             | fp32            | fp32                | fp32              |
| bf16-mixed          | bf16            | fp32                | fp32              |
| 16-mixed            | fp16            | fp32                | fp32              |
| bf16-true, 16-true  | their format    | fp32                | as without ranks  |

Under the `-mixed` policies that halves the traffic, and lets FSDP free a layer after its forward: autocast's own copies
of fp32 weights would stay in the graph until the backward. It also means that whatever autocast leaves in fp32 (norm
weights, the residual stream) is in half precision too. `gather="fp32"` keeps autocast's arithmetic to the letter.
Modules that a precision rule keeps in another format, and batch norms, are gathered on their own, in theirs.

One process without torchrun makes a group of one, so that a sharded run can be resumed anywhere.

Not covered: `copy.deepcopy` of a sharded model (torch refuses it); hybrid sharding; ranks whose batches run different
modules (one has images, another none), which the step refuses, for their collectives would not meet; before torch 2.13,
another update after an exception inside a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from floatline.hardware import Hardware
from floatline.hardware.legality import Verdict
from floatline.precision import Policy
from floatline.precision import resolve as resolve_precision
from floatline.precision.apply import TARGET_NAMES, match_rules
from floatline.precision.islands import DTYPES, cast_inputs
from floatline.precision.policy import RULE_FORMATS
from floatline.techniques.base import MARK, Applied, Stage, Technique
from floatline.techniques.distributed.groups import join_ranks
from floatline.techniques.distributed.ranks import RankGroup
from floatline.techniques.distributed.shards import Unit, end_units, local_bytes, plan_units
from floatline.techniques.distributed.standing_in import tell_of_masters, tell_of_shards, telling_of_gathers
from floatline.techniques.distributed.unshard import Trace
from floatline.techniques.layers import chosen_layers
from floatline.techniques.placement import on_host, stands_in

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, kw_only=True)
class Sharding(Technique):
    """Shard parameters, gradients and optimizer state over all ranks.

    Args:
        layers: Patterns of the modules that are gathered one by one; none takes the model's repeated layers.
        reshard_after_forward: Free a layer after its forward and gather it again for the backward; False keeps it,
            which saves a third of the traffic and costs the memory of the gathered weights.
        gather: Format that weights are gathered in: "policy" as the step's precision computes, "fp32" as they are
            stored.
        cpu_offload: Keep shards, gradients and optimizer state in host memory; the update is made there.

    Raises:
        ConfigError: A setting of the wrong type; when applied, a pattern of `layers` that matches nothing.
    """

    name = "sharding"
    stage = Stage.SHARD
    conflicts: ClassVar[Mapping[str, str]] = {
        "optimizer_in_backward": "ranks must agree that an update is good before any of them makes it; "
        "sharding alone divides gradients and optimizer state by the number of ranks"
    }

    layers: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    gather: Literal["policy", "fp32"] = "policy"
    cpu_offload: bool = False

    def supports(self, hardware: Hardware, model: nn.Module) -> Verdict:
        scalars = [name for name, p in model.named_parameters() if p.dim() == 0 and p.requires_grad]
        if scalars:
            return Verdict(
                False, f"{scalars[0]} has no dimension to split; make it a tensor of shape (1,), or freeze it"
            )
        return Verdict(True, "process groups run on CPU (gloo) and CUDA (NCCL)")

    def _apply(self, model: nn.Module, hardware: Hardware) -> Applied:
        asked: Any = getattr(model, MARK, {}).get("precision")
        policy = resolve_precision(asked.policy, hardware).policy if asked else Policy("32-true")
        return self._apply_in(policy, model, hardware)

    def _apply_in(self, policy: Policy, model: nn.Module, hardware: Hardware) -> Applied:
        device_type = next((p.device.type for p in model.parameters()), "cpu")
        ranks = join_ranks(device_type)
        layers = chosen_layers(model, self.layers, setting="sharding.layers")
        islands = _islands(model, policy)
        units, notes = plan_units(model, layers, {name: dict(model.named_modules())[name] for name in islands})
        units += [] if self.layers else end_units(model, units)
        plans = stands_in(model, hardware)
        if self.cpu_offload and device_type == "cpu" and not plans:
            notes.append("cpu_offload changes nothing: the model is on the CPU already")
        notes += _batch_norm_note(model, ranks)
        formats = _Formats(policy, islands, self.gather)
        touched = tuple(name for unit in units for name in unit.modules)
        undo = _shard(self, model, units, formats, device_type)
        told: dict[str, Any] = {"during": telling_of_gathers} if plans else {}
        if plans and self.cpu_offload:
            tell_of_shards(model)
            told |= {"optimizer": tell_of_masters, "update": on_host}
        return Applied(
            technique=self,
            touched=(*touched, ""),
            undo=undo,
            notes=(f"{ranks.size} rank{'s' * (ranks.size > 1)}, {len(units) + 1} units, {formats}", *notes),
            ranks=ranks,
            **told,
            facts=lambda: {"ranks": ranks.size, "units": len(units) + 1, "local_parameter_bytes": local_bytes(model)},
        )


def _islands(model: nn.Module, policy: Policy) -> dict[str, torch.dtype]:
    """Return the modules whose weights have another format than the policy's, by name: of rules, and batch norms."""
    if policy.base.compute == "fp32":
        return {}
    islands = {name: DTYPES[RULE_FORMATS[rule]] for name, rule in match_rules(model, policy).items() if rule != "fp8"}
    norms = {name: torch.float32 for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)}
    return {**norms, **islands}


def _batch_norm_note(model: nn.Module, ranks: RankGroup) -> list[str]:
    norms = [name for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)]
    if not norms or ranks.size == 1:
        return []
    return [
        f"batch norm ({norms[0]}{', ...' if norms[1:] else ''}) sees each rank's own batch; rank 0's statistics count"
    ]


class _Formats:
    """In which format each unit is gathered."""

    def __init__(self, policy: Policy, islands: dict[str, torch.dtype], gather: str) -> None:
        self.policy = policy
        self.islands = islands
        lower = policy.base.mixed and gather == "policy"
        self.compute = DTYPES[policy.base.arithmetic] if lower else None

    def of(self, name: str) -> torch.dtype | None:
        """Return the format that the unit of this name is gathered in, None for the one its weights have."""
        if self.compute is None:
            return None
        rules = [island for island in self.islands if name == island or name.startswith(f"{island}.")]
        dtype = self.islands[max(rules, key=len)] if rules else self.compute
        return None if dtype is torch.float32 else dtype

    def mixed_precision(self, unit: Unit) -> Any:
        """Return torch's MixedPrecisionPolicy of a unit."""
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.policy.base.compute == "fp32":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(
            param_dtype=self.of(next(iter(unit.modules))),
            reduce_dtype=torch.float32,
            output_dtype=self.compute if unit.island and unit.inside else None,  # the layer around goes on in its own
            cast_forward_inputs=not (unit.island or unit.end),
        )

    def __str__(self) -> str:
        if self.policy.base.compute == "fp32":
            return "all in fp32"
        weights = self.policy.base.weights if self.compute is None else self.policy.base.arithmetic
        return f"weights gathered in {weights}, gradients summed in fp32"


def _shard(
    technique: Sharding, model: nn.Module, units: list[Unit], formats: _Formats, device_type: str
) -> Callable[[], None]:
    """Call `fully_shard` on every unit and the root; returns the undo."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    trace = Trace(model)
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    common: dict[str, Any] = {
        "mesh": _mesh(device_type),
        "offload_policy": CPUOffloadPolicy() if technique.cpu_offload and device_type != "cpu" else OffloadPolicy(),
        "ignored_params": scalars,
    }
    try:
        for unit in units:
            modules = list(unit.modules.values())
            lookup = _needs_no_values(unit, model)  # asked before the modules' classes change
            fully_shard(
                modules if len(modules) > 1 else modules[0],
                mp_policy=formats.mixed_precision(unit),
                reshard_after_forward=technique.reshard_after_forward and len(modules) == 1 and not unit.stays,
                **common,
            )
            if lookup:
                modules[0].set_unshard_in_backward(False)  # type: ignore[operator]
        root = (
            MixedPrecisionPolicy()
            if formats.policy.base.compute == "fp32"
            else MixedPrecisionPolicy(
                param_dtype=formats.compute, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        )
        fully_shard(model, mp_policy=root, reshard_after_forward=False, **common)
    except BaseException:
        trace.undo()
        raise
    trace.free_originals()
    if formats.compute is None:
        return trace.undo
    patch = cast_inputs(model, formats.compute, TARGET_NAMES)  # as FSDP would, but for targets

    def undo() -> None:
        patch.undo()
        trace.undo()

    return undo


def _needs_no_values(unit: Unit, model: nn.Module) -> bool:
    """Say whether the backward of a unit does without its weights: that of a lookup, unless it is recomputed."""
    recomputed: Any = getattr(model, MARK, {}).get("checkpointing")
    if not unit.end or unit.stays or (recomputed is not None and recomputed.layers):
        return False
    return all(type(module) is nn.Embedding for module in unit.modules.values())


def _mesh(device_type: str) -> Any:
    """Return the mesh of all ranks; it reads its own tensors, so they are real ones when planning on fake tensors."""
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.distributed.device_mesh import init_device_mesh

    with unset_fake_temporarily():
        return init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("shard",))
