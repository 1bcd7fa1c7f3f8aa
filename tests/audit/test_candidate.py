"""What a candidate's policy may not do: crash the model, split a weight; and what cannot be audited."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.errors import ModelError
from floatline.precision import Policy
from floatline.precision.apply import apply_precision


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(self.up(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Nested(), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.inner(x))


HOLLOWED = (
    "bf16-mixed; inner=32; inner.up=bf16",
    "16-mixed; inner=32; inner.up=16",
    "bf16-true; inner=32; inner.up=bf16",
    "bf16-true; inner=32; inner.up=bf16; head=32",
)


@pytest.mark.parametrize("text", HOLLOWED)
def test_a_module_that_is_low_inside_of_an_island_hands_on_fp32(text):
    model = Outer()
    applied = apply_precision(model, Policy.parse(text))
    seen = []
    model.inner.down.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with applied.autocast():
        out = model(torch.ones(2, 8))
    out.float().sum().backward()
    assert seen == [torch.float32]
    applied.undo()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Tied(nn.Module):
    """The head is the embedding's weight, used by hand: an island around the embedding alone cannot run."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, ids):
        h = self.body(self.embed(ids))
        return F.linear(h, self.embed.weight) * 3e5


def test_policies_that_the_model_cannot_run_under_are_no_way_out():
    torch.manual_seed(0)
    report = fl.audit(Tied(), torch.arange(6)[None], candidates=("fp16",), mode="true", repeats=0, probes=0)
    assert report.candidates["fp16"].policy is None
    assert "16-true" in report.verdict and "audit mode='mixed'" in " ".join(report.candidates["fp16"].advice)


def test_a_model_that_cannot_run_with_cast_weights_is_told():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.zeros(2, 4) + x.float())

    with pytest.raises(ModelError, match=r"raises RuntimeError under bf16-true at test_candidate\.py") as caught:
        fl.audit(Fixed(), torch.ones(2, 4), candidates=("bf16",), mode="true")
    assert "audit the other mode" in str(caught.value)


def test_gradients_that_are_not_finite_in_fp32_are_sent_to_diagnose():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return (self.fc(x) * 0).sqrt()

    with pytest.raises(ModelError, match="gradients are not finite in fp32") as caught:
        fl.audit(Root(), torch.ones(2, 4))
    assert "fl.diagnose" in str(caught.value)


def test_the_audits_own_looking_is_no_part_of_the_step():
    torch.manual_seed(0)
    report = fl.audit(nn.Linear(8, 4), torch.ones(2, 8), candidates=("fp16",), mode="true", repeats=0, probes=0)
    assert {row.ran for row in report.rows}.isdisjoint({"aminmax", "isfinite", "ne", "abs"})


def test_recurrent_layers_are_audited_in_fp16_on_any_cpu():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    report = fl.audit(Reader(), torch.ones(2, 5, 4), candidates=("fp16",), hardware="cpu", repeats=0, probes=0)
    assert report.candidates["fp16"].policy == "16-mixed"
