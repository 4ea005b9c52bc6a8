"""The report in a real browser: it shows itself without a word or a request, sorts, and fits light, dark and narrow."""

from __future__ import annotations

import shutil

import pytest

import tallstore
from tests.packing_cases import base_model, experts_of

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",  # which a container refuses, and a page of our own does not need
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ["movies", "<script>alert(1)</script>", 'an "unbroken" ' + 60 * "name"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
    )
    if BROWSER is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on the PATH")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    base = base_model()
    experts = dict(zip(NAMES, experts_of(base).values(), strict=True))
    tallstore.pack(base, experts, root / "bundle", evaluate=lambda task, _state: len(task))
    return tallstore.write_report(root / "bundle", root / "report.html")


@pytest.fixture
def show(browser, report):
    """Opens the page; at the end of the test it must have said nothing, and asked for nothing."""
    contexts, heard = [], []

    def opened(width=1200, scheme="light", script=True):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 800}, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: heard.append(dialog.message))
        page.on("request", lambda request: heard.append(request.url))
        page.goto(report.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    loaded = [line for line in heard if line.startswith("data:") or line == report.as_uri()]
    assert heard == loaded
    assert heard.count(report.as_uri()) == len(contexts)


def column(page, place):
    return page.locator(f"#table-tasks tbody tr > :nth-child({place})").all_inner_texts()


def test_it_shows_itself(show):
    page = show()
    assert page.title() == "bundle: 3 experts in one bundle"
    assert page.locator("h2").all_inner_texts() == [
        "Tasks",
        "Sizes",
        "Density by layer",
        "Agreement",
        "Overlap of the tasks",
        "Shared vectors",
        "Load an expert",
    ]
    for plot in page.locator("svg[role=img]").all():
        box = plot.bounding_box()
        assert box["width"] > 600
        assert box["height"] > 60
    assert page.locator("svg text", has_text="<script>alert(1)</script>").count() > 0


def test_headings_sort_by_keyboard_and_say_so(show):
    page = show()
    assert column(page, 1) == NAMES
    headings = page.locator("#table-tasks thead th").all_inner_texts()
    place = headings.index("score") + 1
    heading = page.locator(f"#table-tasks thead th:nth-child({place})")
    assert heading.get_attribute("aria-sort") is None
    heading.get_by_role("button", name="score").focus()
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(page, 1) == sorted(NAMES, key=len)
    assert page.get_by_role("status").inner_text() == "The tasks of the bundle: sorted by score, ascending"
    page.keyboard.press("Space")
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, 1) == sorted(NAMES, key=len, reverse=True)
    page.get_by_role("button", name="task", exact=True).click()
    assert page.locator("#table-tasks [aria-sort]").count() == 1
    assert column(page, 1) == [NAMES[1], NAMES[2], NAMES[0]]


def test_what_has_no_number_stays_last(show):
    page = show()
    page.locator("summary", has_text="the tensors of the base").click()
    table = page.locator("#table-tensors")
    universal = table.locator("tbody tr > :nth-child(6)")
    counted = len([text for text in universal.all_inner_texts() if text != "–"])
    for _ in range(2):
        table.get_by_role("button", name="universal").click()
        texts = universal.all_inner_texts()
        assert 0 < counted < len(texts)
        assert "–" not in texts[:counted]


def test_everything_can_be_reached_by_keyboard(show):
    page = show(width=360)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    wide = "box => box.scrollWidth > box.clientWidth && box.tabIndex < 0"
    assert page.evaluate(f"Array.from(document.querySelectorAll('.scroll, pre')).filter({wide}).length") == 0


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_the_page_itself_never_scrolls_sideways(show, width):
    page = show(width)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_and_dark_are_legible(show):
    """Of every text, the contrast with what is behind it is at least 4.5."""
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = show(scheme=scheme)
        found = page.evaluate(CONTRASTS)
        assert [(text, contrast) for contrast, text in found["contrasts"] if contrast < 4.5] == []
        assert len(found["contrasts"]) > 100
        backgrounds.add(found["background"])
    assert len(backgrounds) == 2


# Text lies on its nearest ancestor that is painted; in plots, on the page, or on a cell at its strongest.
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const contrast = (one, other) => {
    const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const page = rgb(getComputedStyle(document.body).backgroundColor);
  const painted = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return page;
  };
  const cell = [47, 111, 214].map((v, i) => 0.8 * v + 0.2 * page[i]);
  const contrasts = [];
  const note = (found, text) => contrasts.push([found, text]);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || parent.closest("script, style, title, desc, .unseen")) continue;
    if (parent.closest("svg")) {
      const style = getComputedStyle(parent);
      note(contrast(rgb(style.fill), page), parent.textContent);
      if (parent.textContent.match(/^\\d+$/) && parent.closest("#density, #overlap") && style.textAnchor === "middle"
          && style.fontSize === "8.5px") note(contrast(rgb(style.fill), cell), parent.textContent);
    } else {
      note(contrast(rgb(getComputedStyle(parent).color), painted(parent)), parent.textContent);
    }
  }
  return { contrasts, background: String(page) };
}"""


def test_without_scripts_everything_is_there_and_nothing_looks_like_a_button(show):
    page = show(script=False)
    assert page.locator("button").count() == 0
    assert column(page, 1) == NAMES
    assert page.locator("#table-overlap").count() == 1


def test_paper_is_white_and_tables_on_it_are_open(show):
    page = show(scheme="dark")
    page.emulate_media(media="print")
    colours = "[document.body, document.querySelector('pre')].map((each) => getComputedStyle(each).backgroundColor)"
    assert page.evaluate(colours) == ["rgb(255, 255, 255)", "rgb(245, 246, 249)"]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert len(page.pdf()) > 10_000


def test_a_picture_of_it_is_not_blank(show, tmp_path):
    picture = show().screenshot(path=tmp_path / "report.png", full_page=True)
    assert len(picture) > 50_000


def test_axe_finds_nothing(show):
    """The accessibility checks of axe-core, where it is installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    for width, scheme in ((1200, "light"), (360, "dark")):
        page = show(width, scheme)
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        results = axe.Axe().run(page)
        assert [(found["id"], found["nodes"][0]["html"][:200]) for found in results.response["violations"]] == []
