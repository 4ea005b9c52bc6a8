"""The model card of a bundle: README.md, of which a push writes a part and the user the rest.

What is written by every push anew stands between two comments: a sentence about the bundle, the table of tasks, how to
load one, plots. Around them, and in the metadata beyond the keys below, everything is the user's, and stays. Where a
text has no such comments, it is left alone: put them back (``<!-- tallstore:begin -->`` and
``<!-- tallstore:end -->``, each on a line of its own) where the table shall stand. A README without a text gets a title
and the generated part.

Of the metadata, a push sets ``library_name``, adds its tags, and sets ``base_model`` and ``base_model_relation`` where
the bundle names its base. The licence is the user's; where none is given, it is the one of the base's card.

The text may be edited on the Hub, or in the bundle's directory, from where it is pushed. A comment at the end keeps a
hash of the text as it was last pushed, which says who edited it since. Edited here alone, the text here is pushed; else
the Hub's is kept, also where both were edited: then a warning says so, and the file here stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tallstore.caller_warnings import warn
from tallstore.hub import front_matter
from tallstore.inspecting.summary import BundleSummary, GroupSummary, TaskSummary
from tallstore.sizes import readable

BEGIN: Final = "<!-- tallstore:begin (a push writes anew what stands between this line and the end) -->"
END: Final = "<!-- tallstore:end -->"
MAX_ROWS: Final = 1000
TAGS: Final = ("tallstore", "model-merging")

_BEGIN: Final = re.compile(r"^<!-- tallstore:begin\b[^\n]*-->[ \t]*\r?$", re.MULTILINE)
_END: Final = re.compile(r"^<!-- tallstore:end -->[ \t]*\r?$", re.MULTILINE)
_STAMP: Final = re.compile(r"\n*^<!-- tallstore:text ([0-9a-f]{16}) -->[ \t]*\r?\n?", re.MULTILINE)
_LICENCE: Final = ("license", "license_name", "license_link")
_SET: Final = frozenset({"library_name", "base_model", "base_model_relation", *_LICENCE})
_MARKUP: Final = re.compile(r"[\\`*_{}\[\]<>&|~#!$:@^=]")
_NOTHING: Final = "–"

FindLicence = Callable[[str, str | None], Mapping[str, str]]  # of a model's id and revision


def render(
    summary: BundleSummary,
    repo_id: str,
    local: str | None,
    remote: str | None,
    licence_of: FindLicence,
    *,
    plots: Callable[[], Sequence[str]] = tuple,
    where: str = "README.md",
) -> str:
    """The card of a bundle.

    Args:
        summary: of the bundle.
        repo_id: where it is pushed to.
        local: the README in the bundle's directory; None where there is none.
        remote: the one on the Hub; None where there is none.
        licence_of: asked for the base's licence, where none is given.
        plots: asked for the lines of each plot, where there is a generated part for them.
        where: what errors call it.

    Raises:
        CardError: the metadata of a README are no YAML.
    """
    here = None if local is None else _Written.read(local, f"{where} here")
    there = None if remote is None else _Written.read(remote, f"{where} on the Hub")
    text = _choose(here, there, repo_id)
    licence = {} if there is None else {key: there.parsed[key] for key in _LICENCE if key in there.parsed}
    metadata = front_matter.set_keys(text.metadata, _metadata(summary, text.parsed, licence, licence_of))
    body = f"# {repo_id.partition('/')[2]}\n\n" if text.is_empty else text.before
    if text.is_marked or text.is_empty:
        body += f"{BEGIN}\n{_generated(summary, repo_id, plots())}\n{END}{text.after}"
    written = front_matter.join(metadata, body)
    stamp = f"<!-- tallstore:text {_Written.read(written, where).digest} -->\n"
    return written.rstrip("\n") + "\n\n" + stamp


@dataclass(frozen=True)
class _Written:
    """A README, taken apart.

    Attributes:
        metadata, parsed: as it is written, and what it says.
        before, after: the text around the generated part; without one, all of it stands before.
        is_marked: whether there is a generated part.
        stamp: the digest when it was last pushed.
    """

    metadata: str
    parsed: Mapping[str, Any]
    before: str
    after: str
    is_marked: bool
    stamp: str | None

    @classmethod
    def read(cls, readme: str, where: str) -> _Written:
        metadata, text = front_matter.split(readme)
        stamps = _STAMP.findall(text)
        text = _STAMP.sub("\n" if stamps else "", text)
        parsed = front_matter.parse(metadata, where)
        begin = _BEGIN.search(text)
        end = None if begin is None else _END.search(text, begin.end())
        stamp = stamps[-1] if stamps else None
        if begin is None or end is None:
            return cls(metadata, parsed, text, "", is_marked=False, stamp=stamp)
        return cls(metadata, parsed, text[: begin.start()], text[end.end() :], is_marked=True, stamp=stamp)

    @property
    def is_empty(self) -> bool:
        """Whether there is no text of the user's."""
        return not self.is_marked and not self.before.strip()

    @property
    def digest(self) -> str:
        """Of what is the user's, however it is spaced."""
        own = {key: value for key, value in self.parsed.items() if key not in _SET}
        own["tags"] = [tag for tag in _tags(self.parsed) if tag not in TAGS]
        texts = [" ".join(text.split()) for text in (self.before, self.after)]
        said = json.dumps([_sortable(own), self.is_marked, *texts], sort_keys=True, default=str)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _sortable(value: Any) -> Any:  # noqa: ANN401 - anything that YAML can say
    """*value* with keys of one type, and without sets: it is written in one order."""
    if isinstance(value, dict):
        return {str(key): _sortable(held) for key, held in value.items()}
    if isinstance(value, set):
        return sorted(map(str, value))
    return [_sortable(held) for held in value] if isinstance(value, list) else value


