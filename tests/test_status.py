"""The status tells what there is, when it goes and how the last run went, whatever lies there.

It does so from names and sizes alone.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import backup
from conftest import PYTHON, SCRIPT, FirstNight, Store
from utils import Failure

Status = dict[str, Any]
RowKey = tuple[Optional[str], str]

NOW = datetime(2026, 6, 15, 3, tzinfo=timezone.utc)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
SOON = "on next daily backup"
NONE_YET = "No backups have been made yet."
GROUP = "nogroup"  # of STORAGE_USER
MEMBER = ["setpriv", "--reuid", "games", "--regid", GROUP, "--clear-groups"]
STRANGER = ["setpriv", "--reuid", "games", "--regid", "games", "--clear-groups"]


def stamp(date: datetime) -> str:
    """Return a date as duplicity writes it in file names."""
    return date.strftime("%Y%m%dT%H%M%SZ")


def set_names(date: datetime, previous: Optional[datetime] = None) -> tuple[str, str, str]:
    """Return the names of the files of a set: a volume, the signatures, and the manifest.

    previous: of an increment.
    """
    if previous is None:
        dates, kind, signatures = stamp(date), "full", "full-signatures"
    else:
        dates, kind, signatures = f"{stamp(previous)}.to.{stamp(date)}", "inc", "new-signatures"
    return (f"duplicity-{kind}.{dates}.vol1.difftar.gpg",
            f"duplicity-{signatures}.{dates}.sigtar.gpg",
            f"duplicity-{kind}.{dates}.manifest.gpg")


@dataclass(frozen=True)
class ByHand:
    """A STORAGE_ROOT whose backup/encrypted/ is filled by hand."""

    root: Path

    @property
    def encrypted(self) -> Path:
        """STORAGE_ROOT/backup/encrypted."""
        return self.root / "backup/encrypted"

    @property
    def last_run(self) -> Path:
        """STORAGE_ROOT/backup/last-run.json."""
        return self.root / "backup/last-run.json"

    def put(self, name: Union[str, bytes], size_bytes: int = 10) -> Path:
        """Make a file in encrypted/."""
        path = self.encrypted / os.fsdecode(name)
        path.touch()
        os.truncate(path, size_bytes)
        return path

    def put_set(
        self, date: datetime, previous: Optional[datetime] = None, size_bytes: int = 100
    ) -> None:
        """Make the three files of a set, of this size together. previous: of an increment."""
        volume, signatures, manifest = set_names(date, previous)
        self.put(volume, size_bytes - 15)
        self.put(signatures, 10)
        self.put(manifest, 5)

    def put_chain(
        self, begin: datetime, increments: int = 0, size_bytes: int = 1000,
        increment_bytes: int = 100
    ) -> list[datetime]:
        """Make a full and an increment on each of the days after it, and return their dates."""
        dates = [begin + DAY * number for number in range(increments + 1)]
        self.put_set(begin, None, size_bytes)
        for previous, date in zip(dates, dates[1:]):
            self.put_set(date, previous, increment_bytes)
        return dates

    def env(self) -> dict[str, str]:
        """Return the settings for it."""
        return {"STORAGE_ROOT": str(self.root)}

    def status(self, now: datetime = NOW, **env: str) -> Status:
        """Return the status, which must survive JSON."""
        status = backup.backup_status({**self.env(), **env}, now)
        assert json.loads(json.dumps(status)) == status
        return status

    def rows(self, now: datetime = NOW, **env: str) -> list[Status]:
        """Return the rows of the status, newest first."""
        rows: list[Status] = self.status(now, **env)["backups"]
        return rows

    def deleted_in(self, now: datetime = NOW, **env: str) -> list[str]:
        """Return when each set is told to go, newest first."""
        return [row["deleted_in"] for row in self.rows(now, **env)]

    def full_is_next(self, now: datetime = NOW) -> bool:
        """Return whether the next backup is told to be a full one."""
        return backup.should_force_full(self.env(), now)


@pytest.fixture
def by_hand(tmp_path: Path) -> ByHand:
    """An empty encrypted/."""
    made = ByHand(tmp_path / "user-data")
    made.encrypted.mkdir(parents=True)
    return made


@pytest.fixture
def kept(keyed: Store) -> ByHand:
    """An empty encrypted/ in a store, with the modes that a run gives, for the command line."""
    made = ByHand(keyed.root)
    made.encrypted.mkdir(mode=0o750)
    shutil.chown(made.encrypted, group=GROUP)
    return made


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Make the local time UTC, and that of another zone when this is called with its name."""
    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()
    set_zone("UTC")
    yield set_zone
    monkeypatch.undo()
    time.tzset()


