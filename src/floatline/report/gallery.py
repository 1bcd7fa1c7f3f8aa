"""Sample answers as cards: which ones, and their pictures inside the page.

Wrong answers come first, since they say more. Pictures are decoded and written anew, so that only pictures get into
the page, large ones become thumbnails, and the page stays small whatever the samples hold.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from floatline.report.load import RunData
from floatline.report.need import need
from floatline.report.records import Sample

CARDS = 48
WRONG_CARDS = 32
SIDE = 320
SMALL = 96
IMAGE_BUDGET = 700_000


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a card: `uri` is empty where there is none to show, and `missing` says why."""

    uri: str = ""
    missing: str = ""
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Card:
    """One sample as the page shows it."""

    sample: Sample
    pictures: tuple[Picture, ...]
    tone: str
    symbol: str
    word: str


def pick(samples: Sequence[Sample], cards: int = CARDS) -> list[Sample]:
    """Choose what to show: wrong answers first, and room for some right ones.

    Args:
        samples: All samples.
        cards: How many to show.

    Returns:
        At most `cards` samples: wrong, unjudged, right.
    """
    wrong = [sample for sample in samples if sample.correct is False]
    rest = [sample for sample in samples if sample.correct is None] + [s for s in samples if s.correct]
    most = max(cards * WRONG_CARDS // CARDS, cards - len(rest))
    return (wrong[:most] + rest)[:cards]


def gallery(run: RunData, *, cards: int = CARDS, budget: int = IMAGE_BUDGET) -> list[Card]:
    """Make the cards of one run.

    Args:
        run: The run.
        cards: How many at most.
        budget: How many bytes all pictures together may take in the page.

    Returns:
        The cards in the order they are shown.

    Raises:
        ConfigError: Pillow is not installed (it comes with matplotlib).
    """
    known: dict[str, Picture] = {}
    result = []
    for sample in pick(run.samples, cards):
        pictures = []
        for place in sample.images[:4]:
            picture = known.get(place) or _picture(run.path, place)
            budget -= len(picture.uri)
            if budget < 0 and picture.uri:
                picture = Picture(missing="left out to keep the page small")
            known[place] = picture
            pictures.append(picture)
        tone, symbol, word = _judgement(sample.correct)
        result.append(Card(sample=sample, pictures=tuple(pictures), tone=tone, symbol=symbol, word=word))
    return result


def _judgement(correct: bool | None) -> tuple[str, str, str]:
    if correct is None:
        return "info", "·", "not judged"
    return ("good", "✓", "right") if correct else ("bad", "✗", "wrong")


def _picture(base: Path, place: str) -> Picture:
    image_module = need("PIL.Image")
    try:
        path = next((path for path in (base / place, Path(place)) if path.is_file()), None)
        if path is None:
            return Picture(missing=f"not found: {Path(place).name}")
        with image_module.open(path) as image:
            return _encode(image)
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError):
        return Picture(missing=f"cannot be read: {Path(place).name}")


def _encode(image: Any) -> Picture:
    image.draft("RGB", (SIDE * 2, SIDE * 2))
    small = max(image.size) <= SMALL
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    image.thumbnail((SIDE, SIDE))
    png = io.BytesIO()
    image.save(png, format="PNG", optimize=True)
    data, kind = png.getvalue(), "png"
    if len(data) > 24_000:
        jpeg = io.BytesIO()
        image.convert("RGB").save(jpeg, format="JPEG", quality=80)
        data, kind = jpeg.getvalue(), "jpeg"
    return Picture(uri=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", small=small)
