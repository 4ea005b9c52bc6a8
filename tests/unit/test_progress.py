"""The bar that callers can have."""

from __future__ import annotations

import pytest

import tallstore
from tests.packing_cases import base_model, experts_of


def test_a_bar_goes_on_until_all_is_done(tmp_path, capsys):
    base = base_model()
    tallstore.pack(base, experts_of(base), tmp_path / "bundle", progress=tallstore.progress_bar("packing"))
    printed = capsys.readouterr()
    assert printed.out == ""
    drawn = [line for line in printed.err.replace("\n", "\r").split("\r") if line.strip()]
    assert all(line.startswith("packing: ") for line in drawn)
    assert drawn[-1].startswith("packing: 100%")
    assert printed.err.endswith("\n")


@pytest.mark.parametrize(("unit", "shown"), [("bytes", "3.00k/3.00k"), ("pieces", "3000/3000")])
def test_bytes_are_shown_in_thousands_and_pieces_as_they_are(capsys, unit, shown):
    show = tallstore.progress_bar(unit=unit)
    assert capsys.readouterr().err == ""
    show(0, 3000)
    show(1500, 3000)
    show(3000, 3000)
    show(3000, 3000)
    assert shown in capsys.readouterr().err


def test_more_work_may_come_to_light(capsys):
    show = tallstore.progress_bar("reading")
    for done, total in [(0, 10), (5, 10), (5, 40), (40, 40)]:
        show(done, total)
    assert "40.0/40.0" in capsys.readouterr().err
