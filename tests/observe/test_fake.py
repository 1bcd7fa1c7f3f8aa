"""What runs for real and what on fake tensors, and what a program is told about values that nobody knows."""

import copy
import dataclasses
import random
import threading
import time
import weakref
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from floatline.errors import ConfigError, ModelError
from floatline.observe import values
from floatline.observe.fake import faking
from floatline.observe.fake_model import fake_batch, fake_model, tensors_of
from floatline.observe.real import REAL_FLOATS
from floatline.step import Workload


@pytest.fixture
def mode():
    with faking() as mode:
        yield mode


def unknown(mode, *shape, dtype=torch.float32):
    return mode.fake(torch.zeros(shape, dtype=dtype))


def work_of(model):
    return Workload(model=model, batch={})


def is_fake(tensor):
    return isinstance(tensor, FakeTensor)


# Real or fake


def test_small_results_without_fake_inputs_are_real(mode):
    assert torch.linspace(0, 0.3, 4).tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert not is_fake(torch.zeros(REAL_FLOATS))
    assert not is_fake(torch.zeros(2000, 2000, dtype=torch.long))


def test_large_floats_are_fake_from_the_factory_on(mode):
    large = torch.zeros(REAL_FLOATS + 1)
    assert is_fake(large) and is_fake(large + 1) and is_fake(large[:2])


def test_what_is_made_of_a_fake_tensor_is_fake_and_a_real_partner_stays_as_it_is(mode):
    real = torch.ones(3)
    assert is_fake(real + unknown(mode, 3))
    assert real.tolist() == [1, 1, 1]


def test_a_small_input_that_grows_becomes_fake(mode):
    row = torch.ones(1, 1000)
    assert is_fake(row.expand(1000, 1000) * 2)


def test_a_real_tensor_with_fake_values_inside_keeps_its_graph_and_is_unknown(mode):
    weight = nn.Parameter(unknown(mode, 4))
    table = torch.zeros(4)
    table[1:3] = weight[:2]
    assert not is_fake(table) and mode.is_unknown(table) and mode.is_unknown(table * 2)
    table.sum().backward()
    assert weight.grad.shape == (4,)
    marks = torch.zeros(8, dtype=torch.bool)
    marks[:] = unknown(mode, 8) > 0
    assert marks.nonzero().shape == (4, 1)  # not what the stale zeros say
    assert not mode.is_unknown(torch.zeros(4))


def test_integers_of_a_batch_stay_real_and_floats_do_not(mode):
    batch = {"ids": torch.arange(3), "x": [torch.ones(2), ("text", 7)]}
    ready = fake_batch(batch, mode)
    assert (
        torch.equal(ready["ids"], batch["ids"])
        and not is_fake(ready["ids"])
        and is_fake(ready["x"][0])
        and ready["x"][1] == ("text", 7)
    )


# Values that are read


def test_a_value_that_is_read_is_one_and_noted_with_its_line(mode):
    assert unknown(mode, 1).item() == 1.0
    assert unknown(mode, 3).tolist() == [1.0] * 3
    (first, *_) = mode.assumptions
    assert first.startswith("a value that is read was taken to be 1.0 (observe/test_fake.py:")


def test_known_values_are_read_as_they_are(mode):
    assert torch.tensor([3, 4])[1].item() == 4 and torch.tensor(0.25).item() == 0.25
    assert torch.equal(torch.ones(2), torch.ones(2))
    assert not mode.assumptions


def test_comparisons_are_what_they_are_for_ordinary_numbers(mode):
    x = unknown(mode, 4)
    assert torch.isfinite(x).all() and not torch.isnan(x).any() and not (x == 0).any()
    assert not (x.norm() > 1.0) and (x > 0).all() and not (x.abs() > 65504).any()
    assert not ((x > 0) & (x > 1)).any() and ((x > 0) | (x > 1)).any() and not ~(x > 0).all()
    assert (x > 0).view(2, 2)[0].any()


def test_equal_knows_a_tensor_only_by_its_identity(mode):
    x = unknown(mode, 2)
    assert torch.equal(x, x) and not torch.equal(x, unknown(mode, 2))


def test_a_loop_that_waits_for_a_value_ends(mode):
    rounds = 0
    while (unknown(mode, 1) > 0).any():
        rounds += 1
    assert rounds <= values.PATIENCE + 1


def test_checked_distributions_accept_unknown_parameters(mode):
    spread = torch.distributions.Normal(unknown(mode, 4), F.softplus(unknown(mode, 4)))
    assert spread.rsample().shape == (4,)


def test_truncated_normal_initialisation_ends_whatever_its_limits(mode):
    weight = torch.empty(REAL_FLOATS + 1)
    for std in (1.0, 0.02, 1e-6):
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    nn.init.trunc_normal_(weight, std=1.0, a=3.0, b=4.0)


