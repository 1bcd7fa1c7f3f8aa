"""Bundles: a condemned step in a file, to be run again later, elsewhere.

    findings/update-00000051/
      bundle.pt      the micro-batches and the random state before each, policy and loss scale, buffers, weights
      manifest.json  what is in it, what was left out and why, for people
      finding.json   what a diagnosis found, once there was one

A bundle is written under a temporary name and renamed, so it is there whole or not at all. It is read with
`weights_only=True`: tensors and plain values, no code. What would make it larger than its cap is left out (room.py),
the weights first; of these the newest checkpoint is named instead: the replay then runs on weights that are some
updates older.

Not covered: batches of anything but tensors and plain values (what else is in one is left out, by name), and shards.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from floatline.diagnose.room import Room
from floatline.errors import BundleError, PrecisionError
from floatline.files import write_whole
from floatline.precision import Policy
from floatline.step.sentinel import Judged, Rerun
from floatline.step.step import TrainStep
from floatline.step.verdict import Skip

VERSION = 1
FILE = "bundle.pt"
FINDING = "finding.json"
MANIFEST = "manifest.json"
MOST_BYTES = 2**31
_TENSORS = (torch.Tensor, nn.Parameter)
_KINDS: Mapping[str, Any] = {
    "update": int, "what": str, "reason": str, "suspects": tuple, "precision": str, "loss_scale": float | None,
    "weights": dict | None, "buffers": dict, "checkpoint": str, "late": bool, "left_out": tuple, "versions": dict,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A condemned step.

    Attributes:
        update: Its index.
        what: "loss", "gradient" or "buffer".
        reason: As a sentence.
        reruns: Its micro-batches with their random states; the batch is None where it did not fit.
        suspects: Indices of those whose loss was not finite; empty where that is not known.
        precision: The policy, as its string.
        loss_scale: Of that update, None without scaling.
        weights: By name; None where they were too large.
        buffers: As before the forward; empty where they did not fit.
        checkpoint: The newest checkpoint then, relative to the run directory; "" without one.
        late: The next update had been run, and made if it was good: the verdict of a CUDA step is read one step later.
        left_out: What could not be kept, each with its reason in brackets.
        versions: Of torch, python and the device.
    """

    update: int
    what: str
    reason: str
    reruns: tuple[Rerun, ...]
    suspects: tuple[int, ...] = ()
    precision: str = "32-true"
    loss_scale: float | None = None
    weights: Mapping[str, torch.Tensor] | None = None
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    checkpoint: str = ""
    late: bool = False
    left_out: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def bundle_of(step: TrainStep, skip: Skip, judged: Judged, *, checkpoint: str = "", cap: int = MOST_BYTES) -> Bundle:
    """Return the bundle of a condemned step, in host memory.

    Args:
        step: It, just after the verdict.
        skip: The verdict.
        judged: What was judged.
        checkpoint: The newest checkpoint, to be named where weights are too large.
        cap: Bytes that all of it may have.
    """
    odd: list[str] = []
    room = Room(cap)
    reruns = _fitting_reruns(judged.reruns, skip.micro_batches, room, odd)
    buffers = {name: tensor.detach() for name, tensor in step.model.named_buffers()}
    weights = {name: tensor.detach() for name, tensor in step.model.named_parameters()}
    buffers_fit, weights_fit = room.take("the buffers", buffers), room.take("the weights", weights)
    return Bundle(
        update=skip.step,
        what=skip.what.value,
        reason=skip.reason,
        reruns=reruns,
        suspects=skip.micro_batches,
        precision=str(step.policy),
        loss_scale=judged.scale,
        weights={name: tensor.cpu() for name, tensor in weights.items()} if weights_fit else None,
        buffers={name: tensor.cpu() for name, tensor in buffers.items()} if buffers_fit else {},
        checkpoint=checkpoint,
        late=judged.late,
        left_out=(*odd, *room.left_out),
        versions={"torch": str(torch.__version__), "device": _device_name(step.device)},
    )


