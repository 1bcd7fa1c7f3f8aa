from __future__ import annotations

import pytest
from PIL import Image

from floatline.train.data.images import BadImage, image_size, open_image


def test_images_come_as_rgb(tmp_path, picture):
    for mode in ("L", "P", "1", "CMYK"):
        name = picture(f"{mode}.tif", mode=mode)
        assert open_image(tmp_path / name).mode == "RGB"


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (2, 1), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 30)


def test_missing_directory_and_no_image(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name, what in (("none.png", "does not exist"), (".", "is a directory"), ("text.png", "cannot be read")):
        with pytest.raises(BadImage, match=what) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in caught.value.reason
        assert caught.value.hint


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_truncated_images_are_found(tmp_path, picture, suffix):
    path = tmp_path / picture(f"a.{suffix}")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadImage, match="cannot be read"):
        open_image(path)


def test_the_pixel_budget_is_inclusive_and_named(tmp_path, picture):
    path = tmp_path / picture(size=(20, 10))
    assert open_image(path, max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match=r"20 x 10 = 200 pixels, more than data.max_pixels=199") as caught:
        open_image(path, max_pixels=199)
    assert "data.max_pixels=200" in caught.value.hint
    assert "resize" in caught.value.hint


def test_decompression_bombs_are_refused(tmp_path, picture, monkeypatch):
    path = tmp_path / picture(size=(20, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(BadImage, match="decompression bomb") as caught:
        open_image(path)
    assert caught.value.hint == "resize the image"


def test_the_size_is_that_of_the_upright_image(tmp_path):
    from PIL import Image

    path = tmp_path / "turned.jpg"
    image = Image.new("RGB", (30, 20))
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        opened = open_image(path)
        assert image_size(path) == (opened.height, opened.width)
    path.write_bytes(b"no image")
    with pytest.raises(BadImage, match="cannot be read"):
        image_size(path)
