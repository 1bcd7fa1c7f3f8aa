"""Look at every sample before training starts, so that a run does not die of its data at step 30 000.

Each distinct image file is opened once and decoded completely, in a few threads (Pillow decodes outside the GIL); each
answer is tokenised. Only with a `max_length` are whole samples encoded, for nothing less knows how many tokens an image
becomes.

Not covered: files that change after the check; they are a DataError when their batch is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from floatline.errors import ConfigError, DataError
from floatline.train.data.encode import SampleEncoder
from floatline.train.data.images import BadImage, open_image
from floatline.train.data.samples import BadSample, Sample, read_samples

OnBadSample = Literal["stop", "skip"]


@dataclass(frozen=True)
class CheckResult:
    """The samples to train on, and those left out, both in the file's order."""

    good: list[Sample]
    bad: list[BadSample]


def load_samples(
    path: str | Path,
    *,
    encoder: SampleEncoder | None = None,
    max_pixels: int | None = None,
    on_bad_sample: OnBadSample = "stop",
    kind_key: str = "kind",
) -> CheckResult:
    """Read and check a messages JSONL: `read_samples`, then `check_samples`.

    Lines with a wrong shape are bad samples as well: with "skip" they are left out and listed.

    Args:
        path: The JSONL.
        encoder: Its limits apply; None checks images only.
        max_pixels: Largest image (width times height) that is accepted; None accepts all.
        on_bad_sample: "stop" or "skip".
        kind_key: Key of a line that holds its kind.

    Raises:
        DataError: As `read_samples` and `check_samples`.
    """
    lines: list[BadSample] = []
    samples = read_samples(path, kind_key=kind_key, bad=lines)
    return check_samples(samples, encoder=encoder, max_pixels=max_pixels, on_bad_sample=on_bad_sample, bad_lines=lines)


def check_samples(
    samples: Sequence[Sample],
    *,
    encoder: SampleEncoder | None = None,
    max_pixels: int | None = None,
    on_bad_sample: OnBadSample = "stop",
    bad_lines: Iterable[BadSample] = (),
) -> CheckResult:
    """Find the samples that cannot be trained on.

    Args:
        samples: What `read_samples` returned.
        encoder: Its `max_answer_tokens` and `max_length` apply; None checks images only.
        max_pixels: Largest image (width times height) that is accepted; None accepts all.
        on_bad_sample: "stop" raises for the first bad sample; "skip" leaves bad ones out.
        bad_lines: Lines that were bad already when they were read.

    Returns:
        Good and bad samples.

    Raises:
        DataError: A sample is bad and `on_bad_sample` is "stop", or all samples are bad.
        ModelError: The chat template does not fit (see encode.py).
        ConfigError: `on_bad_sample` is neither.
    """
    if on_bad_sample not in ("stop", "skip"):
        raise ConfigError(f"data.on_bad_sample={on_bad_sample!r} is unknown", hint="allowed: stop, skip")
    images = _bad_images({path for sample in samples for path in sample.images}, max_pixels)
    good, bad = [], list(bad_lines)
    for sample in samples:
        problem = _problem(sample, images, encoder)
        if problem is None:
            good.append(sample)
        else:
            bad.append(problem)
    bad.sort(key=lambda found: (str(found.file), found.line))
    if bad and (on_bad_sample == "stop" or not good):
        raise _stop(bad, any_good=bool(good))
    return CheckResult(good, bad)


def _bad_images(paths: set[Path], max_pixels: int | None) -> dict[Path, BadImage]:
    def look(path: Path) -> BadImage | None:
        try:
            open_image(path, max_pixels=max_pixels)
        except BadImage as problem:
            return problem
        return None

    ordered = sorted(paths)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return {path: problem for path, problem in zip(ordered, pool.map(look, ordered)) if problem}


def _problem(sample: Sample, images: dict[Path, BadImage], encoder: SampleEncoder | None) -> BadSample | None:
    for path in sample.images:
        if path in images:
            return BadSample(sample.file, sample.line, images[path].reason, images[path].hint)
    try:
        if encoder is not None:
            encoder.check(sample)
    except DataError as error:
        reason = error.message.removeprefix(f"{sample.where}: ")
        return BadSample(sample.file, sample.line, reason, error.hint)
    return None


def _stop(bad: list[BadSample], *, any_good: bool) -> DataError:
    first, others = bad[0], len(bad) - 1
    if not any_good:
        text = f"no sample of {first.file} can be used, all {len(bad)} are bad; the first: {first}"
        return DataError(text, hint=first.hint)
    more = f" (and {others} more bad sample{'s' * (others > 1)})" if others else ""
    fix = first.hint or "correct the line"
    return DataError(f"{first}{more}", hint=f"{fix}; or leave bad samples out with data.on_bad_sample=skip")
