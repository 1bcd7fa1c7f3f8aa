"""What was bad before the step began: inputs (which sample), parameters, buffers; uninitialised memory."""

import torch
from torch import nn
from torch.nn import functional as F

from corpus.cases import fault
from corpus.domains import layer, rows

NAN, INF = float("nan"), float("inf")


@fault("input", "convolution", "bad input", module="0", tensor="input", samples=(2,), cured=True)
def corrupt_image_in_a_batch():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    images = torch.randn(4, 1, 8, 8)
    images[2, 0, 3, 3] = NAN
    return lambda: model(images).square().mean(), model  # HERE


@fault("input", "addmm", "bad input", module="body", tensor="features", samples=(0, 3), cured=True)
def dict_batch_with_two_bad_samples():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, features, weight):
            return self.body(features) * weight[:, None]  # HERE

    model = Net()
    batch = {"features": rows(5), "weight": torch.ones(5)}
    batch["features"][0, 1] = INF
    batch["features"][3, 0] = NAN
    return lambda: model(**batch).mean(), model


@fault("input", "mul", "bad input", tensor="weight", samples=(1,), cured=True)
def second_tensor_of_a_tuple_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, features, weight):
            h = self.body(features)
            return h * weight[:, None]  # HERE

    model = Net()
    batch = (rows(3), torch.tensor([1.0, NAN, 1.0]))
    return lambda: model(*batch).mean(), model


@fault("input", "addmm", "bad input", module="body", tensor="views[1]", samples=(2,), cured=True)
def list_of_views():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 2)

        def forward(self, views):
            return sum(self.body(view) for view in views)  # HERE

    model = Net()
    views = [rows(), rows(), rows()]
    views[1][2] = NAN
    return lambda: model(views).mean(), model


@fault("input", {"mse_loss", "sub"}, "bad input", tensor="target", samples=(1,), cured=True)
def nan_label_of_a_regression():
    model, x = layer(), rows()
    target = rows()
    target[1, 3] = NAN

    def forward():
        return F.mse_loss(model(x), target)  # HERE

    return forward, model


@fault("input", "binary_cross_entropy_with_logits", "bad input", tensor="batch['labels']", samples=(2,), cured=True)
def infinite_soft_label_in_a_closure_dict():
    model, batch = layer(4, 1), {"x": rows(), "labels": torch.tensor([[0.0], [1.0], [INF]])}

    def forward():
        return F.binary_cross_entropy_with_logits(model(batch["x"]), batch["labels"])  # HERE

    return forward, model


@fault("input", "sub", "bad input", tensor="raw", samples=(1,), cured=True)
def input_moved_and_normalised_outside_of_the_model():
    model, raw = nn.Sequential(nn.Linear(4, 2)), rows()
    raw[1, 1] = NAN

    def forward():
        x = (raw - 0.5).to(torch.float32)  # HERE
        return model(x).mean()

    return forward, model


@fault("input", {"sum", "mean"}, "bad input", tensor="x", samples=(0,))
def batch_with_infinite_reward():
    model, x = layer(), rows()
    x[0, 0] = -INF
    return lambda: model(torch.ones(3, 4)).mean() + x.sum(), model  # HERE


@fault("parameter", {"addmm", "t"}, "bad parameter", module="1", tensor="1.weight")
def nan_in_a_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = NAN
    x = rows()
    return lambda: model(x).mean(), model  # HERE


@fault("parameter", "embedding", "bad parameter", module="0", tensor="0.weight")
def nan_row_of_an_embedding():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[7] = NAN
    ids = torch.tensor([[1, 7], [2, 3]])
    return lambda: model(ids).mean(), model  # HERE


@fault("parameter", "mul", "bad parameter", module="scale", tensor="scale.gain")
def infinite_gain():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, INF, 1.0, 1.0]))

        def forward(self, x):
            return x * self.gain  # HERE

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = Scale()

        def forward(self, x):
            return self.scale(x)

    model, x = Net(), rows()
    return lambda: model(x).mean(), model


@fault("parameter", {"addmm", "mm", "t"}, "bad parameter", module="encoder", tensor="encoder.weight")
def tied_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(4, 4, bias=False)
            self.decoder = nn.Linear(4, 4, bias=False)
            self.decoder.weight = self.encoder.weight
            with torch.no_grad():
                self.encoder.weight[3, 3] = NAN

        def forward(self, x):
            return self.decoder(self.encoder(x))  # HERE

    model, x = Net(), rows()
    return lambda: model(x).mean(), model


@fault("buffer", {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}, "bad buffer",
       module="1", tensor="1.running_var")  # fmt: skip
def batch_norm_statistics_poisoned_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var[2] = NAN
    x = rows()
    return lambda: model(x).square().mean(), model  # HERE


@fault("buffer", "add", "bad buffer", tensor="offset")
def nan_in_a_registered_buffer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("offset", torch.tensor([0.0, NAN, 0.0, 0.0]))

        def forward(self, x):
            return self.linear(x) + self.offset  # HERE

    model, x = Net(), rows()
    return lambda: model(x).mean(), model


@fault("forward", {"native_batch_norm", "_native_batch_norm_legit"}, "overflow", module="norm")
def batch_norm_statistics_poisoned_by_this_batch():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            h = self.linear(x)
            self.norm(h * 1e25)  # HERE
            return h

    model, x = Net(), rows()
    return lambda: model(x).mean(), model


@fault("forward", "empty", "uninitialised memory")
def accumulator_that_nobody_wrote():
    model, x = layer(), rows()

    def forward():
        total = garbage(torch.empty(4))  # HERE
        total += model(x).sum(0)
        return total.sum()

    return forward, model


def garbage(tensor):
    """What `empty` hands out is chance: make it the worst that it can be, without an op."""
    tensor.numpy()[:] = NAN
    return tensor


@fault("input", "addmm", "bad input", tensor="input", samples=(3, 4))
def nan_in_padding_reaches_the_gradient_as_zero_times_nan():
    model, x = layer(), rows(5)
    x[3:] = NAN
    return lambda: model(x)[:3].sum(), model  # HERE


@fault("parameter", "mm", "bad parameter", module="0", tensor="0.weight")
def parameter_of_uninitialised_memory():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    model[0].weight = nn.Parameter(garbage(torch.empty(4, 4)))
    x = rows()
    return lambda: model(x).mean(), model  # HERE
