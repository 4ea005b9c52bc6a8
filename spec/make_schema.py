"""Write spec/schema/*.json from the types of tallstore.format.manifest; --check tells whether they have drifted."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from tallstore.format.manifest import BaseTable, GroupTable, Manifest, TaskTable

SCHEMA = Path(__file__).resolve().parent / "schema"
TABLES = {"tallstore": Manifest, "base": BaseTable, "group": GroupTable, "task": TaskTable}


def schema(name: str) -> str:
    """The JSON Schema (draft 2020-12) of one file of a bundle."""
    generated = msgspec.json.schema(TABLES[name])
    document: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _closed(generated)
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def _closed(node: Any) -> Any:  # noqa: ANN401 - any JSON
    """Unknown keys are refused within a version (VER-3): every object with named properties says so.

    Descriptions are the same whatever Python wrote them.
    """
    if isinstance(node, dict):
        closed = {key: _closed(value) for key, value in node.items()}
        if isinstance(closed.get("description"), str):  # a docstring, which Python up to 3.12 leaves indented
            closed["description"] = inspect.cleandoc(closed["description"])
        if "properties" in closed and "additionalProperties" not in closed:
            closed["additionalProperties"] = False
        return closed
    return [_closed(item) for item in node] if isinstance(node, list) else node


def main() -> int:
    """Write the schemas, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare instead of writing; exit 1 on the first difference"
    )
    check = parser.parse_args().check
    for name in TABLES:
        path = SCHEMA / f"{name}.schema.json"
        if not check:
            SCHEMA.mkdir(exist_ok=True)
            path.write_text(schema(name), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != schema(name):
            print(f"{path.name} has drifted from tallstore/format/manifest.py; run python spec/make_schema.py")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
