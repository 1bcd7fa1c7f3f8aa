"""The same faults in programs of other shapes: checkpoints, compiled models, modules called twice, in-place ops."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from corpus.cases import fault
from corpus.domains import layer, rows


@fault("forward", "log", "log of zero", module="inner.gate")
def compiled_model():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = F.relu(self.linear(x) - 100)
            return h.log()  # HERE

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        def forward(self, x):
            return self.gate(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x).mean()

    model, x = torch.compile(Net(), backend="eager"), rows()
    return lambda: model(x), model


@fault("forward", "log", "log of zero", module="gate")
def compiled_submodule():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = F.relu(self.linear(x) - 100)
            return h.log()  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = torch.compile(Gate(), backend="eager")

        def forward(self, x):
            return self.gate(x).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("forward", "log", "log of zero", module="gate")
def module_compiled_in_place():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = F.relu(self.linear(x) - 100)
            return h.log()  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()
            self.gate.compile(backend="eager")

        def forward(self, x):
            return self.gate(x).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("forward", "log", "log of zero", module="body")
def checkpointed_forward():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = F.relu(self.linear(x) - 100)
            return h.log()  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("forward", "log", "log of zero", module="body")
def reentrant_checkpoint_forward():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = F.relu(self.linear(x) - 100)
            return h.log()  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            return checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=True).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("backward", "sqrt", "derivative at the edge", module="body")
def reentrant_checkpoint_backward():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            h = self.linear(x) * 0
            return h.sqrt()  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body = nn.Linear(4, 4), Body()

        def forward(self, x):
            return checkpoint(self.body, self.stem(x), use_reentrant=True).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("forward", "log", "log of zero", module="shared")
def module_called_twice_bad_at_the_second_call():
    class Shared(nn.Module):
        def forward(self, x):
            return torch.log(x)  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.shared = nn.Linear(4, 4), Shared()

        def forward(self, x):
            h = self.shared(self.linear(x).abs() + 1)
            return self.shared(F.relu(h - 100)).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("forward", "log_", "log of zero")
def logarithm_in_place():
    model, x = layer(), rows()

    def forward():
        h = F.relu(model(x) - 100)
        h.log_()  # HERE
        return h.mean()

    return forward, model


@fault("forward", "sqrt_", "root of a negative number")
def root_in_place_on_a_view():
    model, x = layer(), rows()

    def forward():
        h = model(x) - 50
        h[:, 1].sqrt_()  # HERE
        return h.sum()

    return forward, model


@fault("forward", "div", "division by zero", module="parametrizations.weight.0")
def weight_norm_of_a_zero_row():
    class Unit(nn.Module):
        def forward(self, weight):
            return weight / weight.norm(dim=1, keepdim=True)  # HERE

    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[2] = 0
    parametrize.register_parametrization(model, "weight", Unit())
    x = rows()
    return lambda: model(x).sum(), model


@fault("forward", {"_weight_norm_interface", "div"}, "division by zero", module="0.parametrizations.weight.0")
def library_weight_norm_of_a_zero_row():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[1] = 0
    x = rows()
    return lambda: model(x).sum(), model  # HERE


@fault("forward", "log", "log of zero")
def loss_outside_of_the_model():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), rows()
    labels = torch.tensor([0, 1, 2])

    def nll(p):
        picked = p.gather(-1, labels[:, None])
        return -(picked * 0).log().mean()  # HERE

    return lambda: nll(model(x)), model


@fault("forward", "log", "log of zero", module="blocks.1.head.2")
def deep_in_nested_containers():
    class Log(nn.Module):
        def forward(self, x):
            return F.relu(x - 100).log()  # HERE

    class Block(nn.Module):
        def __init__(self, last):
            super().__init__()
            self.head = nn.ModuleDict({"0": nn.Linear(4, 4), "2": last})

        def forward(self, x):
            return self.head["2"](self.head["0"](x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(nn.Tanh()), Block(Log()))

        def forward(self, x):
            return self.blocks(x).mean()

    model, x = Net(), rows()
    return lambda: model(x), model


@fault("forward", "log", "log of zero")
def two_faults_the_first_one_counts():
    model, x = layer(), rows()

    def forward():
        h = F.relu(model(x) - 100)
        first = h.log()  # HERE
        second = torch.acos(h + 2)
        return (first + second).mean()

    return forward, model


@fault("forward", "acos", "outside of the domain")
def two_faults_of_which_one_is_discarded():
    model, x = layer(), rows()

    def forward():
        h = F.relu(model(x) - 100)
        unused = h.log()
        kept = torch.acos(h + 2)  # HERE
        return torch.where(torch.zeros_like(h).bool(), unused, kept).mean()

    return forward, model


@fault("forward", "log", "log of zero")
def model_with_two_outputs_and_a_fault_in_one():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return {"a": self.a(x), "b": F.relu(self.b(x) - 100)}

    model, x = Net(), rows()

    def forward():
        out = model(x)
        return out["a"].mean() + out["b"].log().mean()  # HERE

    return forward, model


@fault("forward", "sum", "masked value used")
def infinity_written_by_index_and_summed():
    model, x = layer(), rows()

    def forward():
        h = model(x).clone()
        h[1, 2] = float("inf")
        return h.sum()  # HERE

    return forward, model
