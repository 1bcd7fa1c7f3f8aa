"""A precision policy: which number format the weights, the arithmetic and single modules use.

A policy is one of the field's names plus rules for modules, and prints as the string that parses it:

    16-mixed; model.visual.blocks.*.mlp=32

| name       | weights | matmul | loss scale | optimizer works on |
|------------|---------|--------|------------|--------------------|
| 32-true    | fp32    | fp32   | no         | the weights        |
| bf16-mixed | fp32    | bf16   | no         | the weights        |
| 16-mixed   | fp32    | fp16   | yes        | the weights        |
| bf16-true  | bf16    | bf16   | no         | the weights        |
| 16-true    | fp16    | fp16   | yes        | an fp32 copy       |
| fp8-mixed  | fp32    | fp8    | no         | the weights        |

`fp8-mixed` computes large linear layers in fp8 (precision/float8.py says which) and the rest as `bf16-mixed` does. It
gives each tensor one scale; `fp8-rowwise-mixed` and `fp8-rowwise-gw-hp-mixed` are torchao's finer recipes: a scale for
each row, and the weights' gradient in bf16 as well.

`-mixed` is torch.autocast over fp32 weights; `-true` casts the weights. `16-true` keeps an fp32 master copy because
fp16 weights alone cannot hold small updates and torch's GradScaler refuses to unscale fp16 gradients. A rule
`path=32|bf16|16` gives the matched modules a format of their own (precision/islands.py); `16` only where the policy
scales the loss. Under the fp8 names `path=bf16` keeps linears out of fp8, and `path=fp8` takes all linears in the
matched modules in, those too that would be kept high by themselves.

Not covered here: whether a device can run it (precision/choose.py) and how it is put on a model (precision/apply.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from floatline.errors import PrecisionError, did_you_mean

RULE_FORMATS = {"32": "fp32", "bf16": "bf16", "16": "fp16", "fp8": "fp8"}


@dataclass(frozen=True, kw_only=True)
class Base:
    """What a precision name stands for: formats by their short names."""

    name: str
    weights: str
    compute: str
    loss_scaling: bool = False
    master_weights: bool = False
    scaling: str = ""
    """How fp8 tensors are scaled: torchao's name of the recipe."""

    @property
    def arithmetic(self) -> str:
        """The format of what is not fp32 and, under fp8, not one of its linear layers."""
        return "bf16" if self.compute == "fp8" else self.compute

    @property
    def mixed(self) -> bool:
        """True where autocast chooses the format op by op over fp32 weights."""
        return self.weights != self.compute


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(name="32-true", weights="fp32", compute="fp32"),
        Base(name="bf16-mixed", weights="fp32", compute="bf16"),
        Base(name="16-mixed", weights="fp32", compute="fp16", loss_scaling=True),
        Base(name="bf16-true", weights="bf16", compute="bf16"),
        Base(name="16-true", weights="fp16", compute="fp16", loss_scaling=True, master_weights=True),
        Base(name="fp8-mixed", weights="fp32", compute="fp8", scaling="tensorwise"),
        Base(name="fp8-rowwise-mixed", weights="fp32", compute="fp8", scaling="rowwise"),
        Base(name="fp8-rowwise-gw-hp-mixed", weights="fp32", compute="fp8", scaling="rowwise_with_gw_hp"),
    )
}


@dataclass(frozen=True)
class Rule:
    """One module rule: modules that match `pattern` compute in `format` ("32", "bf16", "16" or "fp8")."""

    pattern: str
    format: str

    def __post_init__(self) -> None:
        if not self.pattern or any(not part for part in self.pattern.split(".")):
            raise PrecisionError(
                f"bad module pattern {self.pattern!r} in a precision rule",
                hint="write dotted module names, `*` for one component: model.layers.*.mlp=32",
            )
        if any(char in self.pattern for char in "=; \t\n"):
            raise PrecisionError(f"module pattern {self.pattern!r} holds a space, `=` or `;`")
        if self.format not in RULE_FORMATS:
            raise PrecisionError(
                f"unknown format {self.format!r} in rule {self.pattern}={self.format}",
                hint=f"allowed: {', '.join(RULE_FORMATS)}",
            )

    def __str__(self) -> str:
        return f"{self.pattern}={self.format}"


@dataclass(frozen=True)
class Policy:
    """A precision name with per-module rules; `str(policy)` parses back to an equal policy.

    >>> str(Policy.parse("16-mixed;  model.visual.blocks.*.mlp = 32"))
    '16-mixed; model.visual.blocks.*.mlp=32'
    """

    name: str
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in BASES:
            raise PrecisionError(f"unknown precision {self.name!r}", hint=did_you_mean(self.name, [*BASES, "auto"]))
        seen: dict[str, str] = {}
        for rule in self.rules:
            if rule.format == "16" and not self.base.loss_scaling:
                raise PrecisionError(
                    f"rule {rule} under {self.name}: fp16 gradients need loss scaling, which {self.name} has not",
                    hint=f"write {rule.pattern}=bf16, or start from 16-mixed",
                )
            if rule.format == "fp8" and self.base.compute != "fp8":
                raise PrecisionError(
                    f"rule {rule} under {self.name}: fp8 layers need an fp8 policy",
                    hint="start from fp8-mixed",
                )
            if seen.setdefault(rule.pattern, rule.format) != rule.format:
                raise PrecisionError(
                    f"precision rules contradict each other: {rule.pattern}={seen[rule.pattern]} and {rule}",
                    hint="keep one of them",
                )

    @property
    def base(self) -> Base:
        return BASES[self.name]

    @property
    def formats(self) -> set[str]:
        """Formats that matrix products use anywhere under this policy."""
        return {self.base.compute, self.base.arithmetic} | {RULE_FORMATS[rule.format] for rule in self.rules}

    @classmethod
    def parse(cls, text: str | Policy) -> Policy:
        """Parse `NAME[; PATTERN=FORMAT ...]`.

        Args:
            text: e.g. "bf16-mixed" or "16-mixed; model.visual.blocks.*.mlp=32". A Policy passes through.

        Raises:
            PrecisionError: Unknown name or format, malformed or contradicting rule; "auto", which needs a device
                (`choose.resolve`).
        """
        if isinstance(text, Policy):
            return text
        name, rules = split_policy(text)
        return cls(name, rules)

    def __str__(self) -> str:
        return "; ".join([self.name, *map(str, self.rules)])


def split_policy(text: str) -> tuple[str, tuple[Rule, ...]]:
    """Split a policy string into its name (which may still be "auto") and its rules.

    Raises:
        PrecisionError: Not a string, or a malformed rule.
    """
    if not isinstance(text, str):
        raise PrecisionError(f"precision must be a string, not {text!r}", hint=f"allowed: {', '.join(BASES)}, auto")
    name, *rules = (part.strip() for part in text.split(";"))
    return name, tuple(_parse_rule(rule) for rule in rules if rule)


def _parse_rule(text: str) -> Rule:
    pattern, equals, number_format = text.partition("=")
    if not equals:
        raise PrecisionError(f"precision rule {text!r} has no `=`", hint="write PATTERN=FORMAT, e.g. lm_head=32")
    return Rule(pattern.strip(), number_format.strip())
