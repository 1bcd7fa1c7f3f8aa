"""Offload: what leaves, what stays, and that it comes back as it was."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, MemoryExceededError
from floatline.techniques import Offload, offload
from floatline.techniques.offload_stash import DiskStash, HostStash, Stashed


class Deep(nn.Module):
    def __init__(self, depth=4, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


X = torch.randn(8, 32, 64, generator=torch.Generator().manual_seed(1))


def run(model, techniques, batches, precision="32-true", loss=None):
    step = fl.TrainStep(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision=precision, loss=loss, techniques=techniques
    )
    outputs = [step(batch) for batch in batches]
    return [(out.loss, out.grad_norm) for out in outputs], step


@pytest.fixture
def away(monkeypatch):
    """Takes CPU tensors for a device's, so that offload to the host really copies them."""
    monkeypatch.setattr(offload, "_on_host", lambda tensor: False)


@pytest.mark.parametrize("to", ["host", "disk"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bit_identical_on_every_model(case, to, precision, away):
    plain, model = case.build(), case.build()
    batches = [case.batch(seed) for seed in range(3)]
    ours, step = run(model, [Offload(to=to, min_bytes=0)], batches, precision, case.loss)
    assert ours == run(plain, [], batches, precision, case.loss)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    facts = step.stack.facts()
    assert facts["offload.tensors"] > 10 and facts["offload.peak_bytes"] > 0 and facts["offload.live_bytes"] == 0


def test_on_a_cpu_nothing_moves_to_the_host():
    model = Deep()
    applied = Offload(min_bytes=0).apply(model)
    with applied.around():
        model(X).backward()
    assert applied.facts()["tensors"] == 0 and "nothing moves: to=disk" in applied.notes[0]


def test_at_least_four_fifths_of_the_activations_leave_memory(kept_bytes, away):
    plain = kept_bytes(Deep(), (X,))
    model = Deep()
    applied = Offload(to="disk", min_bytes=0).apply(model)
    left = kept_bytes(model, (X,), around=applied.around)
    assert left < 0.2 * plain
    model = Deep()
    applied = Offload(min_bytes=0).apply(model)  # here the copies are in memory too, as many bytes as went away
    with applied.around():
        loss = model(X)
    assert applied.facts()["live_bytes"] > 0.8 * plain
    del loss
    gc.collect()
    assert applied.facts()["live_bytes"] == 0


def test_a_tensor_goes_once_however_many_ops_save_it(away):
    weight = nn.Parameter(torch.ones(64, 64))
    model = nn.ParameterList([weight])
    applied = Offload(min_bytes=0).apply(model)
    with applied.around():
        x = torch.ones(64, 64, requires_grad=True) * 2
        loss = (x * x + x.exp().sum() + (x @ weight) + (x @ weight)).sum()
    assert applied.facts()["tensors"] == 2  # x and exp's output; not the weight
    loss.backward()


def test_weights_small_and_expanded_tensors_stay(away):
    model = nn.Linear(256, 256)
    applied = Offload().apply(model)
    with applied.around():
        small = model(torch.ones(4, 256)).sum()
        wide = (torch.ones(1, 512).expand(512, 512) * torch.ones(512, 512, requires_grad=True)).sum()
    assert applied.facts()["tensors"] == 0
    assert small.requires_grad and wide.requires_grad


def test_what_is_beyond_the_limit_stays_on_the_device(away):
    model = Deep()
    applied = Offload(min_bytes=0, max_bytes=2**18).apply(model)
    with applied.around():
        loss = model(X)
    facts = applied.facts()
    assert 2**17 < facts["peak_bytes"] <= 2**18 and facts["kept_bytes"] > 2**18
    loss.backward()
    plain = Deep()
    plain(X).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


STRIDED = [
    torch.arange(24.0).reshape(4, 6).t(),
    torch.arange(24.0).reshape(4, 6)[:, ::2],
    torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    torch.arange(48.0).reshape(6, 8).bfloat16()[1:4, 2:5],
    torch.tensor(3.5),
    torch.rand(5, 7) > 0.5,
]


@pytest.mark.parametrize("tensor", STRIDED, ids=lambda t: f"{tuple(t.shape)}-{t.stride()}-{t.dtype}")
@pytest.mark.parametrize("stash", [HostStash(2), DiskStash(None)], ids=["host", "disk"])
def test_size_strides_and_bits_come_back(stash, tensor):
    entry = Stashed(stash, tensor)
    back = entry.fetch()
    assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == tensor.dtype
    assert torch.equal(entry.fetch(), tensor)  # and again, for graphs that are kept
    del entry
    assert stash.live_bytes == 0


def test_places_on_disk_are_used_again():
    stash = DiskStash(None)
    for _ in range(3):
        entries = [Stashed(stash, torch.full((1024,), float(i))) for i in range(4)]
        assert [e.place for e in entries] == [0, 4096, 8192, 12288]
        assert [float(e.fetch()[0]) for e in entries] == [0.0, 1.0, 2.0, 3.0]
        del entries
    assert os.fstat(stash._file.fileno()).st_size == 16384
    stash.close()


def test_with_checkpointing_only_the_inputs_of_layers_are_left_to_go(kept_bytes):
    def left(*techniques):
        model = Deep()
        applied = [technique.apply(model) for technique in techniques]
        return kept_bytes(model, (X,), around=applied[-1].around)

    disk = Offload(to="disk", min_bytes=0)
    assert left(fl.techniques.Checkpointing(), disk) < 0.25 * left(fl.techniques.Checkpointing())


def test_copies_of_a_model_do_not_share_hooks(away):
    model = Deep(depth=1)
    applied = Offload(min_bytes=0).apply(model)
    other = copy.deepcopy(model)
    other(X).backward()
    assert applied.facts()["tensors"] == 0


def test_a_full_disk_is_a_clear_error(monkeypatch, tmp_path):
    import errno

    real = os.pwrite

    def full(descriptor, data, offset):
        if offset > 300_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    model = Deep()
    before = copy.deepcopy(model.state_dict())
    step = fl.TrainStep(
        model, torch.optim.AdamW, precision="32-true", techniques=[Offload(to="disk", directory=str(tmp_path))]
    )
    with pytest.raises(
        MemoryExceededError, match=rf"offload: the disk of {tmp_path} is full, with \d\.\d MiB"
    ) as error:
        step((X,))
    assert "set offload.directory to a disk with more room" in error.value.hint
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    monkeypatch.undo()
    assert bool(step((X,)).applied)  # with room again it goes on


@pytest.mark.skipif(not os.path.exists("/dev/full") or os.geteuid() != 0, reason="needs a small file system to fill")
def test_a_disk_that_is_really_full(tmp_path):
    """On a file system of 1 MiB (a tmpfs in a mount namespace of its own)."""
    code = (
        "import torch, floatline as fl\n"
        "from floatline.techniques import Offload\n"
        "layer = lambda: torch.nn.TransformerEncoderLayer(64, 4, 256, 0.0, batch_first=True)\n"
        "model = torch.nn.Sequential(*[layer() for _ in range(4)])\n"
        f"step = fl.TrainStep(model, torch.optim.AdamW, precision='32-true', loss=lambda m, b: m(*b).mean(),\n"
        f"    techniques=[Offload(to='disk', directory='{tmp_path}')])\n"
        "try: step((torch.randn(8, 32, 64),))\n"
        "except fl.FloatlineError as error: print(error)\n"
    )
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c "$CODE"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount], env={**os.environ, "CODE": code}, capture_output=True, text=True
    )
    if "permitted" in done.stderr or "unshare" in done.stderr:
        pytest.skip("no mount namespaces here")
    assert "is full" in done.stdout, done.stderr


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match=r"offload.to is 'ssd'\nhint: allowed: host, disk"):
        Offload(to="ssd")
    with pytest.raises(ConfigError, match=r"offload.min_bytes is -1\nhint: give 0 or more"):
        Offload(min_bytes=-1)
    with pytest.raises(ConfigError, match=r"offload.directory is .*\nhint: name a directory that exists"):
        Offload(to="disk", directory=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="offload to the host uses no directory"):
        Offload(directory=str(tmp_path))
    assert "to=disk is what saves" in Offload().apply(nn.Linear(2, 2)).notes[0]
