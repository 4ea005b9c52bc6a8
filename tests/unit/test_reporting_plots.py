"""Plots: what they say in words, the files that they make, colours and labels."""

from __future__ import annotations

import contextlib
import io
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

import tallstore
from tallstore.format.bundle_files import BundleFiles
from tallstore.reporting.drawing import LIGHT, Plot, heat, shown, shown_tensor
from tallstore.reporting.mask_plots import classes
from tallstore.reporting.measuring import measure
from tallstore.reporting.plots import plots_of
from tests.packing_cases import base_model, experts_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    base = base_model()
    experts = dict(zip(["$x_1$ & <b>", "two", "drei 日本 🙂"], experts_of(base).values(), strict=True))
    root = tmp_path_factory.mktemp("packed") / "bundle"
    tallstore.pack(base, experts, root, method=tallstore.Emr("published"))
    with contextlib.closing(BundleFiles(root)) as files:
        return measure(files)


@pytest.fixture(scope="module")
def plots(measured):
    return {plot.name: plot for plot in plots_of(measured)}


def parsed(svg):
    return ET.fromstring(svg)  # noqa: S314 - our own


def texts(svg):
    return [element.text for element in parsed(svg).iter(f"{SVG}text")]


def test_a_bundle_of_masks_has_these_plots(plots):
    assert list(plots) == ["sizes", "fidelity", "density", "agreement", "overlap", "shared"]


def test_descriptions_say_what_is_drawn(measured, plots):
    summary, masks = measured.summary, measured.masks
    assert f"{summary.ratio:.1f} times smaller" in plots["sizes"].description
    gains = [task.gain for task in summary.tasks]
    assert f"gain {min(gains):.4f} to {max(gains):.4f}" in plots["fidelity"].description
    assert f"claimed by one (selfish): {100 * masks.selfish:.1f} %" in plots["agreement"].description
    shares = [masks.similarity[one][other] for one in range(3) for other in range(one)]
    assert f"{100 * min(shares):.1f} % to {100 * max(shares):.1f} %" in plots["overlap"].description
    densities = [density for tensor in masks.tensors for density in tensor.densities]
    assert f"{100 * min(densities):.1f} % to {100 * max(densities):.1f} %" in plots["density"].description


@pytest.mark.parametrize("name", ["sizes", "fidelity", "density", "agreement", "overlap", "shared"])
def test_files_stand_alone_and_are_the_same_each_time(plots, name):
    svg = plots[name].file("svg")
    assert svg == plots[name].file("svg")
    root = parsed(svg)
    assert root.tag == f"{SVG}svg"
    assert LIGHT.background in svg.decode()
    assert not re.search(rb"#fe01|<dc:date>|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", svg)
    assert b"sans-serif" in svg
    with Image.open(io.BytesIO(plots[name].file("png"))) as picture:
        assert picture.size == (1800, round(200 * plots[name].height))
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_names_are_drawn_as_they_are(plots):
    drawn = texts(plots["fidelity"].file("svg"))
    assert {"$x_1$ & <b>", "two", "drei 日本 🙂"} <= set(drawn)


def test_values_stand_in_the_cells_of_a_small_matrix(measured, plots):
    drawn = texts(plots["overlap"].file("svg"))
    for one in range(3):
        for other in range(one):
            assert drawn.count(f"{100 * measured.masks.similarity[one][other]:.0f}") >= 2


def test_drawing_leaves_the_users_settings_alone_and_heeds_none(plots):
    before = plots["sizes"].file("svg")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert plots["sizes"].file("svg") == before
        assert mpl.rcParams["font.size"] == 30


def test_an_inline_plot_is_labelled_and_has_ids_of_its_own(plots):
    drawing = plots["sizes"].inline()
    root = parsed(drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    assert (root.find(f"{SVG}title").text, root.find(f"{SVG}desc").text) == (
        plots["sizes"].title,
        plots["sizes"].description,
    )
    assert {element.get("id", "sizes-")[:6] for element in root.iter()} == {"sizes-"}
    assert root.get("width") is None
    assert "<style" not in drawing
    assert not re.search(r"font(-family)?:", drawing)
    assert re.search(r"font-weight: (700|bold)", drawing)
    assert drawing.count("font-size: 9.5px") > 5


def test_a_title_of_an_inline_plot_is_escaped():
    drawing = Plot("x", "<a> & b", "</desc><script>", 1.0, lambda figure, _palette: figure.subplots()).inline()
    assert '<title id="x-title">&lt;a&gt; &amp; b</title>' in drawing
    assert "<script>" not in drawing


def test_heat_grows_with_the_value_and_is_clear_without_one():
    picture = heat(np.array([[0.0, 0.5, 1.0, np.nan, 7.0]]), 0.0, 1.0)
    alphas = picture[0, :, 3].tolist()
    assert alphas[0] < alphas[1] < alphas[2] == alphas[4] == round(255 * 0.8)
    assert alphas[3] == 0
    assert heat(np.full((2, 2), 0.3), 0.3, 0.3)[..., 3].min() > 0


@pytest.mark.parametrize(
    ("tasks", "labels"),
    [
        (1, ["none", "the mask"]),
        (2, ["none", "one", "all 2"]),
        (3, ["none", "one", "2", "all 3"]),
        (8, ["none", "one", "2 to 3", "4 to 5", "6 to 7", "all 8"]),
        (20, ["none", "one", "2 to 6", "7 to 11", "12 to 19", "all 20"]),
    ],
)
def test_classes_cover_every_number_of_masks_once(tasks, labels):
    found = classes(tasks)
    assert [each.label for each in found] == labels
    assert [number for each in found for number in range(each.first, each.last + 1)] == list(range(tasks + 1))


def test_names_that_are_too_long_are_cut_in_the_middle_and_tensors_at_their_beginning():
    assert shown("a short name") == "a short name"
    assert shown("x" * 20 + "y" * 20, 11) == "xxxxx…yyyyy"
    assert shown("bad \ufffe") == "bad \ufffd"
    assert shown_tensor("layers.0.weight") == "layers.0"
    assert shown_tensor("model.layers.10.self_attn.q_proj.weight", 24) == "…10.self_attn.q_proj"
    assert len(shown_tensor("a" * 80, 24)) == 24
