"""The names that `import tallstore` promises, and that they are what they say."""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path

import pytest

import tallstore
from tallstore import errors


def test_all_is_sorted_and_every_name_resolves():
    assert tallstore.__all__ == sorted(tallstore.__all__)
    for name in tallstore.__all__:
        assert getattr(tallstore, name).__name__ == name
        assert name in dir(tallstore)


def test_the_names_are_these():
    """A name that is added or lost is a decision: write it down here."""
    functions = {name for name in tallstore.__all__ if inspect.isfunction(getattr(tallstore, name))}
    classes = set(tallstore.__all__) - functions - set(error_names())
    methods = {"Auto", "Emr", "LeastSquares", "Localize", "Sign", "SignedMask", "TallMask", "Uniform"}
    results = {"Comparison", "LoadResult", "PackReport", "Problem", "Statistics"}
    assert functions == {
        "add",
        "compare",
        "open_bundle",
        "pack",
        "progress_bar",
        "pull",
        "push",
        "remove",
        "repack",
        "train_masks",
        "verify",
        "write_report",
    }
    assert classes == {"Bundle", "Calibration", "NewerFormatWarning", "Switcher", *methods, *results}


def error_names() -> list[str]:
    return [
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TallstoreError)
    ]


def test_every_error_is_exported():
    assert set(error_names()) <= set(tallstore.__all__)
    assert all(getattr(tallstore, name) is getattr(errors, name) for name in error_names())


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'unpack'"):
        _ = tallstore.unpack


def test_no_module_takes_the_place_of_a_name():
    """Importing a submodule sets it on the package: none may be called as a function or a class is."""
    modules = {path.stem for path in Path(tallstore.__file__).parent.iterdir()}
    assert not modules & set(tallstore.__all__)
    assert not any(isinstance(getattr(tallstore, name), types.ModuleType) for name in tallstore.__all__)


def test_the_version_is_the_installed_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", tallstore.__version__)