def test_numpy_reads_ones_and_leaves_no_trace_on_torch(mode):
    table = unknown(mode, 2, 3).cpu().numpy()
    assert table.shape == (2, 3) and (np.asarray(unknown(mode, 2)) == 1).all() and (table == 1).all()
    assert any("read as an array" in text for text in mode.assumptions)


def test_afterwards_torch_is_as_before():
    before = torch.get_rng_state()
    numpy, deepcopy = FakeTensor.numpy, FakeTensor.__deepcopy__
    with pytest.raises(ZeroDivisionError), faking():
        torch.rand(10)
        _ = 1 / 0
    assert torch.equal(torch.get_rng_state(), before)
    assert _get_current_dispatch_mode() is None
    assert FakeTensor.numpy is numpy and FakeTensor.__deepcopy__ is deepcopy


# Sizes that values decide


def test_a_real_mask_selects_exactly(mode):
    x, mask = unknown(mode, 4, 5), torch.tensor([True, False, True, True])
    assert x[mask].shape == (3, 5) and x[mask, 0].shape == (3,)
    x[mask] = 0.0
    assert x.masked_select(mask[:, None]).shape == (15,)
    assert not mode.assumptions


def test_half_of_a_fake_mask_is_true(mode):
    x = unknown(mode, 10)
    assert x[x > 0].shape == (5,) and torch.nonzero(x).shape == (5, 1)
    assert torch.where(unknown(mode, 4, 4) > 0)[1].tolist() == [0, 2, 0, 2, 0, 2, 0, 2]
    assert any(text.startswith("half of a mask of (10,)") for text in mode.assumptions)


def test_an_empty_or_scalar_mask(mode):
    assert torch.nonzero(unknown(mode, 0, 3)).shape == (0, 2)
    assert torch.nonzero(unknown(mode)).shape == (1, 0)


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda x: x.topk(2, dim=-1).indices, [[0, 1], [2, 0], [1, 2], [0, 1]]),
        (lambda x: x.argmax(1), [0, 1, 2, 0]),
        (lambda x: x.max(1).indices, [0, 1, 2, 0]),
        (lambda x: x.argmax(), 0),
        (lambda x: x.sort(dim=0).indices[:, 0], [0, 3, 2, 1]),
        (lambda x: x.argsort(dim=1)[0], [0, 1, 2]),
        (lambda x: x.softmax(1).multinomial(1)[:, 0], [0, 1, 2, 0]),
    ],
)
def test_indices_made_of_floats_are_real_and_spread(mode, choose, expected):
    found = choose(unknown(mode, 4, 3))
    assert not is_fake(found) and found.tolist() == expected


def test_a_mixture_of_experts_gives_each_expert_as_many_tokens(mode):
    chosen = unknown(mode, 16, 4).topk(2).indices
    assert [int((chosen == expert).sum()) for expert in range(4)] == [8] * 4


def test_unique_values_and_counts(mode):
    x = unknown(mode, 6)
    found, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    assert found.shape == (6,) and inverse.tolist() == list(range(6)) and counts.tolist() == [1] * 6
    assert torch.unique(unknown(mode, 4, 2), dim=0).shape == (4, 2)
    assert torch.tensor([3, 3, 1]).unique().tolist() == [1, 3]
    assert torch.bincount(unknown(mode, 8, dtype=torch.long), minlength=4).tolist() == [2] * 4
    assert torch.bincount(torch.tensor([0, 2, 2])).tolist() == [1, 0, 2]
    assert torch.bincount(torch.tensor([0, 2]), weights=unknown(mode, 2)).shape == (3,)


def test_repeated_rows(mode):
    x = unknown(mode, 3, 2)
    assert x.repeat_interleave(torch.tensor([1, 0, 4]), dim=0).shape == (5, 2)
    assert x.repeat_interleave(unknown(mode, 3, dtype=torch.long), dim=0).shape == (3, 2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences(mode, batch_first):
    x = unknown(mode, 3, 5, 2) if batch_first else unknown(mode, 5, 3, 2)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]), batch_first=batch_first)
    assert packed.data.shape == (9, 2) and packed.batch_sizes.tolist() == [3, 2, 2, 1, 1]
    out, lengths = nn.utils.rnn.pad_packed_sequence(packed, batch_first=batch_first)
    assert out.shape == x.shape and lengths.tolist() == [5, 3, 1]


