"""cuBLAS workspaces in bytes."""

import pytest

from floatline.errors import ConfigError
from floatline.hardware import Hardware, lookup
from floatline.observe.target import workspaces

MIB = 2**20


@pytest.mark.parametrize(
    ("gpu", "one"),
    [("t4", 8_519_680), ("a100", 8_519_680), ("4090", 8_519_680), ("h100", 32 * MIB), ("b200", 32 * MIB)],
)
def test_one_for_forward_and_one_for_backward(gpu, one):
    assert workspaces(lookup(gpu)) == 2 * one
    assert workspaces(lookup(gpu), training=False) == one


def test_a_cpu_has_none():
    assert workspaces(Hardware(name="cpu", kind="cpu")) == 0


@pytest.mark.parametrize(("config", "one"), [(":4096:8", 32 * MIB), (":4096:2:16:8", 8_519_680), (":0:0", 0)])
def test_cublas_own_setting(config, one):
    assert workspaces(lookup("t4"), config=config) == 2 * one


@pytest.mark.parametrize("config", ["4096:8", ":4096", ":4096:8:", "", ":a:b"])
def test_a_malformed_setting_is_refused(config):
    with pytest.raises(ConfigError, match=r"is not a list of :KiB:count\nhint: write it as :4096:8"):
        workspaces(lookup("t4"), config=config)
