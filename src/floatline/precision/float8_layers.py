"""Which linear layers an fp8 policy computes in fp8, and why the others stay in bf16.

fp8-e4m3 has 3 stored bits of mantissa: one rounding is off by up to 6 %. Errors of many products average out, but some
places do not forgive them, and small layers get no quicker. So these are kept high, each with its reason:

    output head, last linear      errors go straight into the loss
    first linear                  errors reach everything after it
    tied to an embedding          the same, at both ends
    router                        rounding changes which experts are chosen
    small layer                   no gain was measured (limits below)
    adapter                       small, and all that learns
    odd dims                      fp8 units take inputs and outputs in multiples of 16
    not convertible               another class than nn.Linear, or weights that are not plain parameters

A rule decides before all of these: `path=bf16` or `path=32` keeps a linear high, `path=fp8` takes it in, whatever it
is; odd dims are an error then. What cannot be converted stays, and so do adapters inside of what such a rule names. The
nearest rule at or above a linear counts.

First and last go by the order in which modules were defined, for a policy is put on a model that has not run yet; where
a model calls them in another order, say so by rules. Not covered: weights that are read without calling their layer
outside of `nn.MultiheadAttention` (Mamba's kernels), experts that are no nn.Linear.

Source: kept layers as in DeepSeek-V3 (arXiv:2412.19437, section 3.3.1) and torchao's float8 training; limits of size
are torchao's filters by recipe, from its tables of measured speed on H100 (`torchao.float8.float8_linear_utils`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from floatline.errors import PrecisionError
from floatline.precision.policy import Policy

MULTIPLE = 16
"""torch._scaled_mm takes inner and outer dims of weights in multiples of 16."""
TRANSPOSED = "not convertible: a Conv1D of transformers, which torchao does not convert"
ROUTERS = frozenset({"gate", "router", "gating", "shared_expert_gate"})
"""Last names of routers. `gate_proj`, half of a SwiGLU, is none."""


@dataclass(frozen=True, kw_only=True)
class LinearChoice:
    """The linear layers of a model, parted.

    Attributes:
        chosen: Those that compute in fp8, by dotted name.
        kept: Dotted name -> why it stays in bf16 (or fp32), as "kind: reason".
    """

    chosen: dict[str, nn.Linear] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(reason.partition(":")[0] for reason in self.kept.values())
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        told = f"{len(self.chosen)} of {len(self.chosen) + len(self.kept)} linear layers compute in fp8"
        return f"{told}; kept high: {kinds}" if kinds else told


def choose_linears(model: nn.Module, policy: Policy, rules: dict[str, str]) -> LinearChoice:
    """Part the linear layers of `model` under an fp8 policy.

    Args:
        model: Any module, on any device.
        policy: One whose base computes in fp8.
        rules: Dotted module name -> format, as `match_rules` gives them.

    Raises:
        PrecisionError: A rule forces a layer in whose dims fp8 cannot multiply, or names no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, nn.Linear)}
    _refuse_empty_rules(linears, rules)
    reasons = _Reasons(model, linears, policy.base.scaling)
    choice = LinearChoice(kept=dict.fromkeys(_transposed(model), TRANSPOSED))
    for name, linear in linears.items():
        rule = rule_over(name, rules)
        forced = bool(rule) and rules[rule] == "fp8"
        if rule and not forced:
            reason = f"rule: {rule}={rules[rule]}"
        elif _is_adapter(name) and name != rule:
            reason = "adapter: low-rank products are small, and all that learns"
        else:
            reason = reasons.not_convertible(name, linear) or (
                _refuse_odd_dims(name, linear, rule) if forced else reasons.sensitive(name, linear)
            )
        if reason:
            choice.kept[name] = reason
        else:
            choice.chosen[name] = linear
    return choice


def rule_over(name: str, rules: dict[str, str]) -> str:
    """Return the nearest module at or above `name` that a rule names, "" where none does.

    >>> rule_over("layers.0.mlp.up", {"layers.0": "bf16", "layers.0.mlp": "fp8"})
    'layers.0.mlp'
    """
    return max((rule for rule in rules if name == rule or name.startswith(f"{rule}.")), key=len, default="")