def test_ctc_and_its_backward(mode):
    scores = nn.Parameter(unknown(mode, 20, 2, 7))
    targets, lengths = torch.randint(1, 7, (2, 6)), torch.tensor([6, 4])
    loss = F.ctc_loss(scores.log_softmax(-1), targets, torch.tensor([20, 18]), lengths)
    loss.backward()
    assert loss.shape == () and scores.grad.shape == scores.shape


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_grouped_products_of_any_dtype(mode):
    ends = torch.tensor([2, 8], dtype=torch.int32)
    assert torch._grouped_mm(unknown(mode, 8, 4), unknown(mode, 2, 4, 6), offs=ends).shape == (8, 6)


def test_a_result_whose_size_nobody_knows_is_an_error_that_names_op_and_line(mode):
    with torch.library._scoped_library("floatline_test", "DEF") as library:
        library.define("positive(Tensor x) -> Tensor")
        library.impl("positive", lambda x: x[x > 0], "CPU")
        torch.library.register_fake(
            "floatline_test::positive", lambda x: x.new_empty(torch.library.get_ctx().new_dynamic_size()), lib=library
        )
        with pytest.raises(
            ModelError, match=r"positive.*shape depends on values.*\(observe/test_fake.py:\d+\)"
        ) as caught:
            torch.ops.floatline_test.positive(unknown(mode, 4))
        assert "hint: plan a variant" in str(caught.value)


def test_comparisons_of_a_batch_are_made_for_real(mode):
    pixels = torch.ones(2, 3, 4, 4)
    pixels[1] = 0.0
    x = fake_batch({"x": pixels}, mode)["x"]
    shown = (x.to(torch.bfloat16).view(2, -1) == 0.0).sum(-1) != 48
    assert is_fake(x) and shown.tolist() == [True, False] and x[shown].shape == (1, 3, 4, 4)
    assert not mode.assumptions


def test_a_custom_op_without_a_fake_kernel_is_an_error_that_says_how_to_register_one(mode):
    with torch.library._scoped_library("floatline_test", "DEF") as library:
        library.define("halve(Tensor x) -> Tensor")
        library.impl("halve", lambda x: x / 2, "CPU")
        with pytest.raises(ModelError, match="no fake kernel") as caught:
            torch.ops.floatline_test.halve(unknown(mode, 4))
        assert "torch.library.register_fake('floatline_test::halve')" in str(caught.value)


# Models


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.tied = self.linear.weight
        self.register_buffer("order", torch.tensor([2, 0, 1]))


def test_a_module_that_exists_is_copied_and_not_changed(mode):
    model = Buffers()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    made = fake_model(work_of(model), mode)
    assert all(is_fake(parameter) for parameter in made.parameters())
    assert made.tied is made.linear.weight and made.order.tolist() == [2, 0, 1]
    assert not any(is_fake(parameter) for parameter in model.parameters())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_factory_gives_fake_parameters_large_or_small(mode):
    made = fake_model(work_of(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(300, 300))), mode)
    assert all(is_fake(parameter) and isinstance(parameter, nn.Parameter) for parameter in made.parameters())


def test_frozen_and_marked_parameters_stay_so(mode):
    def make():
        model = nn.Linear(2, 2)
        model.weight.requires_grad_(False)
        model.weight.mark = "kept"
        return model

    made = fake_model(work_of(make), mode)
    assert not made.weight.requires_grad and made.bias.requires_grad and made.weight.mark == "kept"


def test_copies_of_fake_layers_have_memory_of_their_own_with_views_in_it(mode):
    model = nn.Linear(300, 300)
    made = copy.deepcopy(model)
    assert made.weight.untyped_storage()._cdata != model.weight.untyped_storage()._cdata
    assert made.weight.t().untyped_storage()._cdata == made.weight.untyped_storage()._cdata
    assert isinstance(made.weight, nn.Parameter) and made.weight.requires_grad
    twice = copy.deepcopy([model.weight, model.weight])
    assert twice[0] is twice[1]


def test_a_factory_that_moves_to_a_gpu_is_an_error_with_a_way_out(mode):
    if torch.cuda.is_available():
        pytest.skip("here it can")
    with pytest.raises(ModelError, match="cannot be built without its memory") as caught:
        fake_model(work_of(lambda: nn.Linear(300, 300).to("cuda")), mode)
    assert "build it on the CPU" in str(caught.value)


def test_mistakes_of_the_user_in_a_factory_come_through(mode):
    with pytest.raises(TypeError, match="wrong"):
        fake_model(work_of(lambda: (_ for _ in ()).throw(TypeError("wrong"))), mode)


# What a batch holds, and what is made of it


