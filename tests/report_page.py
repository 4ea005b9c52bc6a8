"""A report as tests read it: its tables with the numbers behind their cells, its tags, what it refers to."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "path", "rect", "use", "image"}


class Page(HTMLParser):
    """The page, taken apart.

    Attributes:
        tables: by id, a list of rows, each a list of (text, number or None); the headings come first.
        attributes: (tag, name, value) of every attribute.
        texts: text by the tag that it stands in.
        headings: levels and texts of h1, h2, …
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, float | None]]]] = {}
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.open: list[str] = []
        self._rows: list[list[tuple[str, float | None]]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        known = dict(attrs)
        if tag == "table":
            self._rows = self.tables[known["id"].removeprefix("table-")] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"th", "td"}:
            value = known.get("data-value")
            self._rows[-1].append(("", None if value is None else float(value)))
        if tag not in VOID or tag in {"path", "rect", "use", "image"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open:
            return
        self.texts.setdefault(self.open[-1], []).append(data)
        if "td" in self.open or "th" in self.open:
            text, value = self._rows[-1][-1]
            self._rows[-1][-1] = (text + data, value)

    def values(self, table: str, heading: str) -> list[float | None]:
        """The numbers below a heading."""
        head, *rows = self.tables[table]
        place = [text for text, _ in head].index(heading)
        return [row[place][1] for row in rows]

    def cells(self, table: str, heading: str) -> list[str]:
        """The texts below a heading."""
        head, *rows = self.tables[table]
        place = [text for text, _ in head].index(heading)
        return [row[place][0] for row in rows]

    def all(self, name: str) -> list[str]:
        """Every value of an attribute, whatever has it."""
        return [value or "" for _, found, value in self.attributes if found == name]