def odd_dims(in_features: int, out_features: int) -> str:
    """Return why fp8 cannot multiply by weights of this shape; "" where it can."""
    odd = [f"{n} {what}" for n, what in ((in_features, "inputs"), (out_features, "outputs")) if n % MULTIPLE]
    return f"odd dims: {' and '.join(odd)}, fp8 products need multiples of {MULTIPLE}" if odd else ""


def too_small(scaling: str, in_features: int, out_features: int) -> str:
    """Return why fp8 would not pay for weights of this shape; "" where it may.

    Args:
        scaling: torchao's recipe: "tensorwise", "rowwise" or "rowwise_with_gw_hp" (judged as rowwise: torchao has no
            limits of its own for it).
        in_features: K of the product.
        out_features: N of the product.

    Source: `_auto_filter_for_tensorwise` and `_auto_filter_for_rowwise` of torchao.float8, by speed measured on H100.
    """
    if scaling == "tensorwise":
        small = in_features <= 4096 and out_features <= 1024
    else:
        small = out_features <= 2048 or in_features <= 1024 or (out_features <= 4096 and in_features <= 2048)
    if not small:
        return ""
    return f"small layer: {in_features} to {out_features}, where torchao measured no gain with {scaling} scales on H100"


class _Reasons:
    """Why a linear layer of one model stays high."""

    def __init__(self, model: nn.Module, linears: dict[str, nn.Linear], scaling: str) -> None:
        self.model = model
        self.scaling = scaling
        names = [name for name in linears if not _is_adapter(name)]
        self.first, self.last = (names[0], names[-1]) if names else ("", "")
        self.head = _head_of(model)
        self.embedded = {
            id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }
        self.uncalled = tuple(
            f"{name}." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)
        )

    def not_convertible(self, name: str, linear: nn.Linear) -> str:
        if name.startswith(self.uncalled) and self.uncalled:
            return "not convertible: nn.MultiheadAttention reads its weight without calling it"
        if type(linear) is not nn.Linear:
            return f"not convertible: a {type(linear).__name__}, which may compute otherwise than nn.Linear"
        if "forward" in vars(linear):
            return "not convertible: something has replaced its forward already"
        if not isinstance(linear._parameters.get("weight"), nn.Parameter):
            return "not convertible: its weight is computed (parametrization, weight norm)"
        return ""

    def sensitive(self, name: str, linear: nn.Linear) -> str:
        if id(linear.weight) in self.embedded:
            return f"tied: it shares its weight with the embedding {self.embedded[id(linear.weight)]}"
        if name in (self.head, f"{self.head}.base_layer"):
            return "output head: its errors go straight into the loss"
        if name == self.last:
            return "last linear: its errors go straight into the loss"
        if name == self.first:
            return "first linear: its errors reach everything after it"
        if self._routes(name, linear):
            return "router: rounding changes which experts are chosen"
        sizes = linear.in_features, linear.out_features
        return odd_dims(*sizes) or too_small(self.scaling, *sizes)

    def _routes(self, name: str, linear: nn.Linear) -> bool:
        parent, _, last = name.rpartition(".")
        experts = dict(self.model.get_submodule(parent).named_children()).get("experts")
        count = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", None)
        return last in ROUTERS or "router" in name.split(".") or linear.out_features == count


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _transposed(model: nn.Module) -> list[str]:
    from floatline.techniques.adapters.targets import is_transposed_linear  # that package imports this one

    return [name for name, module in model.named_modules() if is_transposed_linear(module)]


def _head_of(model: nn.Module) -> str:
    from floatline.techniques.logits.heads import find_head  # that package imports this one

    return find_head(model)[0]


def _refuse_odd_dims(name: str, linear: nn.Linear, rule: str) -> str:
    if odd := odd_dims(linear.in_features, linear.out_features):
        raise PrecisionError(
            f"rule {rule}=fp8 takes in {name}, which has {odd.removeprefix('odd dims: ')}",
            hint=f"add {name}=bf16, or pad the layer",
        )
    return ""


def _refuse_empty_rules(linears: dict[str, nn.Linear], rules: dict[str, str]) -> None:
    for rule, number_format in rules.items():
        if number_format == "fp8" and not any(name == rule or name.startswith(f"{rule}.") for name in linears):
            raise PrecisionError(
                f"rule {rule}=fp8 names a module without nn.Linear layers", hint="fp8 is for nn.Linear layers"
            )
