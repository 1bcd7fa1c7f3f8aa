"""How far a texture pipeline is off in bf16 and fp16, on real photographs, feature by feature.

    python benchmarks/audit_texture.py [--photos astronaut.png ...] [--json FILE]

The pipeline is examples/texture/texture.py, the photographs are those that scikit-image ships
(`pip install --no-deps -r requirements-weights.txt`). `fl.audit_function` in both modes, for an L4: mixed is autocast
by CUDA's lists, true casts all inputs. Relative RMSE and largest error are against fp64, the worst of the photographs;
of an outline the share of pixels that come out otherwise.

The guide's claim about such a pipeline under bf16 autocast: largest difference from fp32 0.000534, mean 0.000088.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import floatline as fl
from common import print_table, progress, report
from floatline.audit.function_report import percent

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "texture"))

import texture as pipeline

PACKAGES = ("floatline", "torch", "scikit-image", "pillow")
SMALL = ("astronaut.png", "chelsea.png", "coffee.png")


def figures(photo: str, mode: str) -> list[dict[str, Any]]:
    """Audit the pipeline on a photograph; return a row for each feature and format."""
    inputs = {"image": pipeline.photograph(photo), "bank": pipeline.gabor_bank()}
    found = fl.audit_function(pipeline.texture, inputs, mode=mode, hardware="l4")
    rows = []
    for name, candidate in found.candidates.items():
        lines = [f"{Path(place.file).name}:{place.line} {place.code}" for place in candidate.lines or ()]
        advised = candidate.effect.outputs if candidate.effect is not None else candidate.all_lowered.outputs
        for own, low, kept in zip(found.fp32, candidate.all_lowered.outputs, advised):
            rows.append({
                "photo": photo, "mode": mode, "format": name, "feature": low.name.split("'")[1],
                "fp32": own.relative, "relative": low.relative, "largest": low.largest, "flipped": low.flipped,
                "decisions": low.decisions, "advised": kept.relative, "advised_flipped": kept.flipped, "lines": lines,
                "seconds": found.seconds, "passes": dict(found.passes),
            })  # fmt: skip
    return rows


def guides_test(photo: str) -> dict[str, float]:
    """Return the guide's own figures: bf16 autocast against fp32, largest and mean difference over all channels."""
    image, bank = pipeline.photograph(photo), pipeline.gabor_bank()
    plain = pipeline.texture(image, bank)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = pipeline.texture(image, bank)
    off = torch.cat([(low[k].float() - plain[k]).abs().reshape(-1) for k in plain if plain[k].is_floating_point()])
    return {"largest": float(off.max()), "mean": float(off.mean())}


def worst(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a line for each mode, format and feature: the worst of the photographs."""
    lines = []
    for mode, name, feature in dict.fromkeys((r["mode"], r["format"], r["feature"]) for r in rows):
        own = [r for r in rows if (r["mode"], r["format"], r["feature"]) == (mode, name, feature)]
        if own[0]["decisions"]:
            share = max(r["flipped"] / r["decisions"] for r in own)
            kept = max(r["advised_flipped"] / r["decisions"] for r in own)
            lines.append([f"{name}-{mode}", feature, "-", "-", f"{percent(share)} flip", f"{percent(kept)} flip"])
        else:
            lines.append([
                f"{name}-{mode}", feature, percent(max(r["relative"] for r in own)),
                f"{max(r['largest'] for r in own):.2g}", "-", percent(max(r["advised"] for r in own)),
            ])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", nargs="*", default=list(SMALL), choices=list(pipeline.PHOTOGRAPHS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for photo in given.photos:
        for mode in ("mixed", "true"):
            progress(f"{photo} {mode}")
            rows += figures(photo, mode)
    print_table(
        ["format", "feature", "relative RMSE", "largest error", "decisions", "with its fp32 lines"], worst(rows)
    )
    print()
    for mode, name in dict.fromkeys((r["mode"], r["format"]) for r in rows):
        for photo in given.photos:
            own = next(r for r in rows if (r["photo"], r["mode"], r["format"]) == (photo, mode, name))
            print(f"{name}-{mode}, {photo}: fp32 lines: {'; '.join(own['lines']) or 'none'}")
    guide = {photo: guides_test(photo) for photo in given.photos}
    print()
    for photo, found in guide.items():
        print(f"the guide's test, {photo}: largest {found['largest']:.2g}, mean {found['mean']:.2g}")
    report(rows, PACKAGES, given.json, threads=given.threads, guides_test=guide)


if __name__ == "__main__":
    main()