def test_a_mask_too_large_to_be_real_is_known_where_it_is_made_of_real_tensors(mode):
    kept = torch.ones(4, 1, 200, 200, dtype=torch.bool)
    mask = torch.where(kept, 0.0, -1e9)
    assert is_fake(mask) and not (mask < 0).any() and (mask[:, 0] == 0).all()
    mask[:, :, 0, :] = -1.0
    assert int((mask < 0).sum()) == 4 * 200 and float(mask.min()) == -1.0


def test_what_is_computed_from_a_batch_alone_is_known_until_weights_come_in(mode):
    ready = fake_batch({"x": torch.tensor([3.0, 5.0])}, mode)
    assert float((ready["x"] * 2).max()) == 10.0 and not mode.assumptions
    assert float((ready["x"] * unknown(mode, 2)).max()) == 1.0 and mode.assumptions


def test_a_batch_that_was_written_into_is_known_as_it_is_now(mode):
    x = fake_batch(torch.tensor([1.0, 2.0]), mode)
    x.mul_(-1)
    assert (x < 0).all()
    x.copy_(unknown(mode, 2))
    assert is_fake(x < 0)


def test_the_callers_batch_is_left_as_it_is(mode):
    batch = {"ids": torch.arange(3), "x": torch.ones(2)}
    ready = fake_batch(batch, mode)
    ready["ids"].zero_()
    ready["x"].mul_(0)
    assert batch["ids"].tolist() == [0, 1, 2] and batch["x"].tolist() == [1, 1]


def test_a_tensor_that_is_in_a_batch_twice_stays_one(mode):
    ids = torch.arange(3)
    ready = fake_batch({"input_ids": ids, "labels": ids}, mode)
    assert ready["input_ids"] is ready["labels"]


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize("kind", [lambda **held: Sample(**held), lambda **held: UserDict(held)])
def test_a_batch_may_be_a_dataclass_or_a_mapping(mode, kind):
    ready = fake_batch(kind(x=torch.ones(5), y=torch.arange(2)), mode)
    assert [is_fake(tensor) for tensor in tensors_of(ready)] == [True, False]


# Devices, and what a process has on when a trace begins


@pytest.mark.parametrize("given", [lambda make: make(), lambda make: make])
def test_a_model_of_the_meta_device_is_one_of_the_cpu(mode, given):
    model = fake_model(work_of(given(lambda: nn.BatchNorm1d(300, device="meta"))), mode)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_a_model_is_cast_and_emptied_although_weak_references_to_its_weights_exist(mode):
    model = fake_model(work_of(lambda: nn.Linear(300, 300)), mode)
    watched = weakref.ref(model.weight)
    model.to(torch.bfloat16)
    assert watched() is model.weight and model.weight.dtype == torch.bfloat16 and is_fake(model.weight)
    with torch.device("meta"):
        later = nn.Linear(300, 300)
    assert later.to_empty(device="cpu").weight.device.type == "cpu"


def test_weights_are_loaded_in_a_factory(mode, tmp_path):
    with _disable_current_modes():
        torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "weights.pt")

    def make():
        model = nn.Linear(3, 3)
        model.load_state_dict(torch.load(tmp_path / "weights.pt"))
        return model

    assert all(map(is_fake, fake_model(work_of(make), mode).parameters()))


@pytest.mark.parametrize("made", [None, nn.Linear, "gpt2"])
def test_a_factory_that_returns_no_module_is_refused(mode, made):
    with pytest.raises(ConfigError, match="the model factory returned a"):
        fake_model(work_of(lambda: made), mode)


def test_what_is_no_workload_is_refused(mode):
    with pytest.raises(ConfigError, match="a Linear is not a Workload"):
        fake_model(nn.Linear(2, 2), mode)


def test_gradients_are_on_whatever_the_caller_is_in():
    with torch.inference_mode(), faking():
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.device("meta"), faking():
        assert torch.ones(2).device.type == "cpu"


def test_random_numbers_are_as_before_an_interruption():
    def drawn():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    with pytest.raises(KeyboardInterrupt), faking():
        drawn()
        raise KeyboardInterrupt
    assert drawn() == expected and "numpy" not in FakeTensor.__dict__


def test_traces_of_several_threads_wait_for_each_other():
    inside, most = [], []

    def one():
        with faking():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4 and "numpy" not in FakeTensor.__dict__


@pytest.mark.parametrize("shape", [(4, 16, 6), (4, 16, 6, 5)])
def test_batch_norm_lays_its_result_out_as_the_kernel_does(mode, shape):
    norm, turned = nn.BatchNorm1d(6) if len(shape) == 3 else nn.BatchNorm2d(6), (0, 2, 1, 3)[: len(shape)]
    x = torch.randn(shape)
    with _disable_current_modes():
        real = type(norm)(6)(torch.randn(shape).permute(turned)).stride()
    assert norm(mode.fake(x).permute(turned)).stride() == real
