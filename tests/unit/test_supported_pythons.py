"""The oldest Python that is supported can parse every module; the linter and the vectors see to the rest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = (3, 10)
MODULES = sorted(
    path for place in ("tallstore", "spec", "tests", "benchmarks", "examples") for path in (ROOT / place).rglob("*.py")
)


def test_newer_syntax_would_be_noticed():
    with pytest.raises(SyntaxError):
        ast.parse("try: ...\nexcept* OSError: ...", feature_version=OLDEST)


def test_every_module_is_of_the_oldest_python():
    assert MODULES
    for path in MODULES:
        ast.parse(path.read_text(encoding="utf-8"), path, feature_version=OLDEST)
