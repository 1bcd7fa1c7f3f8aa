"""Open an image file as RGB, or say why that cannot be done.

Training and checking open images by the same code, so an image that passed the check before a run does not fail in it.
A file is decoded completely: a truncated file has a sound header, and only decoding shows where it ends.

Not covered: video, animation (the first frame counts), sizes beyond Pillow's decompression-bomb limit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from floatline.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


class BadImage(Exception):
    """An image that cannot be used: why, and what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


def open_image(path: Path, *, max_pixels: int | None = None) -> Image:
    """Return an image as RGB, upright (EXIF orientation applied), transparency over white.

    Args:
        path: The file.
        max_pixels: Refuse larger images, before they are decoded; None accepts all.

    Raises:
        BadImage: No such file, not an image, truncated, or larger than `max_pixels`.
        ConfigError: Pillow is not installed.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise BadImage(f"image {path} {what}", "relative image paths start at the JSONL's directory")
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ConfigError("images need Pillow, which is not installed", hint='pip install "floatline[train]"') from None
    try:
        with Image.open(path) as image:
            _check_size(image, path, max_pixels)
            image.load()
            return _flatten(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"image {path}: {error}", "resize the image") from None
    except Exception as error:  # by format and damage: OSError, SyntaxError, ValueError, struct.error, EOFError ...
        reason = str(error) or type(error).__name__
        raise BadImage(f"image {path} cannot be read: {reason}", "replace the file or leave the sample out") from None


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) in pixels of an image as `open_image` gives it, read from its header alone.

    Raises:
        BadImage: No such file, or not an image.
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import ExifTags, Image
    except ImportError:
        raise ConfigError("images need Pillow, which is not installed", hint='pip install "floatline[train]"') from None
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # as in open_image
        raise BadImage(f"image {path} cannot be read: {error}", "replace the file or leave the sample out") from None


def _check_size(image: Image, path: Path, max_pixels: int | None) -> None:
    pixels = image.width * image.height
    if max_pixels is not None and pixels > max_pixels:
        raise BadImage(
            f"image {path} has {image.width} x {image.height} = {pixels} pixels, "
            f"more than data.max_pixels={max_pixels}",
            f"set data.max_pixels={pixels} or resize the image",
        )


def _flatten(image: Image) -> Image:
    """RGB, with transparent parts over white: plain `convert` shows whatever colour lies under them."""
    from PIL import Image as module

    if not image.has_transparency_data:
        return image.convert("RGB")
    white = module.new("RGBA", image.size, "white")
    return module.alpha_composite(white, image.convert("RGBA")).convert("RGB")
