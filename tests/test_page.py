"""The web page tells what the status tells, safely, on any screen, and fetches nothing.

It does so in light and in dark.
"""

import json
import math
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Optional

import pytest

import backup
from conftest import Store
from test_status import DAY, NONE_YET, NOW, ByHand, Status, by_hand, recent

__all__ = ["by_hand"]

Attributes = dict[str, Optional[str]]

VOID = {"meta", "br"}
LAST_RUN = {"end": "2026-06-15T02:59:30+00:00", "kind": "incremental", "source": "copy",
            "downtime_seconds": 0.412, "exit_code": 0, "message": ""}
HOSTILE = "</code><script>alert(1)</script>&amp;{0}\"'\n\x1b\udcff"
CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
WIDTHS = [320, 1200]
SCHEMES = ["light", "dark"]
CONTRAST_OF_TEXT, CONTRAST_OF_SHAPES = 4.5, 3  # WCAG 2.1, level AA


@dataclass
class Element:
    """An element of a page.

    inside: the tags around it, the outermost first. text: all that it holds.
    """

    tag: str
    attributes: Attributes
    inside: tuple[str, ...]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """A page that has been read to its end; an element that is not closed in its place fails."""

    html: str
    found: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        """Take an element."""
        assert len(dict(attrs)) == len(attrs), f"twice the same in {self.get_starttag_text()}"
        self.found.append(Element(tag, dict(attrs), tuple(element.tag for element in self.open)))
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element."""
        assert self.open and self.open.pop().tag == tag, f"</{tag}> at {self.getpos()} is not open"

    def handle_data(self, data: str) -> None:
        """Take text."""
        for element in self.open:
            element.text += data

    def all(self, tag: str, inside: str = "") -> list[Element]:
        """Return the elements of a tag, those inside another only if that is given."""
        return [element for element in self.found
                if element.tag == tag and (not inside or inside in element.inside)]

    def one(self, tag: str, inside: str = "") -> Element:
        """Return the only element of a tag."""
        element, = self.all(tag, inside)
        return element

    def of_class(self, name: str) -> list[Element]:
        """Return the elements of a class."""
        return [element for element in self.found if element.attributes.get("class") == name]

    def rows(self, part: str) -> list[list[str]]:
        """Return the texts of the cells in the rows of thead, tbody or tfoot."""
        rows: list[list[str]] = []
        for element in self.found:
            if part in element.inside and element.tag == "tr":
                rows.append([])
            elif part in element.inside and element.tag in ("th", "td"):
                rows[-1].append(element.text)
        return rows


def page_of(status: Status, now: datetime = NOW) -> Page:
    """Return the page of a status."""
    return Page(backup.status_page(status, now))


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the local time UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def three_chains(by_hand: ByHand) -> Status:
    """The status of twelve sets in three chains, of a stray file, and of a run that went well."""
    for days, increments in ((12, 3), (8, 4), (3, 2)):
        by_hand.put_chain(NOW - days * DAY, increments, 5_300_000_000, 212_000_000)
    by_hand.put("stray", 400_000_000)
    by_hand.last_run.write_text(json.dumps(LAST_RUN))
    return by_hand.status()


# What the page holds


def test_table_is_that_of_the_status(three_chains: Status) -> None:
    """A row for each set, newest first, with the columns that the control panel has always shown.

    Fulls are marked, and the sums are told.
    """
    page, sets = page_of(three_chains), three_chains["backups"]
    assert page.rows("thead") == [["When", "Type", "Size", "Deleted in…"]]
    assert page.rows("tbody") == [
        [f"{row['date_str'][:10]} {row['date_str'][11:19]}{row['date_delta']} ago",
         "full" if row["full"] else "increment",
         "5.3 GB" if row["full"] else "212 MB",
         row["deleted_in"]] for row in sets]
    dates = [element.attributes["datetime"] for element in page.all("time")]
    assert dates == [row["date_str"] for row in sets]
    marked = [element.attributes["class"] == "full" for element in page.all("tr", "tbody")]
    assert marked == [row["full"] for row in sets]
    assert page.rows("tfoot") == [
        ["Files of no complete backup", "400 MB", ""], ["Total", "18.2 GB", ""]]


def test_places_and_last_run(three_chains: Status) -> None:
    """Where files and key are and what each is good for, and how the last run went and when.

    Nothing is alarming.
    """
    page = page_of(three_chains)
    last_run, files, key = (element.text for element in page.all("dd"))
    assert last_run == ("2026-06-15 02:59:30: exit code 0, incremental, read from a copy,"
                        " mail down 0.412 seconds")
    free = backup.human_size(three_chains["free_size"])
    assert files.startswith(f"{three_chains['directory']}, {free} free on that disk")
    assert "safe to copy anywhere" in files
    assert key.startswith(three_chains["encpwfile"])
    assert "elsewhere" in key and "no backup can be opened" in key
    assert ("As of 2026-06-15 03:00:00 UTC\nOK: last backup 1 day, 0 hours ago, full on Friday"
            in page.one("body").text)
    assert not page.of_class("alarm")


@pytest.mark.parametrize("content, told, marked", [
    ('{"exit_code": 3, "message": "a hook failed"}', "unknown: exit code 3, a hook failed", True),
    ('{"exit_code": 1, "message": "disk full"}',
     "FAILED: the last run failed: disk full; last backup 1 day, 0 hours ago", True),
    ('{"exit_code": [0], "end": [1]}', "[1]: exit code [0]", False),
])
def test_last_run_that_did_not_go_well(
    by_hand: ByHand, content: str, told: str, marked: bool
) -> None:
    """What must be looked at stands out, and not by its colour alone."""
    by_hand.put_set(NOW - DAY)
    by_hand.last_run.write_text(content)
    page = page_of(by_hand.status())
    assert told in page.one("body").text
    alarm, = page.of_class("alarm")
    assert (told in alarm.text) == marked


def test_no_backups(by_hand: ByHand) -> None:
    """Before the first run there is a sentence and no table."""
    page = page_of(by_hand.status())
    assert NONE_YET in page.one("body").text and page.all("dd")[0].text == "none yet"
    assert not page.all("table")


def test_nothing_active_and_nothing_fetched(three_chains: Status) -> None:
    """No script, no address of anything, and a policy that would forbid both.

    All is ASCII, for a web server may tell any encoding.
    """
    page = page_of(three_chains)
    assert not re.search(r"https?:|url\(|@import|javascript:", page.html)
    names = {name for element in page.found for name in element.attributes}
    assert names == {"lang", "charset", "name", "content", "http-equiv", "class", "style", "scope",
                     "datetime", "colspan"}
    assert {element.tag for element in page.found} & {"script", "style"} == {"style"}
    policy, = (meta.attributes["content"] for meta in page.all("meta")
               if "http-equiv" in meta.attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert page.html.isascii() and page.html.startswith("<!DOCTYPE html>\n")


def test_hostile_text(by_hand: ByHand) -> None:
    """Markup, quotes, line breaks and odd bytes in paths, last-run.json and the zone are text."""
    hostile = ByHand(by_hand.root / HOSTILE)
    hostile.encrypted.mkdir(parents=True)
    for made in (by_hand, hostile):
        made.put_set(NOW - DAY)
    harmless = page_of(by_hand.status())
    hostile.last_run.write_text(json.dumps({key: HOSTILE for key in LAST_RUN}))
    page = page_of({**hostile.status(), "tz": HOSTILE})
    shown = r"""</code><script>alert(1)</script>&amp;{0}"'\n\x1b\xff"""
    assert [code.text for code in page.all("code")] == [
        f"{by_hand.root}/{shown}/backup/{name}" for name in ("encrypted", "secret_key.txt")]
    assert page.all("dd")[0].text == (
        f"{shown}: exit code {shown}, {shown}, mail down {shown} seconds, {shown}")
    headline = f"FAILED: the last run failed: {shown}; last backup"
    assert f"As of 2026-06-15 03:00:00 {shown}\n{headline}" in page.one("body").text
    assert [element.tag for element in page.found] == [element.tag for element in harmless.found]