def _choose(here: _Written | None, there: _Written | None, repo_id: str) -> _Written:
    """Whose text is pushed; see above."""
    if here is None or there is None:
        return here or there or _Written("", {}, "", "", is_marked=False, stamp=None)
    if here.digest == there.digest or here.digest in {here.stamp, there.stamp}:
        return there
    if there.digest != there.stamp and not there.is_empty:
        warn(
            f"{repo_id}: README.md was edited on the Hub, and here: the Hub's text is kept; take into one of them what"
            " is to stay of the other"
        )
        return there
    return here


def _tags(parsed: Mapping[str, Any]) -> list[Any]:
    tags = parsed.get("tags")
    return list(tags) if isinstance(tags, list) else [] if tags is None else [tags]


def _metadata(
    summary: BundleSummary, parsed: Mapping[str, Any], licence: Mapping[str, Any], licence_of: FindLicence
) -> dict[str, object]:
    """The keys that a push sets."""
    base = summary.base
    values: dict[str, object] = {"library_name": "tallstore"}
    if base.repo_id is not None:
        named = parsed.get("base_model")
        values["base_model"] = named if isinstance(named, list) and base.repo_id in named else base.repo_id
        values["base_model_relation"] = parsed.get("base_model_relation", "merge")
    tags = _tags(parsed)
    values["tags"] = tags + [tag for tag in TAGS if tag not in tags]
    if "license" not in parsed:
        values |= licence or ({} if base.repo_id is None else licence_of(base.repo_id, base.revision))
    return values


# --- the generated part -----------------------------------------------------------------------------------------------


def _generated(summary: BundleSummary, repo_id: str, plots: Sequence[str]) -> str:
    return "\n\n".join([_sentence(summary), _table(summary), _loading(summary, repo_id), *plots])


def _sentence(summary: BundleSummary) -> str:
    count, base = len(summary.tasks), summary.base
    experts = f"{count} expert{'' if count == 1 else 's'}"
    name = "one base" if base.repo_id is None else _link(base.repo_id, base.revision)
    place = "which is in the bundle" if base.embedded else "which is not in the bundle"
    ratio = "" if summary.ratio is None else f", {summary.ratio:.1f} times smaller than as checkpoints"
    methods = list(dict.fromkeys(map(_method, summary.groups)))
    return (
        f"{experts} of {name} ({place}) in a [tallstore](https://pypi.org/project/tallstore) bundle of"
        f" {readable(summary.nbytes)}{ratio}: {readable(summary.shared_nbytes)} that they share, and each its own part."
        f" Packed by {'; '.join(methods)}."
    )


def _link(repo_id: str, revision: str | None) -> str:
    commit = "" if revision is None else f"/tree/{revision}"
    return f"[{plain(repo_id)}](https://huggingface.co/{repo_id}{commit})"


def _method(group: GroupSummary) -> str:
    values = ", ".join(f"{key.replace('_', ' ')} {_value(value)}" for key, value in group.parameters.items())
    return plain(f"{group.method} ({values})" if values else group.method)


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(summary: BundleSummary) -> str:
    tasks = summary.tasks[:MAX_ROWS]
    has_scores = any(task.score is not None for task in tasks)
    headings = ["task", "size", "bits", "cosine", "gain", *(["score"] if has_scores else [])]
    rows = [_row(task)[: len(headings)] for task in tasks]
    lines = [headings, ["---", *(["--:"] * (len(headings) - 1))], *rows]
    more = len(summary.tasks) - len(tasks)
    legend = (
        "Size: of the task's own files. Bits: of a coded parameter, its share of what the tasks share included. Cosine"
        " and gain: between the fine-tuned weights' difference from the base and what the bundle has of it; 1 is all."
    )
    if has_scores:
        legend += " Score: by the packer's own evaluation."
    if more:
        legend = f"And {more} more tasks. {legend}"
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{legend}"


def _row(task: TaskSummary) -> Sequence[str]:
    return [
        plain(task.name),
        readable(task.nbytes),
        _number(task.bits, ".2f"),
        _number(task.cosine, ".3f"),
        _number(task.gain, ".3f"),
        _number(task.score, ".4g"),
    ]


def _number(value: float | None, digits: str) -> str:
    return _NOTHING if value is None else format(value, digits)


def plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line and in a cell of a table."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))


def _loading(summary: BundleSummary, repo_id: str) -> str:
    base = summary.base
    needs_base = not base.embedded and base.repo_id is None
    given = ', base="path/to/the/base"' if needs_base else ""
    first = summary.tasks[0].name if summary.tasks else ""
    return (
        "```python\n"
        "import tallstore\n"
        "\n"
        f'bundle = tallstore.open_bundle("{repo_id}"{given})\n'
        f"weights = bundle.state_dict({first!a})\n"
        "```"
    )