# What it returns


def test_keys(by_hand: ByHand) -> None:
    """The answer and its rows have exactly the keys of the design; STORAGE_ROOT is all it needs."""
    full, increment = by_hand.put_chain(NOW - 2 * DAY, 1, size_bytes=2000, increment_bytes=300)
    by_hand.put("stray", 7)
    status = by_hand.status()
    newer, older = status.pop("backups")
    assert status.pop("free_size") > 0
    assert status == {
        "directory": str(by_hand.encrypted),
        "encpwfile": str(by_hand.root / "backup/secret_key.txt"),
        "tz": "UTC", "unmatched_file_size": 7, "last_run": None,
        "last_verify": {"checked": {}, "damaged": {}}, "excluded": {}, "ok": True,
        "headline": "OK: last backup 1 day, 0 hours ago, full on Saturday, 1 increment since"}
    for row in (newer, older):
        assert row.pop("date_str") and row.pop("deleted_in")
    assert newer == {"date": stamp(increment), "date_delta": "1 day, 0 hours",
                     "full": False, "previous": stamp(full), "size": 300}
    assert older == {"date": stamp(full), "date_delta": "2 days, 0 hours",
                     "full": True, "previous": None, "size": 2000}


@pytest.mark.parametrize("env", [
    {}, {"STORAGE_ROOT": "relative"}, {"STORAGE_ROOT": "/", "BACKUP_KEEP_DAYS": "three"}])
def test_wrong_settings(env: dict[str, str]) -> None:
    """A setting that is missing or wrong is a failure with exit code 2, no crash."""
    with pytest.raises(Failure) as caught:
        backup.backup_status(env, NOW)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("missing", [False, True])
def test_no_backups(by_hand: ByHand, missing: bool) -> None:
    """An empty encrypted/ and a missing one are no backups yet, and a full one comes first."""
    if missing:
        by_hand.encrypted.rmdir()
    status = by_hand.status()
    assert (status["backups"], status["unmatched_file_size"], status["last_run"]) == ([], 0, None)
    assert NONE_YET in backup.status_text(status).splitlines()
    assert by_hand.full_is_next()


# Local time


@pytest.mark.parametrize("now, tz, told", [
    (datetime(2026, 3, 29, 12, tzinfo=timezone.utc), "CEST", "2026-03-28T03:30:00+01:00"),
    (datetime(2026, 10, 25, 12, tzinfo=timezone.utc), "CET", "2026-10-24T03:30:00+02:00"),
])
def test_rows_bear_the_local_time_of_their_own_day(
    by_hand: ByHand, zone: Callable[[str], None], now: datetime, tz: str, told: str
) -> None:
    """A set made before the clocks changed bears the time that they showed then: cron's."""
    zone("Europe/Berlin")
    date = datetime.fromisoformat(told)
    by_hand.put_set(date.astimezone(timezone.utc))
    status = by_hand.status(now)
    assert (status["tz"], status["backups"][0]["date_str"]) == (tz, told)


@pytest.mark.parametrize("seconds, told", [
    (0, "0 minutes"), (60, "1 minute"), (119, "1 minute"), (3599, "59 minutes"),
    (3600, "1 hour, 0 minutes"), (2 * 3600 + 5 * 60, "2 hours, 5 minutes"),
    (86400 + 3600, "1 day, 1 hour"), (2 * 86400 + 3 * 3600 + 59 * 60, "2 days, 3 hours"),
    (32 * 86400, "1 month, 1 day"), (365 * 86400, "1 year, 0 months"), (-400 * 86400, "0 minutes"),
])
def test_span(seconds: int, told: str) -> None:
    """A span is told in its two largest units, each in the singular if it is one.

    One that is over is 0 minutes.
    """
    begin = datetime(2026, 1, 1, tzinfo=timezone.utc)
    for hours in (-5, 0, 5):  # in the west it is still December
        end = begin + timedelta(seconds=seconds)
        assert backup.span(begin, end.astimezone(timezone(timedelta(hours=hours)))) == told


# What counts as a set


@pytest.mark.parametrize("previous", [None, NOW - 2 * DAY])
@pytest.mark.parametrize("seconds, belongs", [(60, True), (-60, True), (61, False), (-61, False)])
def test_signatures_dated_off_their_set(
    by_hand: ByHand, previous: Optional[datetime], seconds: int, belongs: bool
) -> None:
    """A signature file dated up to 60 seconds off a complete set without one belongs to it.

    One dated further off is unmatched. Duplicity can build on neither: a full comes next.
    """
    if previous:
        by_hand.put_set(previous, size_bytes=5000)
    volume, _, manifest = set_names(NOW - DAY, previous)
    _, signatures, _ = set_names(NOW - DAY + SECOND * seconds, previous)
    for name, size_bytes in ((volume, 1000), (manifest, 30), (signatures, 200)):
        by_hand.put(name, size_bytes)
    status = by_hand.status()
    assert (status["backups"][0]["size"], status["unmatched_file_size"]) == (
        (1230, 0) if belongs else (1030, 200))
    assert by_hand.full_is_next()


