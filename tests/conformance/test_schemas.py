"""The JSON Schemas of the specification accept the tables of every valid vector, and refuse what the types refuse."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

SPEC = Path(__file__).parents[2] / "spec"
SCHEMAS = {path.name.removesuffix(".schema.json"): json.loads(path.read_text()) for path in SPEC.glob("schema/*.json")}
VALID = sorted(path for path in SPEC.glob("vectors/valid/*") if path.name != "newer-minor")  # has keys of its future


def tables(vector):
    """A vector's JSON files, each with the schema that it follows."""
    for path in sorted(vector.glob("bundle/**/*.json")):
        if path.stem in SCHEMAS:
            yield path, SCHEMAS[path.stem]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


@pytest.mark.parametrize("vector", VALID, ids=lambda path: path.name)
def test_valid_tables_follow_their_schema(vector):
    found = list(tables(vector))
    assert len(found) >= 4
    for path, schema in found:
        jsonschema.Draft202012Validator(schema).validate(json.loads(path.read_text(encoding="utf-8")))


# What a hash, or another table, must agree with is nothing that a schema can see.
SEEN = [
    *(
        "json-3-dtype",
        "json-3-kind",
        "json-3-missing",
        "json-3-next-group-zero",
        "json-3-negative",
        "json-3-sha256",
        "json-3-string",
    ),
    *(
        "json-3-levels",
        "json-3-levels-missing",
        "json-3-leading-levels",
        "json-3-leading-kind",
        "json-3-count-negative",
    ),
    *("json-3-values-dtype", "json-3-centre-dtype", "ver-3-levels", "ver-3-leading"),
]


@pytest.mark.parametrize("name", SEEN)
def test_invalid_tables_break_it(name):
    found = tables(SPEC / "vectors" / "invalid" / name)
    errors = [
        error
        for path, schema in found
        for error in jsonschema.Draft202012Validator(schema).iter_errors(json.loads(path.read_text(encoding="utf-8")))
    ]
    assert errors
