"""Audio batches: Whisper's spectrograms of fixed length, and waveforms for wav2vec 2.0 and its kin.

Whisper pads or cuts every sample to 30 s, so its encoder's side has one size. The others read 16 000 values a second,
which a stack of strided convolutions turns into frames of 20 ms; CTC needs at least one frame a label.

Not covered: other spectrogram models (their frame rates are facts of their processors), speech language models.
"""

from __future__ import annotations

from typing import Any

import torch

from floatline.errors import ConfigError, ModelError
from floatline.plan.inputs.layout import Layout, class_ids, noise, special_ids, token_ids
from floatline.plan.shape import Filling

RATE = 16_000
FEATURES_A_SECOND = 100
LETTERS_A_SECOND = 15


def lay_out_speech(filling: Filling, config: Any, cls: type) -> Layout:
    """Lay out a batch for Whisper: input_features (batch, mel bins, 3000), labels (batch, target)."""
    filling.refuse("image", "images")
    if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions") or _waveform(cls):
        raise _unknown(filling)
    frames = 2 * config.max_source_positions
    whole = frames / FEATURES_A_SECOND
    seconds = filling.take("seconds", whole, "every sample is padded or cut to that")
    if seconds > whole:
        raise ConfigError(
            f"seconds={seconds:g} is over the {whole:g} s that {filling.model} hears at once",
            hint=f"use seconds={whole:g}: longer audio is cut into samples of that length",
        )
    if filling.shape.seq is not None:
        filling.take("target", filling.shape.seq, "seq counts the tokens of a speech model's transcript")
    if filling.shape.seq not in (None, filling.shape.target):
        raise ConfigError(
            f"seq={filling.shape.seq} and target={filling.shape.target} both count the transcript", hint="give one"
        )
    limit = config.max_target_positions
    target = filling.length("target", limit, "the longest transcript", limit, "max_target_positions")
    batch, special = filling.batch(), special_ids(config)

    def make() -> dict[str, torch.Tensor]:
        features = noise(batch, config.num_mel_bins, frames)
        return {"input_features": features, "labels": token_ids(batch, target, config.vocab_size, special)}

    padded = f"samples of {seconds:g} s are padded to {whole:g} s" if seconds < whole else ""
    return Layout(
        shape=filling.shape,
        batch=make,
        limits={"target": limit},
        choices=tuple(filling.choices),
        notes=(padded,) if padded else (),
        facts={"tokens": target, "frames": frames},
    )


def lay_out_waveform(filling: Filling, config: Any, task: str, cls: type) -> Layout:
    """Lay out a batch of waveforms: input_values (batch, 16000 x seconds) and labels of CTC or of classes."""
    filling.refuse("image", "images", "target")
    if not hasattr(config, "conv_stride") or not _waveform(cls):
        raise _unknown(filling)
    seconds = filling.take("seconds", 10, "a usual length of speech")
    values = round(RATE * seconds)
    frames = _frames(values, config)
    if frames < 1:
        raise ConfigError(
            f"seconds={seconds:g} gives {filling.model} not one frame",
            hint="use samples of a tenth of a second or more",
        )
    batch = filling.batch()
    if task != "ctc":
        filling.refuse("seq")
    labels = _transcript(filling, frames, seconds) if task == "ctc" else 0
    special = special_ids(config)

    def make() -> dict[str, torch.Tensor]:
        if task == "ctc":
            return {
                "input_values": noise(batch, values),
                "labels": token_ids(batch, labels, config.vocab_size, special),
            }
        return {"input_values": noise(batch, values), "labels": class_ids(batch, config.num_labels)}

    return Layout(
        shape=filling.shape,
        batch=make,
        choices=tuple(filling.choices),
        notes=("samples have one length, so no attention_mask is passed",),
        facts={"frames": frames, "tokens": labels},
    )


def _transcript(filling: Filling, frames: int, seconds: float) -> int:
    usual = max(1, min(frames // 2, round(LETTERS_A_SECOND * seconds)))
    labels = int(filling.take("seq", usual, f"{LETTERS_A_SECOND} letters a second"))
    if labels > frames:
        raise ConfigError(
            f"seq={labels} labels do not fit the {frames} frames of {seconds:g} s: CTC needs one frame a label",
            hint=f"use seq={frames} or less, or longer samples",
        )
    return labels


def _frames(values: int, config: Any) -> int:
    for kernel, stride in zip(config.conv_kernel, config.conv_stride):
        values = (values - kernel) // stride + 1
    return values


def _waveform(cls: Any) -> bool:
    import inspect

    return "input_values" in inspect.signature(cls.forward).parameters


def _unknown(filling: Filling) -> ModelError:
    return ModelError(
        f"how {filling.model} reads audio is not known here (known: Whisper, wav2vec 2.0 and its kin)",
        hint="give module:function that returns a floatline.Workload with a batch of yours",
    )
