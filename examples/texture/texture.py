"""A texture pipeline: what an image holds besides its colours, as plain functions of tensors.

    rgb        3   the image
    position   2   x and y, -1 to 1
    edges      1   Sobel magnitude; `flat` is 1 minus that
    low, high  1+1 blurred brightness, and what is left
    gabor      4   responses to waves of four directions
              13   channels in all with `flat`
    histogram      share of the pixels in each of 64 bins, for each colour
    outline        edges above a threshold: a decision, pixel by pixel

It is written as people write it, with no thought of precision: `fl.audit_function(texture, inputs)` says what becomes
of it in bf16 and fp16 (benchmarks/audit_texture.py).

The photographs are those that scikit-image ships. Only its files are read; the package is not imported.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png")
BINS = 64
EDGE = 0.1


def texture(image: torch.Tensor, bank: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the features of an image.

    Args:
        image: (3, height, width), 0 to 1.
        bank: (4, 1, side, side), from `gabor_bank`.
    """
    grey = brightness(image)
    edges = sobel(grey)
    low = blur(grey)
    return {
        "rgb": image.clone(),
        "position": position(image),
        "edges": edges,
        "flat": 1 - edges,
        "low": low,
        "high": grey - low,
        "gabor": F.conv2d(grey[None, None], bank, padding=bank.shape[-1] // 2)[0],
        "histogram": histogram(image),
        "outline": edges > EDGE,
    }


def brightness(image: torch.Tensor) -> torch.Tensor:
    """Return (height, width): the luma of ITU-R BT.601."""
    return 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]


def position(image: torch.Tensor) -> torch.Tensor:
    """Return (2, height, width): x and y of each pixel, -1 to 1."""
    _, height, width = image.shape
    y = torch.linspace(-1, 1, height)
    x = torch.linspace(-1, 1, width)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def sobel(grey: torch.Tensor) -> torch.Tensor:
    """Return (height, width): the length of the gradient, 1 for a step from black to white."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    both = torch.stack([kernel, kernel.T])[:, None]
    gradient = F.conv2d(F.pad(grey[None, None], (1, 1, 1, 1), mode="replicate"), both)[0]
    return (gradient[0] ** 2 + gradient[1] ** 2 + 1e-8).sqrt()


def blur(grey: torch.Tensor, sigma: float = 3.0) -> torch.Tensor:
    """Return (height, width): a Gaussian mean."""
    reach = int(3 * sigma)
    place = torch.arange(-reach, reach + 1.0)
    weights = torch.exp(-(place**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    padded = F.pad(grey[None, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, weights[None, None, None]), weights[None, None, :, None])[0, 0]


def histogram(image: torch.Tensor) -> torch.Tensor:
    """Return (3, BINS): the share of the pixels in each bin."""
    pixels = image.reshape(3, -1)
    bins = (pixels * BINS).long().clamp(0, BINS - 1)
    counts = torch.zeros(3, BINS)
    counts = counts.scatter_add(1, bins, torch.ones_like(pixels))
    return counts / pixels.shape[1]


def gabor_bank(side: int = 15, wavelength: float = 6.0, sigma: float = 3.0) -> torch.Tensor:
    """Return (4, 1, side, side): waves under a bell, one for each of four directions, of mean 0 and absolute sum 1."""
    reach = side // 2
    y, x = torch.meshgrid(torch.arange(-reach, reach + 1.0), torch.arange(-reach, reach + 1.0), indexing="ij")
    bell = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
    waves = []
    for quarter in range(4):
        along = x * math.cos(quarter * math.pi / 4) + y * math.sin(quarter * math.pi / 4)
        wave = torch.cos(2 * math.pi * along / wavelength) * bell
        wave = wave - bell * wave.sum() / bell.sum()
        waves.append(wave / wave.abs().sum())
    return torch.stack(waves)[:, None]


def photograph(name: str) -> torch.Tensor:
    """Return (3, height, width), 0 to 1, of a photograph that scikit-image ships.

    Raises:
        FileNotFoundError: scikit-image is not installed.
    """
    import numpy
    from PIL import Image

    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("scikit-image is not installed: pip install --no-deps -r requirements-weights.txt")
    with Image.open(Path(found.submodule_search_locations[0]) / "data" / name) as picture:
        pixels = numpy.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