@pytest.mark.parametrize("turn", [1, -1])
def test_order_of_a_directory_is_no_matter(turn: int) -> None:
    """Signatures that belong to a set of another date are no set of their own."""
    volume, _, manifest = set_names(NOW - DAY)
    _, signatures, _ = set_names(NOW - DAY + SECOND)
    names = [volume, manifest, signatures][::turn]
    assert [found.complete for found in backup.sets_of(dict.fromkeys(names, 1))] == [True]


def test_signatures_beside_a_set_that_has_its_own(by_hand: ByHand) -> None:
    """A set with signatures of its own takes no others, nor does a set that is not complete.

    A full takes no increment's.
    """
    by_hand.put_set(NOW - DAY, size_bytes=100)
    by_hand.put(set_names(NOW - DAY + 2 * SECOND)[1], 1000)
    by_hand.put(set_names(NOW - 5 * DAY)[0], 20)
    by_hand.put(set_names(NOW - 5 * DAY + 2 * SECOND)[1], 2000)
    by_hand.put(set_names(NOW - 9 * DAY)[2], 5)
    by_hand.put(set_names(NOW - 9 * DAY, NOW - 10 * DAY)[1], 4000)
    status = by_hand.status()
    assert [row["size"] for row in status["backups"]] == [100, 5]
    assert status["unmatched_file_size"] == 7020


@pytest.mark.parametrize("name", [
    *[f"duplicity-full.{date}.manifest.gpg" for date in (
        "20260230T030000Z", "20260101T250000Z", "20260101T030061Z", "00000101T030000Z",
        "2026010१T030000Z", "20260101T030000Z.to.20260102T030000Z")],
    "duplicity-inc.20260101T030000Z.to.20260100T030000Z.manifest.gpg",
    "duplicity-inc.20260102T030000Z.manifest.gpg",
    *[f"duplicity-full.20260101T030000Z{end}" for end in (
        ".manifest.gpg\n", ".manifestxgpg", ".manifest", ".vol.difftar.gpg", ".manifest.gpg.enc")],
    "\nduplicity-full.20260101T030000Z.manifest.gpg", "\x1b[2J", b"\xff\xfe\n",
    b"duplicity-full.20260101T030000Z.manifest.gpg\xff",
])
def test_names_that_are_no_sets(by_hand: ByHand, name: Union[str, bytes]) -> None:
    """A stray name, however near to one of duplicity's, is no set: it adds to what is unmatched."""
    by_hand.put(name, 17)
    assert (by_hand.rows(), by_hand.status()["unmatched_file_size"]) == ([], 17)
    by_hand.put_set(NOW - DAY, size_bytes=100)
    status = by_hand.status()
    assert [(row["date"], row["size"]) for row in status["backups"]] == [(stamp(NOW - DAY), 100)]
    assert status["unmatched_file_size"] == 17
    assert not by_hand.full_is_next()


def test_dates_far_off(by_hand: ByHand, zone: Callable[[str], None]) -> None:
    """A set dated in a far year is no crash, wherever the server stands.

    A clock without battery makes such dates, or a hand.
    """
    by_hand.put_set(NOW - DAY)
    for date in ("00010101T000000Z", "19691231T235959Z", "99991231T235959Z"):
        by_hand.put(f"duplicity-full.{date}.manifest.gpg")
    for name in ("America/Los_Angeles", "Pacific/Auckland"):
        zone(name)
        status = by_hand.status()
        assert stamp(NOW - DAY) in [row["date"] for row in status["backups"]]
        backup.status_text(status)
        by_hand.full_is_next()