def _fitting_reruns(reruns: Sequence[Rerun], at_fault: Sequence[int], room: Room, odd: list[str]) -> tuple[Rerun, ...]:
    """Return micro-batches as plain values, those at fault first to find room."""
    kept: dict[int, Rerun] = {}
    for place in sorted(range(len(reruns)), key=lambda place: place not in at_fault):
        name = f"micro-batch {place}"
        batch = _plain(reruns[place].batch, name, odd)
        fits = room.take(name, [batch, reruns[place].random])
        kept[place] = Rerun(batch if fits else None, reruns[place].random)
    return tuple(kept[place] for place in range(len(reruns)))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _plain(value: Any, path: str, left_out: list[str]) -> Any:
    """Return a batch as tensors and plain values on the host; an enum or numpy's float is one."""
    if isinstance(value, torch.Tensor):
        return _whole(value) if type(value) in _TENSORS else _tell(value, path, left_out)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if hasattr(value, "items"):
        return {_key(key): _plain(inner, f"{path}.{key}", left_out) for key, inner in dict(value.items()).items()}
    if isinstance(value, (list, tuple)):
        inner = [_plain(each, f"{path}[{i}]", left_out) for i, each in enumerate(value)]
        return inner if isinstance(value, list) else tuple(inner)
    return _tell(value, path, left_out)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host without the rest of the storage that it may be a view of."""
    plain = tensor.detach().as_subclass(torch.Tensor).cpu()
    return plain.clone() if plain.untyped_storage().nbytes() > plain.numel() * plain.element_size() else plain


def _key(key: Any) -> Any:
    return key if type(key) in (int, str) else str(key)


def _tell(value: Any, path: str, left_out: list[str]) -> None:
    left_out.append(f"{path} ({type(value).__name__})")


def save_bundle(bundle: Bundle, directory: Path) -> Path:
    """Write a bundle as a new directory below `directory`; returns its path.

    Raises:
        BundleError: It cannot be written; nothing is left behind.
    """
    final = directory / f"update-{bundle.update:08d}"
    temporary = directory / f".writing-{bundle.update:08d}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        values = {**vars(bundle), "reruns": [{"batch": r.batch, "random": list(r.random)} for r in bundle.reruns],
                  "weights": dict(bundle.weights) if bundle.weights is not None else None,
                  "buffers": dict(bundle.buffers), "versions": dict(bundle.versions), "version": VERSION}  # fmt: skip
        with (temporary / FILE).open("wb") as file:
            torch.save(values, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / MANIFEST).write_text(json.dumps(_manifest(bundle), indent=1, default=str) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # of an update that was made again after a rollback
        temporary.rename(final)
    except (OSError, RuntimeError, TypeError, pickle.PicklingError) as error:
        free = _free(directory)  # torch's writer does not say that the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise BundleError(
            f"the bundle of update {bundle.update} could not be written to {directory}: {error}{free}",
            hint="make room there; the run itself goes on",
        ) from error
    return final


def _free(directory: Path) -> str:
    try:
        return f" ({shutil.disk_usage(directory).free / 2**20:.0f} MiB were free on that disk)"
    except OSError:
        return ""


def _manifest(bundle: Bundle) -> dict[str, Any]:
    """Return what a bundle holds and what it does not, as plain values."""
    batches = [place for place, rerun in enumerate(bundle.reruns) if rerun.batch is not None]
    large = ("reruns", "weights", "buffers")
    plain = {key: value for key, value in vars(bundle).items() if key not in large}
    holds = {"micro_batches": batches, "weights": bundle.weights is not None, "buffers": len(bundle.buffers)}
    return {"version": VERSION, **plain, "versions": dict(bundle.versions), "holds": holds}


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle.

    Args:
        path: Its directory, or the file in it.

    Raises:
        BundleError: There is none, it is damaged, holds more than plain values, or is of another version.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        values = torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise BundleError(f"{path} holds no bundle", hint="pass a directory below findings/ of a run") from None
    except pickle.UnpicklingError as error:
        raise BundleError(
            f"{file} is not loaded: it is damaged, or holds something other than tensors and plain values",
            hint="nothing in it was run; take the bundle from the run that made it",
        ) from error
    except Exception as error:  # damaged bytes may raise anything in the unpickler
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(f"{file} cannot be read: {said}", hint="it may be cut short") from error
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise BundleError(f"{file} is no bundle of version {VERSION}", hint="read it with the Floatline that wrote it")
    try:
        reruns = tuple(Rerun(rerun["batch"], tuple(rerun["random"])) for rerun in values.pop("reruns"))
        bundle = Bundle(reruns=reruns, **values)
        _check(bundle)
    except (TypeError, KeyError, PrecisionError) as error:
        said = error.message if isinstance(error, PrecisionError) else str(error)
        raise BundleError(f"{file} is no bundle: {said}", hint="pass a directory below findings/ of a run") from error
    return bundle


def _check(bundle: Bundle) -> None:
    """Say what is not as `save_bundle` writes it; a file from elsewhere may hold anything.

    Raises:
        TypeError: That.
        PrecisionError: Its policy.
    """
    for name, kind in _KINDS.items():
        if not isinstance(value := getattr(bundle, name), kind):
            raise TypeError(f"its {name} is a {type(value).__name__}")
    tensors = [
        *(bundle.weights or {}).values(),
        *bundle.buffers.values(),
        *(t for r in bundle.reruns for t in r.random),
    ]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise TypeError("not all of its weights, buffers and random states are tensors")
    if not all(tensor.dtype == torch.uint8 for rerun in bundle.reruns for tensor in rerun.random):
        raise TypeError("its random states are none")
    if bundle.loss_scale is not None and not 0.0 < bundle.loss_scale < float("inf"):
        raise TypeError(f"its loss_scale is {bundle.loss_scale}")
    Policy.parse(bundle.precision)
    if not all(isinstance(place, int) and 0 <= place < len(bundle.reruns) for place in bundle.suspects):
        raise TypeError(f"its suspects are {bundle.suspects}, of {len(bundle.reruns)} micro-batches")


def write_finding(path: Path, finding: Mapping[str, Any]) -> None:
    """Put what a diagnosis found beside a bundle, atomically."""
    write_whole(path / FINDING, (json.dumps(finding, indent=1, default=str) + "\n").encode())


def put_into(bundle: Bundle, model: nn.Module) -> None:
    """Give a model the weights and buffers of a bundle, in place.

    Raises:
        BundleError: They are another model's.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = {**(bundle.weights or {}), **bundle.buffers}
    other = [name for name, tensor in saved.items() if name not in own or own[name].shape != tensor.shape]
    if other:
        raise BundleError(
            f"the bundle is of another model: {other[0]} of shape {tuple(saved[other[0]].shape)} is not in this one",
            hint="build the model as the run did, adapters and techniques included",
        )
    lacking = [name for name, _ in model.named_parameters() if bundle.weights is not None and name not in saved]
    if lacking:
        raise BundleError(
            f"the bundle is of another model: it has no {lacking[0]}, which this one has",
            hint="build the model as the run did, adapters and techniques included",
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(tensor)
