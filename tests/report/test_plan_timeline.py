"""The picture of an update: no peak is lost, limits are drawn where they can be seen."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from floatline.hardware import lookup
from floatline.report.plan_timeline import caption, fullest, timeline_plot, timeline_png

from . import plans


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=200),
    st.integers(1, 50),
    st.randoms(use_true_random=False),
)
def test_thinning_keeps_the_highest_of_each_stretch(pairs, count, chance) -> None:
    curves = {"a": tuple(a for a, _ in pairs), "b": tuple(b for _, b in pairs)}
    peak = chance.randrange(len(pairs))
    places = fullest(curves, peak, count)
    total = [a + b for a, b in pairs]
    assert places == sorted(set(places)) and {0, peak, len(pairs) - 1} <= set(places)
    assert len(places) <= count + 3
    assert max(total[place] for place in places) == max(total)


def test_a_limit_near_the_peak_is_drawn() -> None:
    plot = timeline_plot(plans.estimate(10, lookup("t4")))
    assert "capacity 14.6 GiB" in plot.svg and "needs 10.0 GiB" in plot.svg
    assert [key.label for key in plot.keys][-2:] == ["needs 10.0 GiB", "capacity 14.6 GiB"]


def test_a_limit_far_above_is_told() -> None:
    found = plans.estimate(2, lookup("t4"))
    plot = timeline_plot(found)
    assert "capacity" not in plot.svg.partition(">")[2]
    assert "capacity of 14.6 GiB lies far above the picture" in plot.caption
    assert "far above" not in caption(plans.estimate(10, lookup("t4")))


def test_every_category_has_a_key_and_phases_are_named() -> None:
    plot = timeline_plot(plans.estimate(10, lookup("t4")))
    labels = [key.label for key in plot.keys]
    assert labels[:5] == ["parameters", "optimizer state", "gradients", "activations", "logits"]
    assert all(phase in plot.svg for phase in ("forward", "backward", "optimizer"))
    assert "by aten.mm of model.layers.3.mlp" in plot.caption


def test_the_top_of_the_model_is_called_so() -> None:
    assert "of the top of the model" in caption(
        plans.estimate(3, lookup("t4"), timeline=plans.timeline(2**30, module=""))
    )


@pytest.mark.parametrize("title", ["tiny-gpt needs 10 GiB", "$\\frac{broken$ " * 20])
def test_a_png_stands_alone(title: str) -> None:
    image = Image.open(io.BytesIO(timeline_png(plans.estimate(10, lookup("t4")), title)))
    assert image.format == "PNG" and image.width > 1000
    colours = image.convert("RGB").resize((90, 44)).getcolors(90 * 44)
    assert colours is not None and len(colours) > 20  # something is drawn