def test_file_that_vanishes_meanwhile(by_hand: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is deleted while the directory is read is not there; the other sets are."""
    @contextmanager
    def list_and_delete(directory: Path) -> Iterator[list["os.DirEntry[str]"]]:
        with real(directory) as entries:
            listed = sorted(entries, key=lambda entry: entry.name != "vanishing")
        by_hand.put("vanishing").unlink(missing_ok=True)
        yield listed

    real = os.scandir
    by_hand.put_chain(NOW - DAY, increments=1)
    by_hand.put("vanishing")
    monkeypatch.setattr("utils.os.scandir", list_and_delete)
    status = by_hand.status()
    assert [row["date"] for row in status["backups"]] == [stamp(NOW), stamp(NOW - DAY)]
    assert status["unmatched_file_size"] == 0


# Any set of names

POOL = [NOW - DAY * days + SECOND * seconds for days in (1, 2, 40) for seconds in (0, 5, 60, 61)]
PATTERNS = [*set_names(NOW), *set_names(NOW, NOW)] + [
    f"duplicity-{kind}.FIRST{second}.{rest}.gpg"
    for kind, rest in (
        ("full", "vol2.difftar"), ("full", "manifest"), ("inc", "manifest"),
        ("inc", "vol12.difftar"), ("full-signatures", "sigtar"), ("new-signatures", "sigtar"),
        ("full", "jsonstat"), ("signatures", "sigtar"))
    for second in ("", ".to.SECOND")]
PATTERNS = [
    pattern.replace(stamp(NOW), "FIRST", 1).replace(stamp(NOW), "SECOND") for pattern in PATTERNS]
STAMPS = some.sampled_from(
    [stamp(date) for date in POOL] * 3 + ["20261301T000000Z", "20260101T240000Z"])
ENDS = some.sampled_from([""] * 12 + [".enc", ".part", "\n", "\udcff"])
LIKE_DUPLICITY = some.builds(
    lambda pattern, first, second, end: os.fsencode(
        pattern.replace("FIRST", first).replace("SECOND", second) + end),
    some.sampled_from(PATTERNS), STAMPS, STAMPS, ENDS)
STRAY = some.binary(min_size=1, max_size=30).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")
).filter(lambda name: name not in (b".", b".."))
KINDS = some.sampled_from(["file"] * 12 + ["directory", "link", "fifo"])
LISTINGS = some.dictionaries(
    LIKE_DUPLICITY | STRAY, some.tuples(KINDS, some.integers(0, 5000)), max_size=25)
NAME = re.compile(
    rb"duplicity-(full|inc|full-signatures|new-signatures)\."
    rb"(?:([0-9]{8}T[0-9]{6}Z)\.to\.)?([0-9]{8}T[0-9]{6}Z)\.(.+)\.gpg")


def expected_key(name: bytes) -> Optional[tuple[bool, RowKey]]:
    """Return, of a name of duplicity's, whether it is a signature file's, and its stamps.

    They are those of the set that it builds on and of its own.
    """
    match = NAME.fullmatch(name)
    if not match or (match[2] is None) != match[1].startswith(b"full"):
        return None
    is_signature = match[1].endswith(b"signatures")
    rest = rb"sigtar" if is_signature else rb"manifest|jsonstat|vol[0-9]+\.difftar"
    if not re.fullmatch(rest, match[4]):
        return None
    known = {stamp(date).encode() for date in POOL} | {stamp(NOW).encode()}
    if any(part not in known for part in match.group(2, 3) if part is not None):
        return None
    return is_signature, (match[2].decode() if match[2] else None, match[3].decode())


def read(text: str) -> datetime:
    """Return the date of a stamp."""
    return datetime.strptime(text, "%Y%m%dT%H%M%S%z")


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(listing=LISTINGS)
def test_any_names(
    tmp_path_factory: pytest.TempPathFactory, listing: dict[bytes, tuple[str, int]]
) -> None:
    """Whatever lies in encrypted/: a row for each manifest, each byte counted once, no crash."""
    by_hand = ByHand(tmp_path_factory.mktemp("any"))
    by_hand.encrypted.mkdir(parents=True)
    for name, (kind, size_bytes) in listing.items():
        path = by_hand.encrypted / os.fsdecode(name)
        if kind == "file":
            by_hand.put(name, size_bytes)
        elif kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to("/etc/passwd")
        else:
            os.mkfifo(path)
    sizes = {name: size_bytes for name, (kind, size_bytes) in listing.items() if kind == "file"}
    keys = {name: key for name in sizes if (key := expected_key(name))}
    rows = {key for name, (_, key) in keys.items() if b".manifest." in name}
    own = {row: sum(sizes[name] for name, (_, key) in keys.items() if key == row) for row in rows}

    status = by_hand.status()

    found = {(row["previous"], row["date"]): row["size"] for row in status["backups"]}
    dates = [row["date"] for row in status["backups"]]
    assert len(found) == len(dates) and dates == sorted(dates, reverse=True)
    assert found.keys() == rows
    assert all(row["full"] == (row["previous"] is None) for row in status["backups"])
    assert all(found[row] >= own[row] for row in rows)
    assert sum(found.values()) + status["unmatched_file_size"] == sum(sizes.values())
    told = re.compile(rf"{SOON}|approx\. \d+ days?|\d+ \w+(, \d+ \w+)?")
    assert all(told.fullmatch(row["deleted_in"]) for row in status["backups"])
    by_hand.full_is_next()
    lines = backup.status_text(status).splitlines()
    shown = [line for line in lines if re.match(r"[12]\d{3}-", line)]
    assert [line[:19] for line in shown] == [
        row["date_str"][:19].replace("T", " ") for row in status["backups"]]
    assert max(map(len, shown), default=0) <= 80
    assert (NONE_YET in lines) == (dates == [])
    shutil.rmtree(by_hand.root)


# When a set goes


def test_chain_before_the_last_full_goes_when_its_newest_set_is_old(by_hand: ByHand) -> None:
    """All sets of a chain go together, when its newest is three days old.

    That is told to the minute before, and then for the next backup.
    """
    dates = by_hand.put_chain(NOW - 10 * DAY, increments=4)
    by_hand.put_set(NOW - 5 * DAY)
    due = dates[-1] + 3 * DAY
    for now, told in (
        (due - 2 * DAY, "2 days, 0 hours"), (due - DAY - SECOND * 3660, "1 day, 1 hour"),
        (due - SECOND * 60, "1 minute"), (due - SECOND, "0 minutes"),
        (due, SOON), (due + 100 * DAY, SOON),
    ):
        assert by_hand.deleted_in(now)[1:] == [told] * 5, now


def test_keep_days_of_the_settings(by_hand: ByHand) -> None:
    """BACKUP_KEEP_DAYS takes the place of the three days, exact and estimated."""
    by_hand.put_set(NOW - 8 * DAY)
    by_hand.put_set(NOW - DAY)
    assert by_hand.deleted_in() == ["approx. 33 days", SOON]
    assert by_hand.deleted_in(BACKUP_KEEP_DAYS="3") == ["approx. 33 days", SOON]
    assert by_hand.deleted_in(BACKUP_KEEP_DAYS="10") == ["approx. 40 days", "2 days, 0 hours"]
    assert by_hand.deleted_in(BACKUP_KEEP_DAYS="8") == ["approx. 38 days", SOON]
    assert by_hand.deleted_in(BACKUP_KEEP_DAYS="1") == ["approx. 31 days", SOON]


@pytest.mark.parametrize("increments, increment_bytes, age, told", [
    (0, 0, DAY, "approx. 33 days"), (0, 0, SECOND, "approx. 34 days"),
    (2, 100, 2 * DAY, "approx. 6 days"),  # half a full is five increments, three of them to come
    (4, 100, 4 * DAY, "approx. 4 days"), (4, 100, 4 * DAY + timedelta(hours=1), "approx. 4 days"),
    (2, 50, 2 * DAY, "approx. 11 days"), (3, 16, 3 * DAY, "approx. 31 days"),
    (2, 100, 4000 * DAY, "approx. 0 days"),
])
def test_estimate(
    by_hand: ByHand, increments: int, increment_bytes: int, age: timedelta, told: str
) -> None:
    """The estimate: half the full's size by the mean increment in days, at most 31, and three."""
    by_hand.put_chain(NOW - age, increments, 1000, increment_bytes)
    assert by_hand.deleted_in() == [told] * (increments + 1)


@pytest.mark.parametrize("lost, orphans", [
    (0, [True, True, True]), (1, [True, True, False]), (2, [True, False, False])])
def test_orphans(by_hand: ByHand, lost: int, orphans: list[bool]) -> None:
    """Increments that do not lead back to a full go when they are three days old, each by itself.

    The next backup is a full one. The lost set may be any before them.
    """
    dates = by_hand.put_chain(NOW - 3 * DAY, increments=3)
    for name in set_names(dates[lost], dates[lost - 1] if lost else None):
        (by_hand.encrypted / name).unlink()
    assert [not told.startswith("approx.") for told in by_hand.deleted_in()] == orphans
    assert by_hand.deleted_in()[0] == "3 days, 0 hours" and by_hand.full_is_next()


def test_older_orphan_does_not_force_a_full(by_hand: ByHand) -> None:
    """An orphan from before the last full goes with the next backup, which is an increment."""
    by_hand.put_set(NOW - 3 * DAY, NOW - 4 * DAY)
    by_hand.put_chain(NOW - 2 * DAY, increments=1)
    assert by_hand.deleted_in()[2] == SOON and SOON not in by_hand.deleted_in()[:2]
    assert not by_hand.full_is_next()


# Full or incremental


def test_half_of_the_full(by_hand: ByHand) -> None:
    """Increments of half of the full's size are followed by another, of a byte more by a full.

    Half of 1001 bytes is 500.5: 500 are not more.
    """
    full, *_, last = by_hand.put_chain(NOW - 3 * DAY, 2, 1001, 250)
    assert not by_hand.full_is_next()
    by_hand.put(set_names(last, last - DAY)[0].replace("vol1", "vol2"), 1)
    assert by_hand.full_is_next()


def test_only_the_last_chain_and_its_own_files_count(by_hand: ByHand) -> None:
    """Increments of an older chain, stray files and dead sets do not add to the half."""
    by_hand.put_chain(NOW - 9 * DAY, 4, 1000, 900)
    by_hand.put_chain(NOW - 2 * DAY, 1, 1000, 400)
    by_hand.put("stray", 10_000)
    by_hand.put(set_names(NOW, NOW - DAY)[0], 10_000)
    assert not by_hand.full_is_next()


def test_31_days(by_hand: ByHand) -> None:
    """A full that is exactly 31 days old is still built on, one second later no more.

    How new its increments are does not count.
    """
    by_hand.put_chain(NOW - 31 * DAY, 30, 100_000, 100)
    assert not by_hand.full_is_next(NOW)
    assert by_hand.full_is_next(NOW + SECOND)


# The command


def recent(hours: float = 1) -> datetime:
    """Return a time some hours ago."""
    return datetime.now(timezone.utc).replace(microsecond=0) - timedelta(hours=hours)


def test_status_of_no_backups(store: Store) -> None:
    """Before the first run the status says so and exits 3; it makes no directory."""
    result = store.backup("--status", exit_code=3)
    assert NONE_YET in result.stdout.splitlines()
    assert result.stderr.startswith("backup: ")
    assert not store.backups.exists()
    answer = json.loads(store.backup("--status", "--json", exit_code=3).stdout)
    assert (answer["backups"], answer["last_run"]) == ([], None)


def test_json_is_what_backup_status_returns(keyed: Store, kept: ByHand) -> None:
    """The JSON is the answer of `backup_status`, alone on the standard output."""
    kept.put_chain(recent(hours=50), increments=1)
    kept.put("stray\n", 3)
    kept.put(b"not UTF-8: \xff", 100)
    kept.put("\x1b[2J", 100)
    result = keyed.backup("--status", "--json")
    status = backup.backup_status(kept.env())
    answer = json.loads(result.stdout)
    assert answer.pop("free_size") > 0 and status.pop("free_size") > 0  # others write to that disk
    assert answer == status and result.stderr == ""
    assert status["unmatched_file_size"] == 203
    by_root = keyed.run(PYTHON, SCRIPT, "--storage-root", keyed.root, "--status", "--json")
    assert {**json.loads(by_root.stdout), **status} == json.loads(by_root.stdout)


@pytest.mark.parametrize("hours, exit_code", [(35.95, 0), (36.05, 3)])
def test_overdue(keyed: Store, kept: ByHand, hours: float, exit_code: int) -> None:
    """A newest set that is over 36 hours old is exit code 3, and the reason is told."""
    kept.put_set(recent(hours))
    kept.put_set(recent(2000))
    result = keyed.backup("--status", exit_code=exit_code)
    assert ("36 hours" in result.stderr) == bool(exit_code)


@pytest.mark.parametrize("content, exit_code", [
    ({"exit_code": 3, "message": "a hook failed"}, 0),
    ({"exit_code": 1, "message": "disk full"}, 3), ({"exit_code": 143}, 3)])
def test_last_run(keyed: Store, kept: ByHand, content: Status, exit_code: int) -> None:
    """A last run that failed is exit code 3, although the newest set is new.

    One that needs attention is shown, no more.
    """
    kept.put_set(recent())
    kept.last_run.write_text(json.dumps(content))
    result = keyed.backup("--status", exit_code=exit_code)
    assert f"exit code {content['exit_code']}" in result.stdout
    assert content.get("message", "") in result.stdout
    assert content.get("message", "") in result.stderr or not exit_code
    answer = keyed.backup("--status", "--json", exit_code=exit_code).stdout
    assert json.loads(answer)["last_run"] == content


@pytest.mark.parametrize("content", [
    b"", b"[{}]", b"null", b'"text"', b"\xff", b'{"exit_code": 0', b"{}", b'{"exit_code": "0"}',
    b'{"exit_code": null, "downtime_seconds": "x", "end": [1], "message": {"a": 1}, "source": 5}',
    b'{"exit_code": 1, "message": "\\u001b[2J\\ud800\\n"}',
    pytest.param(b"1" * 10_000, id="many digits"),
    pytest.param(b"[" * 100_000, id="deeply nested"),
])
def test_broken_last_run(by_hand: ByHand, content: bytes) -> None:
    """A last-run.json that tells of no run counts as one that failed, and the sets are shown."""
    by_hand.put_set(NOW)
    by_hand.last_run.write_bytes(content)
    status = by_hand.status()
    ok, headline = backup.headline_of(status, NOW)
    assert not ok and "last run" in headline and len(status["backups"]) == 1
    text = backup.status_text(status)
    assert status["backups"][0]["date_delta"] in text and "\x1b" not in text


def test_last_run_that_is_a_directory(keyed: Store, kept: ByHand) -> None:
    """Something else in the place of last-run.json is named, and exit code 3."""
    kept.put_set(recent())
    kept.last_run.mkdir()
    assert str(kept.last_run) in keyed.backup("--status", exit_code=3).stderr


@pytest.mark.parametrize("make", ["file", "loop"])
def test_encrypted_that_is_no_directory(keyed: Store, make: str) -> None:
    """Something else in the place of encrypted/ is one sentence that names it, and exit code 1."""
    if make == "file":
        keyed.encrypted.touch()
    else:
        keyed.encrypted.symlink_to(keyed.encrypted)
    assert str(keyed.encrypted) in keyed.backup("--status", exit_code=1).stderr


def test_text(keyed: Store, kept: ByHand) -> None:
    """The text has a line for each set, the totals, the key to keep, and how the last run went."""
    full = recent(hours=49)
    kept.put_set(full, size_bytes=5_300_000_000)
    kept.put_set(full + DAY, full, size_bytes=1_234_567)
    kept.put("stray", 400_000_000)
    kept.last_run.write_text(json.dumps({
        "end": "2026-01-01T03:01:00+00:00", "kind": "incremental", "source": "copy",
        "downtime_seconds": 1.5, "exit_code": 3, "message": "a hook failed"}))
    text = keyed.backup("--status").stdout
    lines = text.splitlines()
    for path in (keyed.encrypted, keyed.backups / "secret_key.txt"):
        assert any(str(path) in line for line in lines)
    last_run = "".join(line for line in lines if line.startswith("Last run"))
    for told in (
        "2026-01-01T03:01:00+00:00", "incremental", "1.5 seconds", "exit code 3", "a hook failed"
    ):
        assert told in last_run
    rows = [line for line in lines if line.startswith(("20", "19"))]
    assert len(rows) == 2
    for row, told in zip(rows, (
        rf"{full + DAY:%Y-%m-%d %H:%M:%S} +1 day, 1 hour +increment +1\.2 MB",
        rf"{full:%Y-%m-%d %H:%M:%S} +2 days, 1 hour +full +5\.3 GB",
    )):
        assert re.search(rf"{told} +approx\. \d+ days", row), text
    total = next(line for line in lines if line.startswith("Total"))
    assert "5.7 GB" in total and "400 MB" in total
    assert any(re.match(r"Free: .* [MG]B", line) for line in lines)
    assert lines[0] == f"OK: last backup 1 day, 1 hour ago, full on {full:%A}, 1 increment since"
    assert "\x1b" not in text


def test_headline(zone: Callable[[str], None]) -> None:
    """The first line tells the newest backup's age first, and the day of the full.

    In the week after it that is told by its name.
    """
    zone("UTC")

    def headline(*rows: tuple[str, bool]) -> str:
        return backup.headline_of({"last_run": None, "backups": [
            {"date": date, "full": full, "date_delta": "7 hours, 5 minutes"}
            for date, full in rows]}, NOW)[1]

    day = [stamp(NOW - timedelta(hours=7) - DAY * number) for number in range(40)]
    ok = "OK: last backup 7 hours, 5 minutes ago"
    assert headline((day[0], True)) == f"{ok}, full on Sunday, 0 increments since"
    full_on_thursday = headline(*((name, name == day[3]) for name in day[:9]))
    assert full_on_thursday.endswith(", full on Thursday, 3 increments since")
    long_ago = headline((day[0], False), (day[20], True))
    assert long_ago.endswith(", full on 2026-05-25, 1 increment since")
    assert headline((day[0], False)) == ok
    assert headline((day[2], True)).startswith("OVERDUE: ") and headline().startswith("OVERDUE: ")


def test_unusual_storage_root(keyed: Store, kept: ByHand) -> None:
    """A STORAGE_ROOT with what the terminal cannot show is shown escaped."""
    odd = os.fsencode(keyed.scratch) + "/odd\n\x1b\u5a18".encode() + b"\xff"
    os.rename(keyed.root, odd)
    result = keyed.run(PYTHON, SCRIPT, "--storage-root", os.fsdecode(odd), "--status", exit_code=3,
                       environment={"PYTHONIOENCODING": "latin-1:strict"})
    assert r"/odd\n\x1b\u5a18\xff/backup" in result.stdout and NONE_YET in result.stdout
    assert "Traceback" not in result.stderr


# Who can ask, and what it reads


@pytest.mark.parametrize("arguments", [
    ["--status"], ["--status", "--json"], ["--status", "--html"]])
def test_group_can_ask_and_no_backup_file_is_opened(
    keyed: Store, kept: ByHand, arguments: list[str]
) -> None:
    """Somebody of STORAGE_USER's group can ask, who can open neither the key nor a backup file.

    Of encrypted/ they can open the directory.
    """
    dates = kept.put_chain(recent(hours=49), increments=1)
    kept.put("stray", 3)
    for path in kept.encrypted.iterdir():
        path.chmod(0)
    kept.last_run.write_text(json.dumps({"exit_code": 0, "end": "of the last run"}))
    kept.last_run.chmod(0o640)
    shutil.chown(kept.last_run, group=GROUP)
    for program in ("duplicity", "gpg"):
        keyed.stand_in(program, f"#!/bin/sh\ntouch {keyed.scratch}/started\n")
    keyed.scratch.chmod(0o777)
    result = keyed.run(*MEMBER, *keyed.command_for_others(*arguments))
    assert "of the last run" in result.stdout and result.stderr == ""
    shown = re.sub(r"(\d)T(\d)", r"\1 \2", result.stdout)  # as in the JSON
    assert all(date.strftime("%Y-%m-%d %H:%M:%S") in shown for date in dates)
    assert not (keyed.scratch / "started").exists()


def test_stranger_is_refused(keyed: Store, kept: ByHand) -> None:
    """Somebody outside of the group is told in one sentence what cannot be read."""
    kept.put_set(recent())
    result = keyed.run(*STRANGER, *keyed.command_for_others("--status"), exit_code=1)
    assert "Permission denied" in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_last_run_that_cannot_be_read(keyed: Store, kept: ByHand) -> None:
    """Who may not read last-run.json gets no half answer."""
    kept.put_set(recent())
    kept.last_run.write_text(json.dumps({"exit_code": 0}))
    kept.last_run.chmod(0o600)
    result = keyed.run(*MEMBER, *keyed.command_for_others("--status"), exit_code=1)
    assert "run it as root" in result.stderr and result.stdout == ""


def test_status_touches_nothing(keyed: Store, kept: ByHand) -> None:
    """Neither names, sizes, times nor modes below STORAGE_ROOT change, and no lock is made."""
    def all_below() -> dict[Path, tuple[int, ...]]:
        found = {path: path.lstat() for path in [keyed.root, *keyed.root.rglob("*")]}
        return {path: (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                for path, status in found.items()}

    kept.put_chain(recent(hours=49), increments=1)
    kept.put(set_names(recent())[0])
    before = all_below()
    keyed.backup("--status")
    assert all_below() == before


# Real backups


def test_after_real_backups(keyed: Store, first_night: FirstNight) -> None:
    """After a full and an increment the status has both, and the run that made the second.

    Their sizes are the bytes of all files.
    """
    first_night(keyed)
    message = keyed.root / "mail/mailboxes/example.com/alice/new/170020.M1P1.host"
    message.write_bytes(os.urandom(100))
    keyed.backup()
    now = recent(hours=0)
    status = json.loads(keyed.backup("--status", "--json").stdout)
    newer, older = status["backups"]
    assert (newer["full"], older["full"], newer["previous"]) == (False, True, older["date"])
    assert timedelta() <= now - read(newer["date"]) < timedelta(minutes=15)
    for row, kind in ((newer, "inc"), (older, "full")):
        paths = [path for path in keyed.encrypted.iterdir()
                 if re.search(rf"\.{row['date']}\.(?!to)", path.name)]
        assert len(paths) == 3 and row["size"] == sum(path.stat().st_size for path in paths), kind
        assert re.fullmatch(r"approx\. \d+ days", row["deleted_in"])
    assert status["unmatched_file_size"] == 0
    assert (status["last_run"]["exit_code"], status["last_run"]["kind"]) == (0, "incremental")
    assert not backup.should_force_full({"STORAGE_ROOT": str(keyed.root)})
    lines = keyed.backup("--status").stdout.splitlines()
    assert len([line for line in lines if re.match(r"\d{4}-.* (full|increment) ", line)]) == 2
    by_group = keyed.run(*MEMBER, *keyed.command_for_others("--status", "--json"))
    sizes = [row["size"] for row in json.loads(by_group.stdout)["backups"]]
    assert sizes == [newer["size"], older["size"]]
    assert by_group.stderr == ""