def test_bars(three_chains: Status) -> None:
    """In each row is a bar as wide as the backup is big; each chain ends with its full."""
    page = page_of(three_chains)
    widths = [element.attributes["style"] for element in page.of_class("bar")]
    assert widths == [
        "width: 100.0%" if row["full"] else "width: 4.0%" for row in three_chains["backups"]]
    parts = re.findall(r'<tbody>|<tr class="full">', page.html)
    assert parts == ["<tbody>", '<tr class="full">'] * 3


def test_orphans_and_sets_of_no_size(by_hand: ByHand) -> None:
    """An increment whose full is gone is shown like any other, what holds nothing is none."""
    by_hand.put_set(NOW - 2 * DAY, NOW - 3 * DAY, 15)
    page = page_of(by_hand.status())
    assert page.rows("tbody")[0][1:] == ["increment", "15 bytes", "1 day, 0 hours"]
    assert page.rows("tfoot") == [["Total", "15 bytes", ""]]
    assert [element.attributes["style"] for element in page.of_class("bar")] == ["width: 100.0%"]
    for path in by_hand.encrypted.iterdir():
        os.truncate(path, 0)
    assert by_hand.status()["backups"] == []


# The command


def test_command(keyed: Store) -> None:
    """The page alone is on the standard output, in local time, whatever the locale.

    The exit code is that of --status.
    """
    kept = ByHand(keyed.root)
    kept.encrypted.mkdir()
    kept.put_set(recent())
    odd = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    result = keyed.backup("--status", "--html", environment=odd)
    status = json.loads(keyed.backup("--status", "--json", environment=odd).stdout)
    page = Page(result.stdout)
    assert result.stderr == ""
    assert page.one("time").attributes["datetime"] == status["backups"][0]["date_str"]
    as_of = re.search(r"As of (\S+ \S+) \+0545\n", page.one("body").text)
    assert as_of
    date = datetime.fromisoformat(f"{as_of[1]}+05:45")
    assert abs(date - recent(0)) < timedelta(minutes=5)
    kept.last_run.write_text(json.dumps({**LAST_RUN, "exit_code": 1, "message": "disk full"}))
    result = keyed.backup("--status", "--html", exit_code=3, environment=odd)
    for text in (result.stderr, result.stdout):
        assert "the last run failed: disk full" in text
    assert Page(result.stdout).all("dd")[0].text.startswith("2026-06-15 08:44:30: exit code 1, ")


