"""Put a policy on a model, and take it off again.

Four things can happen to the model: its weights are cast (`-true`), modules named by rules become islands, the forward
of the whole model casts its floating inputs (`-true`), and linear layers multiply in fp8 (float8.py). Autocast is not
on the model but around the step, so it is handed out as a context (`AppliedPrecision.autocast`).

Under `-true` floating buffers are cast like weights, with two exceptions: batch-norm keeps its weights and statistics
in fp32 (running averages with momentum 0.1 stall in 8 bits), and rotary `inv_freq` tables stay fp32 (positions past
256 are not exact in bf16). Undo restores formats, not bits: a weight that was cast down has lost its low bits.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from floatline.errors import FloatlineWarning, PrecisionError
from floatline.hardware import Hardware, detect, fp8_emulated
from floatline.hardware import resolve as resolve_hardware
from floatline.patch import ForwardPatch
from floatline.precision.float8 import Float8Layer, convert
from floatline.precision.float8_layers import choose_linears, rule_over
from floatline.precision.islands import DTYPES, cast_inputs, make_island
from floatline.precision.policy import RULE_FORMATS, Policy
from floatline.precision.rules import match_rules

TARGET_NAMES = frozenset({"labels", "label", "target", "targets"})
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass
class AppliedPrecision:
    """What was done to a model; `undo()` takes it back.

    Attributes:
        policy: The policy that was applied.
        touched: Dotted names of the modules that rules made islands, with their format ("32", "bf16", "16"), and of
            the linear layers that compute in fp8 ("fp8").
        kept: Dotted names of the linear layers that an fp8 policy leaves in bf16 or fp32, each with the reason.
        notes: What was chosen automatically, for a user to read.
    """

    policy: Policy
    device_type: str
    touched: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _patches: list[ForwardPatch] = field(default_factory=list)
    _formats: list[tuple[torch.Tensor, torch.dtype]] = field(default_factory=list)
    _float8: dict[str, Float8Layer] = field(default_factory=dict)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context that forward and loss run in."""
        if not self.policy.base.mixed:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.policy.base.arithmetic])

    def undo(self) -> None:
        """Remove islands and casts and restore every tensor's dtype."""
        for patch in reversed(self._patches):
            patch.undo()
        for layer in self._float8.values():
            layer.undo()
        for tensor, dtype in self._formats:
            tensor.data = tensor.data.to(dtype)
        self._patches.clear()
        self._formats.clear()
        self._float8.clear()
        self.touched.clear()
        self.kept.clear()

    def _cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        if tensor.is_floating_point() and tensor.dtype != dtype:
            self._formats.append((tensor, tensor.dtype))
            tensor.data = tensor.data.to(dtype)  # in place: the optimizer's references stay valid
            if tensor.grad is not None:
                tensor.grad = None


def apply_precision(model: nn.Module, policy: Policy, hardware: Hardware | None = None) -> AppliedPrecision:
    """Apply `policy` to `model` in place.

    Args:
        model: Any module. Trainable weights must be fp32 for a `-mixed` policy.
        policy: What to apply; legality on the device is checked elsewhere (choose.resolve).
        hardware: Whose fp8 units count; None is what the model is on.

    Returns:
        A handle with the touched modules, the autocast context and `undo()`.

    Raises:
        PrecisionError: A rule matches nothing or a mere container, two rules contradict on a module or on a shared
            weight; half-precision weights under a `-mixed` policy that are trainable or in an fp32 island; a rule
            that forces a layer into fp8 whose dims are no multiples of 16.
    """
    targets = match_rules(model, policy)
    _refuse_half_weights(model, policy, targets)
    applied = AppliedPrecision(policy, _device_type(model))
    if not policy.base.mixed:
        formats = _weight_formats(model, policy, targets)
        _refuse_split_ties(model, formats)
        _cast_weights(applied, model, formats)
    if policy.base.compute == "fp8":
        _convert_linears(applied, model, targets, hardware)
    _patch_forwards(applied, model, targets)
    return applied


def extend_precision(applied: AppliedPrecision, model: nn.Module, rule: str) -> Policy:
    """Add one rule to a policy that is on a model already; returns the policy with it.

    Args:
        applied: What `apply_precision` returned.
        model: The model.
        rule: "path=32".

    Raises:
        PrecisionError: The weights themselves are cast, so the module's would have to change under the optimizer; or
            the rule matches nothing or what is an island already.
    """
    policy = applied.policy
    if not policy.base.mixed:
        raise PrecisionError(
            f"{rule} cannot be added to {policy.name} while it trains: the weights themselves are in that format",
            hint=f"start anew with precision='{policy}; {rule}'",
        )
    longer = Policy.parse(f"{policy}; {rule}")
    islands = {name: kind for name, kind in applied.touched.items() if kind != "fp8"}
    targets = match_rules(model, longer)
    fresh = {name: fmt for name, fmt in targets.items() if name not in islands and fmt != "fp8"}
    if not fresh:
        raise PrecisionError(f"{rule}: the module is an island already")
    _refuse_half_weights(model, longer, fresh)
    _take_out(applied, targets)
    _patch_forwards(applied, model, fresh)
    applied.policy = longer
    return longer


