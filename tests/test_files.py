"""Files appear whole or not at all, links are followed, and what is no file is left alone."""

import os

import pytest

from floatline.errors import RunDirectoryError
from floatline.files import check_writable, write_whole


def test_missing_directories_are_made_and_no_part_is_left(tmp_path):
    assert write_whole(tmp_path / "a/b.html", b"page").read_bytes() == b"page"
    assert os.listdir(tmp_path / "a") == ["b.html"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.html").symlink_to(tmp_path / "real/page.html")
    write_whole(tmp_path / "link.html", b"page")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real/page.html").read_bytes() == b"page"


@pytest.mark.parametrize("write", [check_writable, lambda path: write_whole(path, b"page")])
def test_a_pipe_or_a_device_is_not_replaced(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunDirectoryError, match="it is a device or a pipe, not a file\nhint: give a path"):
        write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(RunDirectoryError, match="it is a directory"):
        write(tmp_path)


def test_a_name_that_no_file_can_have_is_one_error(tmp_path):
    with pytest.raises(RunDirectoryError, match=r"cannot write .*File name too long"):
        check_writable(tmp_path / ("x" * 300))


def test_the_root_is_a_directory():
    with pytest.raises(RunDirectoryError, match="cannot write /: it is a directory"):
        check_writable("/")