# Its colours


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, #rrggbb or rgb(r, g, b), by the formula of WCAG 2.1."""
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4)

    def luminance(colour: str) -> float:
        digits, base = ("[0-9a-f]{2}", 16) if colour.startswith("#") else ("[0-9]+", 10)
        parts = [int(part, base) / 255 for part in re.findall(digits, colour)]
        red, green, blue = map(linear, parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# In a browser


@dataclass(frozen=True)
class Browser:
    """A Chromium that chromedriver drives. session: its address, for the WebDriver protocol."""

    session: str

    def show(self, page: Path, width: int, scheme: str) -> None:
        """Open a page on a screen of this width in pixels, with the user's scheme."""
        self.control("Emulation.setDeviceMetricsOverride",
                     width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.control("Emulation.setEmulatedMedia",
                     features=[{"name": "prefers-color-scheme", "value": scheme}])
        ask(f"{self.session}/url", url=page.as_uri())

    def control(self, command: str, **parameters: object) -> Any:
        """Give a command of Chromium's own protocol."""
        return ask(f"{self.session}/goog/cdp/execute", cmd=command, params=parameters)

    def tell(self, script: str) -> Any:
        """Return what a function body returns, run in the page."""
        return ask(f"{self.session}/execute/sync", script=script, args=[])


def ask(address: str, method: str = "POST", **content: object) -> Any:
    """Send a command of the WebDriver protocol, and return the answer.

    It never leaves this machine.
    """
    request = urllib.request.Request(
        address, json.dumps(content).encode(), {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        return json.load(answer)["value"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium for all tests; where it is not installed they are skipped, but not in CI."""
    missing = not (shutil.which("chromedriver") and shutil.which("chromium"))
    if missing and os.environ.get("CI") != "true":
        pytest.skip("chromium and chromium-driver are not installed")
    with subprocess.Popen(["chromedriver", "--port=0"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout
            started = re.compile(r"successfully on port (\d+)")
            port = next(match[1] for line in driver.stdout if (match := started.search(line)))
            sessions = f"http://127.0.0.1:{port}/session"
            options = {"alwaysMatch": {"goog:chromeOptions": {"args": CHROMIUM}}}
            session = f"{sessions}/{ask(sessions, capabilities=options)['sessionId']}"
            yield Browser(session)
            ask(session, "DELETE")
        finally:
            driver.terminate()


def edges_of(browser: Browser, selector: str) -> list[list[float]]:
    """Return where elements begin and end, from left to right, in pixels."""
    edges: list[list[float]] = browser.tell(f"""
        return [...document.querySelectorAll('{selector}')].map(element => {{
            const box = element.getBoundingClientRect();
            return [box.left, box.right];
        }})""")
    return edges


@pytest.fixture
def page_file(by_hand: ByHand, three_chains: Status) -> Path:
    """The page of three chains, with all that can stand out.

    It has a path and a message that have no place to break.
    """
    message = "m" * 200
    by_hand.last_run.write_text(json.dumps({**LAST_RUN, "exit_code": 1, "message": message}))
    status = {**by_hand.status(), "directory": f"/{'d' * 200}",
              "encpwfile": "/home/user-data/backup/secret_key.txt"}
    path = by_hand.root / "backup.html"
    path.write_text(backup.status_page(status, NOW + 2 * DAY), encoding="ascii")
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_fits_the_screen(
    browser: Browser, page_file: Path, three_chains: Status, width: int
) -> None:
    """All rows and the sums are seen, fulls are bold, nothing is over the edge or over another.

    Nothing was fetched.
    """
    browser.show(page_file, width, "light")
    assert browser.tell("return innerWidth") == width
    assert browser.tell("return document.documentElement.scrollWidth") <= width
    over = browser.tell("""
        const isOver = box => box.right > innerWidth || box.left < 0;
        return [...document.body.querySelectorAll('*')].filter(element =>
            element.tagName != 'title' && isOver(element.getBoundingClientRect())
        ).map(element => element.outerHTML)""")
    assert over == []
    rows = browser.tell("""
        return [...document.querySelectorAll('tbody tr')].map(row => [
            row.innerText, ...[...row.cells].map(cell => getComputedStyle(cell).fontWeight)])""")
    assert len(rows) == 12
    for (text, *weights), row in zip(rows, three_chains["backups"]):
        assert row["date_str"][11:19] in text and row["deleted_in"] in text
        assert set(weights) == {"700" if row["full"] else "400"}
    sums = browser.tell(
        "return [...document.querySelectorAll('tfoot tr')].map(row => row.innerText)")
    assert [text.split("\t")[:2] for text in sums] == [
        ["Files of no complete backup", "400 MB"], ["Total", "18.2 GB"]]
    assert browser.tell("return performance.getEntriesByType('resource').length") == 0
    bars = edges_of(browser, ".bar")
    assert len(bars) == 12 and all(right - left >= 2 for left, right in bars)
    full, increment = bars[2], bars[0]
    assert 0.03 < (increment[1] - increment[0]) / (full[1] - full[0]) < 0.05


@pytest.mark.parametrize("scheme", SCHEMES)
def test_contrast_as_rendered(browser: Browser, page_file: Path, scheme: str) -> None:
    """Each text and bar, as the browser paints it, can be told from what is behind it.

    The scheme is the user's.
    """
    browser.show(page_file, 1200, scheme)
    painted = browser.tell("""
        const transparent = element =>
            getComputedStyle(element).backgroundColor == 'rgba(0, 0, 0, 0)';
        const behind = element => element && transparent(element)
            ? behind(element.parentElement)
            : getComputedStyle(element || document.body).backgroundColor;
        return [...document.body.querySelectorAll('*')].flatMap(element => {
            const style = getComputedStyle(element);
            const texts = [...element.childNodes].some(
                node => node.nodeType == 3 && node.data.trim());
            return element.className == 'bar'
                ? [['bar', style.backgroundColor, behind(element.parentElement)]]
                : texts ? [[element.tagName, style.color, behind(element)]] : []; })""")
    assert {tag for tag, _, _ in painted} >= {
        "H1", "P", "DD", "STRONG", "CODE", "TH", "TD", "SPAN", "SMALL", "CAPTION", "bar"}
    for tag, front, back in painted:
        least = CONTRAST_OF_SHAPES if tag == "bar" else CONTRAST_OF_TEXT
        assert contrast(front, back) >= least, (tag, front, back)
    page = browser.tell("return getComputedStyle(document.body).backgroundColor")
    assert (contrast(page, "#ffffff") > 10) == (scheme == "dark")


def test_accessible_as_rendered(browser: Browser, page_file: Path) -> None:
    """What a screen reader is told: a table with its caption, rows with their heads."""
    browser.show(page_file, 1200, "light")
    nodes = browser.control("Accessibility.getFullAXTree")["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes if not node["ignored"]]
    tables = [name.partition(".")[0] for role, name in told if role == "table"]
    assert tables == ["All backups, the newest first, in local time"]
    roles = [role for role, _ in told]
    assert roles.count("rowheader") == 14 and roles.count("columnheader") == 4


def test_hostile_text_as_rendered(browser: Browser, by_hand: ByHand) -> None:
    """A message with markup is read as it stands, and runs nothing."""
    by_hand.put_set(NOW - DAY)
    message = "<img src=x onerror=document.title='struck'><script>document.title='struck'</script>"
    by_hand.last_run.write_text(json.dumps({**LAST_RUN, "message": message}))
    path = by_hand.root / "backup.html"
    path.write_text(backup.status_page(by_hand.status(), NOW), encoding="ascii")
    browser.show(path, 1200, "light")
    assert message in browser.tell("return document.body.innerText")
    assert browser.tell("return document.title") == "Backups"
    path.write_text(path.read_text().replace("</main>", f"{message}</main>"))
    browser.show(path, 1200, "light")
    assert browser.tell("return document.images.length") == 1
    assert browser.tell("return document.title") == "Backups", "the policy failed"
