"""What an import costs: the format layer, and so `tallstore inspect`, needs no torch; no help page does."""

from __future__ import annotations

import subprocess
import sys

import pytest

TORCH_FREE = [
    "tallstore",
    "tallstore.format.bits",
    "tallstore.format.bundle_files",
    "tallstore.format.codecs",
    "tallstore.errors",
    "tallstore.format.layout",
    "tallstore.format.manifest",
    "tallstore.format.payloads",
    "tallstore.format.r13",
    "tallstore.format.shards",
    "tallstore.format.tables",
]


def imported_by(statement: str) -> set[str]:
    """Top-level modules that are loaded once *statement* has run in a new interpreter."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_the_format_layer_imports_no_torch():
    modules = imported_by("import " + ", ".join(TORCH_FREE))
    assert "tallstore" in modules
    assert not modules & {"torch", "safetensors", "transformers", "huggingface_hub"}


def test_an_error_and_the_version_import_no_torch():
    assert "torch" not in imported_by("from tallstore import TallstoreError, __version__")


@pytest.mark.parametrize(
    ("arguments", "needless"),
    [
        (["--version"], {"rich", "msgspec"}),
        (["pack", "--help"], {"msgspec"}),
        (["pack", "--base"], {"msgspec", "pydantic"}),
        (["inspect", "nothing"], {"numpy", "pydantic"}),
        (["statistics", "nothing"], {"pydantic"}),
        (["report", "nothing", "--out", "page"], {"pydantic", "pandas"}),
        (["verify", "nothing"], {"pydantic"}),
    ],
)
def test_the_command_line_imports_what_a_command_needs(arguments, needless):
    modules = imported_by(
        "import contextlib, io; from tallstore.cli import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): main({arguments})"
    )
    assert "typer" in modules
    assert not modules & {"torch", "safetensors", "transformers", "huggingface_hub", *needless}