def _refuse_half_weights(model: nn.Module, policy: Policy, targets: dict[str, str]) -> None:
    """Under autocast trainable weights, and all weights of fp32 islands, must be fp32."""
    if not policy.base.mixed:
        return
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            continue
        if parameter.requires_grad:
            half = "16-true" if parameter.dtype == torch.float16 else "bf16-true"
            why = (
                "GradScaler cannot unscale fp16 gradients"
                if policy.base.loss_scaling
                else "autocast needs fp32 weights, or small updates are lost to rounding"
            )
            raise PrecisionError(
                f"{policy.name} with trainable {parameter.dtype} weights ({name}): {why}",
                hint=f"load the model in fp32 (model.dtype=fp32), or use precision={half}",
            )
        island = next((path for path, fmt in targets.items() if fmt == "32" and name.startswith(f"{path}.")), None)
        if island is not None:
            raise PrecisionError(
                f"{island}=32 holds {parameter.dtype} weights ({name}), which an fp32 island cannot multiply",
                hint="load the model in fp32 (model.dtype=fp32), or drop the rule",
            )


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def _weight_formats(model: nn.Module, policy: Policy, targets: dict[str, str]) -> dict[str, torch.dtype]:
    """Return the dtype of each module's own tensors: of the nearest rule above it, else the policy's.

    fp32 weights stay fp32 whatever the rules say: lower islands among them compute by autocast.
    """
    formats: dict[str, torch.dtype] = {}
    rules = targets if policy.base.weights != "fp32" else {}
    for name, _ in model.named_modules():
        own = DTYPES[RULE_FORMATS[rules[name]]] if name in rules else None
        parent = formats.get(name.rpartition(".")[0]) if name else None
        formats[name] = own or parent or DTYPES[policy.base.weights]
    return formats


def _refuse_split_ties(model: nn.Module, formats: dict[str, torch.dtype]) -> None:
    """One tensor cannot have two formats: modules that share a weight must agree."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            first = owner.setdefault(id(parameter), name)
            if formats[first] != formats[name]:
                raise PrecisionError(
                    f"{first} and {name} share a weight, but the rules give them {formats[first]} and {formats[name]}",
                    hint=f"give both the same format with a rule for {first} and one for {name}",
                )


def _cast_weights(applied: AppliedPrecision, model: nn.Module, formats: dict[str, torch.dtype]) -> None:
    seen: set[int] = set()
    for name, module in model.named_modules():
        dtype = torch.float32 if isinstance(module, _BATCH_NORMS) else formats[name]
        for tensor_name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) not in seen and not tensor_name.endswith("inv_freq"):
                seen.add(id(tensor))
                applied._cast(tensor, dtype)


def _convert_linears(
    applied: AppliedPrecision, model: nn.Module, targets: dict[str, str], hardware: Hardware | None
) -> None:
    """Make the linear layers of an fp8 policy multiply in fp8."""
    device_type, scaling = applied.device_type, applied.policy.base.scaling
    if hardware is None:
        hardware = detect() if device_type == "cuda" else resolve_hardware("cpu")
    choice = choose_linears(model, applied.policy, targets)
    why = fp8_emulated(hardware)
    applied._float8 = convert(choice.chosen, scaling, emulate=bool(why), device_type=device_type)
    applied.touched |= dict.fromkeys(choice.chosen, "fp8")
    applied.kept |= choice.kept
    applied.notes = (f"{choice}; {scaling} scales", *([f"fp8 products are emulated: {why}"] if why else []))
    if not choice.chosen:
        warnings.warn(
            f"{applied.policy} computes nothing in fp8, so it is bf16-mixed: {choice}. To take layers in all the same, "
            "name them: model.layers.*=fp8",
            FloatlineWarning,
            stacklevel=3,
        )


def _take_out(applied: AppliedPrecision, targets: dict[str, str]) -> None:
    """Give the layers back to bf16 or fp32 that a new rule keeps high."""
    for name in list(applied._float8):
        rule = rule_over(name, targets)
        if rule and targets[rule] != "fp8":
            applied._float8.pop(name).undo()
            del applied.touched[name]
            applied.kept[name] = f"rule: {rule}={targets[rule]}"


def _patch_forwards(applied: AppliedPrecision, model: nn.Module, targets: dict[str, str]) -> None:
    base = applied.policy.base
    whole = None if base.mixed else DTYPES[base.compute]
    modules = dict(model.named_modules())
    for name, number_format in targets.items():
        if number_format == "fp8":
            continue
        dtype = DTYPES[RULE_FORMATS[number_format]]
        lower = dtype is not torch.float32 and base.weights == "fp32"
        outer = _around(name, targets, whole)
        patch = make_island(modules[name], dtype, device_type=applied.device_type, outer=outer, by_autocast=lower)
        applied._patches.append(patch)
        applied.touched[name] = number_format
    if whole not in (None, torch.float32):
        applied._patches.append(cast_inputs(model, whole, TARGET_NAMES))


def _around(name: str, targets: dict[str, str], whole: torch.dtype | None) -> torch.dtype | None:
    """Return the format that an island's results are cast to: that of the island around it, else the model's.

    None leaves them as they are, for autocast is on there.
    """
    around = name.rpartition(".")[0]
    while around and targets.get(around, "fp8") == "fp8":
        around = around.rpartition(".")[0]
    if not around:
        return whole
    dtype = DTYPES[RULE_FORMATS[targets[around]]]
    return dtype if whole is not None or dtype is torch.float32 else None
