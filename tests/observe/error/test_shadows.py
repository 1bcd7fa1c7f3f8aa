"""Shadows: exact values that follow storages, through views, writes and death."""

import gc

import torch

from floatline.observe.error.shadows import SWEEP, Shadows


def test_unknown_values_stand_for_themselves():
    shadows = Shadows()
    tensor = torch.tensor([0.5, 3.0], dtype=torch.bfloat16)
    assert shadows.of(tensor).tolist() == [0.5, 3.0] and not shadows.known(tensor)


def test_views_see_the_shadow_of_their_storage():
    shadows = Shadows()
    tensor = torch.zeros(2, 3, dtype=torch.float16)
    exact = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7
    shadows.set(tensor, exact)
    assert torch.equal(shadows.of(tensor.t()), exact.t())
    assert torch.equal(shadows.of(tensor[1, 1:]), exact[1, 1:])
    assert torch.equal(shadows.of(tensor.detach().view(-1)), exact.view(-1))
    assert torch.equal(shadows.of(tensor[:, :1].expand(2, 4)), exact[:, :1].expand(2, 4))


def test_a_part_is_set_within_what_stands_around_it():
    shadows = Shadows()
    tensor = torch.ones(4, dtype=torch.bfloat16)
    shadows.set(tensor[1:3], torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert shadows.of(tensor).tolist() == [1.0, 1 / 3, 2 / 3, 1.0]


def test_a_transposed_result_keeps_its_order():
    shadows = Shadows()
    tensor = torch.empty(3, 2).t()
    exact = torch.rand(2, 3, dtype=torch.float64)
    shadows.set(tensor, exact)
    assert torch.equal(shadows.of(tensor), exact)


def test_what_is_set_is_not_shared_with_a_view_of_something_else():
    shadows = Shadows()
    source = torch.rand(4, dtype=torch.float64)
    tensor = torch.zeros(2)
    shadows.set(tensor, source[:2])
    source.zero_()
    assert shadows.of(tensor).abs().sum() > 0


def test_integers_have_a_shadow_once_it_differs():
    shadows = Shadows()
    decision = torch.tensor([True, False])
    assert shadows.decided(decision) is None
    shadows.set(decision, torch.tensor([True, True]))
    assert shadows.decided(decision).tolist() == [True, True]


def test_another_width_reads_the_bits_themselves():
    shadows = Shadows()
    tensor = torch.zeros(2, dtype=torch.float32)
    shadows.set(tensor, torch.ones(2, dtype=torch.float64))
    assert not shadows.known(tensor.view(torch.float16))


def test_dead_storages_are_dropped_and_new_ones_are_never_taken_for_them():
    shadows = Shadows()
    for value in range(10 * SWEEP):
        tensor = torch.full((8,), float(value))
        assert not shadows.known(tensor)  # its memory has been another tensor's
        shadows.set(tensor, torch.full((8,), -1.0, dtype=torch.float64))
        del tensor
    gc.collect()
    assert len(shadows._kept) <= SWEEP + 1


def test_noise_is_forgotten_when_it_is_written_over():
    shadows = Shadows()
    tensor = torch.zeros(2)
    shadows.set(tensor, torch.ones(2, dtype=torch.float64))
    shadows.mark_noise(tensor)
    assert shadows.is_noise(tensor[:1])
    shadows.set(tensor, torch.ones(2, dtype=torch.float64))
    assert not shadows.is_noise(tensor)


def test_shared_values_are_copied_before_something_is_written_into_them():
    shadows = Shadows()
    weight, values = torch.zeros(4), torch.full((4,), 0.1, dtype=torch.float64)
    shadows.set(weight, values, shared=True)
    cast = weight.bfloat16()
    assert shadows.share(cast, weight) and shadows.of(cast).data_ptr() == values.data_ptr()
    shadows.set(cast[1:2], torch.ones(1, dtype=torch.float64))
    shadows.set(weight[:1], torch.ones(1, dtype=torch.float64))
    assert shadows.of(cast).tolist() == [0.1, 1.0, 0.1, 0.1] and shadows.of(weight).tolist() == [1.0, 0.1, 0.1, 0.1]
    assert values.tolist() == [0.1] * 4


def test_windows_share_nothing():
    shadows = Shadows()
    tensor = torch.zeros(4)
    assert not shadows.share(torch.zeros(4), tensor)  # nobody knows better than it
    shadows.set(tensor, torch.ones(4, dtype=torch.float64))
    assert not shadows.share(torch.zeros(2), tensor[:2]) and not shadows.share(torch.zeros(8)[::2], tensor)
