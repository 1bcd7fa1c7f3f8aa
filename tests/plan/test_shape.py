"""Shapes: what is refused, how they are read and printed, and that every open size gets a reason."""

import pytest

from floatline.errors import ConfigError
from floatline.plan.shape import Filling, Shape, parse_image


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 0},
        {"seq": -1},
        {"batch": 1.5},
        {"batch": True},
        {"batch": 10**21},
        {"images": -1},
        {"image": (0, 4)},
        {"image": (4,)},
        {"seconds": 0},
        {"seconds": float("nan")},
    ],
)
def test_impossible_sizes_are_refused_by_name(sizes):
    (name,) = sizes
    with pytest.raises(ConfigError, match=f"^{name}="):
        Shape(**sizes)


def test_a_shape_prints_what_was_given():
    assert str(Shape(batch=2, image=(1024, 768), seconds=2.5)) == "batch 2, image 1024x768, seconds 2.5"
    assert str(Shape()) == ""


def test_images_are_read_as_height_by_width():
    assert parse_image("1024x768") == (1024, 768)
    assert parse_image(" 448 ") == (448, 448)
    for text in ("big", "12x", "1x2x3", "-4x4", ""):
        with pytest.raises(ConfigError, match="HEIGHTxWIDTH"):
            parse_image(text)


def test_what_was_asked_stays_and_what_was_open_gets_a_reason():
    filling = Filling(Shape(batch=3), "toy")
    assert filling.batch() == 3 and filling.choices == []
    assert filling.length("seq", 2048, "usual", 512, "n_positions") == 512
    assert [str(choice) for choice in filling.choices] == ["seq 512: the longest it takes (n_positions)"]


def test_a_length_over_the_limit_names_the_limit():
    with pytest.raises(ConfigError, match=r"seq=513 is over the 512 positions of toy \(n_positions=512\)") as caught:
        Filling(Shape(seq=513), "toy").length("seq", 2048, "usual", 512, "n_positions")
    assert "seq=512" in caught.value.hint


def test_no_limit_refuses_nothing():
    assert Filling(Shape(seq=10**7), "toy").length("seq", 2048, "usual", None, "") == 10**7


def test_a_size_that_means_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"toy takes no image, but image=\(8, 8\) was given"):
        Filling(Shape(image=(8, 8)), "toy").refuse("target", "image")
