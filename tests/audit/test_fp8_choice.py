"""From measured layers to a policy and to a filter for torchao, which convert the same layers."""

import pytest
import torch
from torch import nn

from floatline.audit.fp8 import KEEP, filter_of, fp8_policy, what_if
from floatline.errors import ConfigError
from floatline.precision import Policy, apply_precision
from floatline.precision.rules import match_rules


def seeded(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def linear(inputs=256, outputs=128, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


class Large(nn.Module):
    """Layers just large enough for `fp8-mixed` to choose them; the second block gets a channel that crushes others."""

    def __init__(self):
        super().__init__()
        self.first = linear(32, 4112)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": linear(4112, 1040), "down": linear(1040, 4112)}) for _ in (0, 1)
        )
        self.last = linear(4112, 16)
        with torch.no_grad():
            self.blocks[1]["up"].weight[:, 3] = 0

    def forward(self, x):
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            crushing = torch.ones(4112)
            crushing[3] = 1e7 if number else 1
            x = x + block["down"](block["up"](x * crushing))
        return self.last(x).square().mean()


def test_the_policy_keeps_what_measured_badly_and_the_filter_converts_the_same_layers():
    from torchao.float8 import convert_to_float8_training

    model, x = Large(), seeded(16, 32)
    rows = what_if(model, lambda: model(x))
    assert {row.name: row.verdict for row in rows}["blocks.1.up"] == KEEP
    policy = fp8_policy(rows, model)
    assert policy == "fp8-mixed; blocks.1.up=bf16"
    converted = set(apply_precision(model, Policy.parse(policy)).touched) - {"blocks.1.up"}
    assert converted == {"blocks.0.up", "blocks.0.down", "blocks.1.down"}
    other = convert_to_float8_training(Large(), module_filter_fn=filter_of(rows))
    assert {n for n, m in other.named_modules() if type(m).__name__ == "Float8Linear"} == converted


def test_layers_that_were_not_measured_stay_high():
    model = Large()
    assert fp8_policy((), model) == "fp8-mixed; blocks.*.*=bf16"


def test_what_must_be_fp32_beside_fp8_stays_so():
    model = Large()
    policy = fp8_policy((), model, beside=Policy.parse("bf16-mixed; blocks.0.up=32"))
    assert policy == "fp8-mixed; blocks.0.up=32; blocks.*.down=bf16; blocks.1.up=bf16"
    assert match_rules(model, Policy.parse(policy))["blocks.0.up"] == "32"


def test_scalings_without_a_policy_are_refused():
    for make in (lambda: fp8_policy((), nn.Linear(2, 2), "block"), lambda: filter_of((), "block")):
        with pytest.raises(ConfigError, match="no fp8 policy scales by 'block'\nhint: allowed: tensor, row"):
            make()
