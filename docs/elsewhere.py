"""A hook of mkdocs: the site shows pages that live elsewhere in the repository, and nothing is copied.

Whole pages are at the paths that they have in the repository, so that their links hold. Parts of README.md stand where
a page says ``<!-- README.md: Heading -->``, what the command line says of itself at ``<!-- commands -->``. A link to
what the repository has and the site does not is left as its text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.testing import CliRunner

from tallstore.cli.app import app

ROOT: Final = Path(__file__).parents[1]
SHOWN: Final = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/RESULTS.md",
    "spec/*.md",
    "spec/*.svg",
    "spec/codecs/*.md",
    "spec/schema/*.json",
)
_LINK: Final = re.compile(r"(?<!!)\[([^]\n]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_COMMANDS: Final = "<!-- commands -->"
_PART: Final = re.compile(r"^<!-- ([\w./-]+): (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live elsewhere."""
    for path in sorted(found for pattern in SHOWN for found in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put parts of other pages in, and take out links that lead out of the site."""
    del config
    here = posixpath.dirname(page.file.src_uri)
    whole = _PART.sub(lambda found: _part(found[1], found[2], here), markdown)
    if _COMMANDS in whole:
        whole = whole.replace(_COMMANDS, _commands())
    return _LINK.sub(lambda found: _link(found, here, files), whole)


def _part(path: str, heading: str, here: str) -> str:
    """What stands under a heading of a page, its links as they must be for a page in *here*."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"{path} has no heading {heading!r}")
    return _LINK.sub(
        lambda link: f"[{link[1]}]({_rebased(link[2], posixpath.dirname(path), here)}{link[3] or ''})", found[1]
    )


def _rebased(target: str, old: str, new: str) -> str:
    return target if ":" in target else posixpath.relpath(posixpath.join(old, target) or ".", new or ".")


def _link(found: re.Match[str], here: str, files: Files) -> str:
    """The link as it is, or where it leads to what is in the repository alone, its text."""
    text, target = found[1], found[2]
    place = posixpath.normpath(posixpath.join(here, target))
    outside = ":" not in target and files.get_file_from_path(place) is None and (ROOT / place).exists()
    return text if outside else found[0]


def _commands() -> str:
    """A heading for each command, and its help."""
    names = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)
    return "\n\n".join(f"## tallstore {name}\n\n```text\n{_help(name)}```" for name in names)


def _help(command: str) -> str:
    environment = {"COLUMNS": "90", "NO_COLOR": "1"}
    return CliRunner().invoke(app, [command, "--help"], env=environment, prog_name="tallstore").stdout
