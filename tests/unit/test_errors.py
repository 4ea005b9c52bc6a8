"""The tree of errors, and what their messages say."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import tallstore
from tallstore import errors
from tallstore.errors import (
    BaseMismatchError,
    CheckpointNotFoundError,
    FormatError,
    IntegrityError,
    OptionError,
    TallstoreError,
    UnknownNameError,
    UnknownTaskError,
)

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]


def test_every_error_is_a_tallstore_error_and_described():
    assert len(CLASSES) > 20
    for error in CLASSES:
        assert issubclass(error, TallstoreError)
        assert error.__name__.endswith("Error")
        assert error.__doc__


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = {}
    parents = ["TallstoreError"]
    for line in inspect.getdoc(errors).splitlines():
        if found := re.match(r"    ([│ ├└─]*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            parents[depth:] = [found[2]]
            drawn[found[2]] = parents[depth - 1] if depth else "Exception"
    assert drawn == {error.__name__: error.__bases__[0].__name__ for error in CLASSES}


def test_a_format_error_carries_the_rule_and_the_place():
    error = IntegrityError("IDX-3", "tasks/a/mask-00001-of-00001.safetensors, 'bits/w'", "changed")
    assert str(error) == "tasks/a/mask-00001-of-00001.safetensors, 'bits/w': changed [IDX-3]"
    assert (error.rule, error.where, error.problem) == (
        "IDX-3",
        "tasks/a/mask-00001-of-00001.safetensors, 'bits/w'",
        "changed",
    )
    assert isinstance(error, FormatError)


def test_a_base_mismatch_names_the_tensor_and_says_what_to_do():
    error = BaseMismatchError("BASE-2", "base/model.safetensors", "encoder.0.weight", "has other values")
    assert str(error) == (
        "base/model.safetensors: tensor 'encoder.0.weight' has other values; "
        "open the bundle with the base that it was packed from [BASE-2]"
    )
    assert (error.rule, error.tensor) == ("BASE-2", "encoder.0.weight")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("mnits", ["cars", "mnist"], "did you mean 'mnist'?"),
        ("weather", ["cars", "mnist"], "there are 2: 'cars', 'mnist'"),
        ("weather", list("abcdefg"), "there are 7: 'a', 'b', 'c', 'd', 'e', …"),
        ("weather", [], "there are none"),
        ("weather", iter(["weathe"]), "did you mean 'weathe'?"),
    ],
)
def test_an_unknown_name_suggests_one(name, known, hint):
    error = UnknownTaskError("bundle", "task", name, known)
    assert str(error) == f"bundle: no task named {name!r}; {hint}"
    assert error.name == name


def test_unknown_names_are_key_errors_and_options_value_errors():
    assert issubclass(UnknownNameError, KeyError)
    assert issubclass(OptionError, ValueError)


def test_an_input_error_carries_its_place():
    error = CheckpointNotFoundError("task 'cars', /models/cars", "does not exist")
    assert str(error) == "task 'cars', /models/cars: does not exist"
    assert (error.where, error.problem) == ("task 'cars', /models/cars", "does not exist")


@pytest.mark.parametrize(
    "error",
    [
        IntegrityError("IDX-3", "a file", "changed"),
        BaseMismatchError("BASE-2", "base", "w", "has other values"),
        UnknownTaskError("bundle", "task", "spma", ["spam"]),
        CheckpointNotFoundError("there", "there is no such file or directory"),
        OptionError("density: is 2"),
    ],
)
def test_errors_can_be_pickled(error):
    """Workers of an executor send them home."""
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert type(back) is type(error)
    assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))


def test_a_notebook_shows_the_callers_line_and_the_message(tmp_path):
    """Of IPython's hook: its frames are those of a cell, and of the library below it."""
    with pytest.raises(tallstore.BundleNotFoundError) as caught:
        tallstore.open_bundle(tmp_path)
    line = test_a_notebook_shows_the_callers_line_and_the_message.__code__.co_firstlineno + 3
    assert caught.value._render_traceback_() == [
        f"line {line}: tallstore.open_bundle(tmp_path)",
        f"BundleNotFoundError: {tmp_path}: there is no bundle (no tallstore.json); check the path",
    ]
    assert OptionError("k is 0")._render_traceback_() == ["OptionError: k is 0"]
