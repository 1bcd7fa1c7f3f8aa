import base64
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from floatline.report import load_run
from floatline.report.gallery import Picture, gallery, pick
from floatline.report.records import Sample

from .conftest import MakeRun, draw


def sample(correct: bool | None, *images: str) -> Sample:
    return Sample(images=images, question="q", answer="a", truth="t", correct=correct, kind="digit")


def line(*images: str) -> dict:
    return {"images": list(images), "question": "q", "answer": "a", "truth": "t", "correct": True, "kind": "digit"}


def pictures(make_run: MakeRun, *places: str, budget: int = 10**6) -> list[Picture]:
    run = load_run(make_run(samples=[line(place) for place in places]))
    return [card.pictures[0] for card in gallery(run, budget=budget)]


def size_of(picture: Picture) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.split(",")[1]))).size


def test_wrong_ones_first_and_room_for_right_ones() -> None:
    shown = pick([*[sample(True)] * 100, *[sample(False)] * 100, sample(None)])
    assert len(shown) == 48
    assert [s.correct for s in shown] == [False] * 32 + [None] + [True] * 15


@pytest.mark.parametrize("correct", [True, False, None])
def test_one_kind_alone_fills_the_gallery(correct: bool | None) -> None:
    assert len(pick([sample(correct)] * 100)) == 48


def test_pictures_are_found_in_the_run_directory_and_elsewhere(make_run: MakeRun, tmp_path: Path) -> None:
    run = load_run(make_run(samples=2))
    assert all(card.pictures[0].uri.startswith("data:image/png;base64,") for card in gallery(run))
    far = draw(tmp_path / "far away.png", 1)
    beside = os.path.relpath(draw(tmp_path / "beside.png", 2))
    for picture in pictures(lambda **k: make_run("other", **k), str(far), beside):
        assert size_of(picture) == (32, 16) and picture.small


def test_large_pictures_become_thumbnails(make_run: MakeRun, tmp_path: Path) -> None:
    noise = Image.frombytes("RGB", (1600, 800), os.urandom(1600 * 800 * 3))
    noise.save(tmp_path / "noise.png")
    (picture,) = pictures(make_run, str(tmp_path / "noise.png"))
    assert size_of(picture) == (320, 160) and not picture.small
    assert len(picture.uri) < 100_000


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_any_mode(make_run: MakeRun, tmp_path: Path, mode: str) -> None:
    Image.new(mode, (20, 10)).save(tmp_path / "picture.tiff")
    (picture,) = pictures(make_run, str(tmp_path / "picture.tiff"))
    assert size_of(picture) == (20, 10)


def test_what_is_no_picture_is_named_and_never_shown(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not for the page")
    cut = draw(tmp_path / "cut.png", 0)
    cut.write_bytes(cut.read_bytes()[:60])
    places = ["gone.png", str(tmp_path / "secret.txt"), str(cut), "a\0b", "x" * 5000, str(tmp_path), ""]
    shown = pictures(make_run, *places)
    assert all(not picture.uri and picture.missing for picture in shown)
    assert shown[0].missing == "not found: gone.png"
    assert shown[1].missing == "cannot be read: secret.txt"


def test_the_budget_holds(make_run: MakeRun, tmp_path: Path) -> None:
    places = []
    for index in range(10):
        Image.frombytes("L", (100, 100), os.urandom(10_000)).save(tmp_path / f"{index}.png")
        places.append(str(tmp_path / f"{index}.png"))
    shown = pictures(make_run, *places, budget=50_000)
    assert sum(len(picture.uri) for picture in shown) <= 50_000
    assert shown[0].uri and shown[-1].missing == "left out to keep the page small"
