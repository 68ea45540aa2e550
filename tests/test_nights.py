"""Over two months of nights with real duplicity, they do what the status promised each evening."""

import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import backup
import utils
from benchmark import bench_of, compare
from conftest import Entry, Store, copy_backups, make_store, tree_of

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("nights")]  # one process lives through them

Status = dict[str, Any]
Tree = dict[str, Entry]

ZONE = "America/New_York"  # of the server; its clocks change on 8 March, during these nights
FIRST_DAY = datetime(2026, 1, 1, 3, tzinfo=timezone.utc)
BUSY, QUIET = 14_000, 20  # bytes of the message that comes before a night
# Increments are more than half of a full after three busy days, and less after 31 quiet ones.
ARCHIVE_BYTES = 60_000
# The machine is off: first when a full is due, then amid chains, the last time for half a month.
OFF_DAYS = frozenset([*range(11, 16), 18, 19, *range(31, 47)])
QUIET_DAYS = range(22, 58)
LAST_DAY = 68
NOON_DAYS = frozenset([4, 17, 63])  # an admin makes another backup at noon
RESTORED_RUNS = frozenset([15, 30, 45])
SOON = "on next daily backup"

# Real duplicity, but a file vanishes from the tree, its last argument but one, before it reads it.
DUPLICITY_WITH_VANISHING_FILE = """#!/bin/sh
for argument; do source=$target; target=$argument; done
case $1 in full|incremental) rm "$source/archive";; esac
exec REAL "$@"
"""


@dataclass(frozen=True)
class Run:
    """One run of backup.py on its simulated night.

    With it are the status and the forecast right before it, and the status right after it.
    """

    start: datetime
    end: datetime
    full_forecast: bool
    before: Status
    after: Status
    exit_code: int
    printed: str
    running: list[str]

    @property
    def made(self) -> list[Status]:
        """The sets that came with this run."""
        return [row for row in self.after["backups"] if row["date"] not in stamps(self.before)]

    @property
    def gone(self) -> set[str]:
        """The stamps of the sets that went with this run."""
        return stamps(self.before) - stamps(self.after)


@dataclass(frozen=True)
class Restore:
    """A set that was restored after a run, and the tree that it was made from."""

    run: int
    stamp: str
    restored: Tree
    original: Tree


@dataclass(frozen=True)
class History:
    """All that happened."""

    runs: list[Run]
    restores: list[Restore]


def stamps(status: Status) -> set[str]:
    """Return the dates of the sets of a status."""
    return {row["date"] for row in status["backups"]}


def date_of(row: Status) -> datetime:
    """Return the date of a set."""
    return datetime.strptime(row["date"], "%Y%m%dT%H%M%S%z")


def chains(status: Status) -> list[list[Status]]:
    """Return the rows of a status as chains, oldest first: each full begins one."""
    grouped: list[list[Status]] = []
    for row in reversed(status["backups"]):
        if row["full"]:
            grouped.append([])
        grouped[-1].append(row)
    return grouped


def is_exact(told: str) -> bool:
    """Return whether a deletion is told in days and hours."""
    return told != SOON and not told.startswith("approx.")


def promised_time(text: str, now: datetime) -> tuple[datetime, datetime]:
    """Return when a text such as "2 days, 5 hours", counted from now, has passed.

    It is exact to its smallest unit: between which two moments.
    """
    units = {"day": timedelta(days=1), "hour": timedelta(hours=1), "minute": timedelta(minutes=1)}
    parts = [re.fullmatch(r"(\d+) (day|hour|minute)s?", part) for part in text.split(", ")]
    assert parts and all(parts), text
    earliest = now + sum((int(part[1]) * units[part[2]] for part in parts if part), timedelta())
    smallest = parts[-1]
    assert smallest
    return earliest, earliest + units[smallest[2]]


def change_mail(store: Store, number: int, size_bytes: int) -> None:
    """Have a message come and that of the night before go."""
    mailbox = store.root / "mail/mailboxes/example.com/alice/cur"
    (mailbox / f"18{number:04}.M1P1.host:2,").write_bytes(secrets.token_bytes(size_bytes))
    (mailbox / f"18{number - 1:04}.M1P1.host:2,").unlink(missing_ok=True)


def starting_times() -> Iterator[tuple[datetime, int]]:
    """Yield when each run starts, and how many bytes of mail came before it.

    No run starts within 20 minutes of the time of day at which the one three days before it did,
    so that no chain becomes three days old while a run is under way, when it would be anybody's
    guess whether it is deleted.
    """
    for day in range(LAST_DAY + 1):
        if day in OFF_DAYS:
            continue
        size_bytes = QUIET if day in QUIET_DAYS else BUSY
        yield FIRST_DAY + timedelta(days=day, minutes=day * 7 % 60), size_bytes
        if day in NOON_DAYS:
            yield FIRST_DAY + timedelta(days=day, hours=9), size_bytes


def back_up(store: Store, start: datetime, *arguments: str) -> Run:
    """Run backup.py with the clock moved to start; look at the status right before and after."""
    env = utils.load_environment(store.settings)
    before, full_forecast = backup.backup_status(env, start), backup.should_force_full(env, start)
    local = start.astimezone(ZoneInfo(ZONE)).strftime("%Y-%m-%d %H:%M:%S")
    result = store.run("faketime", local, *store.command(*arguments),
                       exit_code=None, environment={"TZ": ZONE})
    assert "Traceback" not in result.stderr, result.stderr
    end = datetime.fromisoformat(store.last_run()["end"])
    assert start <= end < start + timedelta(minutes=15), f"the clock was not moved: {start}, {end}"
    after, printed = backup.backup_status(env, end), result.stdout + result.stderr
    return Run(
        start, end, full_forecast, before, after, result.returncode, printed, store.running())


def add_archive(store: Store) -> None:
    """Make the full backups of a store large beside quiet increments."""
    (store.root / "archive").write_bytes(secrets.token_bytes(ARCHIVE_BYTES))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    """Two months of backups of a small mail store.

    Busy days force fulls by size, quiet ones leave that to the 31 days; some are missed.
    """
    store = make_store(tmp_path_factory.mktemp("nights"))
    with store.settings.open("a") as stream:
        stream.write("BACKUP_KEEP_DAYS=3\n")
    store.put_key()
    add_archive(store)
    runs: list[Run] = []
    restores: list[Restore] = []
    originals: dict[str, Tree] = {}
    for number, (start, size_bytes) in enumerate(starting_times(), 1):
        change_mail(store, number, size_bytes)
        runs.append(back_up(store, start))
        rows = runs[-1].after["backups"]
        originals[rows[0]["date"]] = tree_of(store.root)
        for row in [rows[0], rows[-1]] if number in RESTORED_RUNS else []:
            name, time = f"restored-{number}-{row['date']}", f"{date_of(row).timestamp():.0f}"
            restored = store.restore(name, "--time", time)
            restores.append(Restore(number, row["date"], tree_of(restored), originals[row["date"]]))
    yield History(runs, restores)
    store.clean()


def test_every_run_makes_one_set_and_prints_nothing(history: History) -> None:
    """Each run is silent, ends with services up, and adds one set that bears its time.

    No file belongs to no set.
    """
    assert len(history.runs) >= 45
    for run in history.runs:
        assert (run.exit_code, run.printed) == (0, ""), run.start
        assert run.running == ["dovecot", "postfix"], run.start
        assert len(run.made) == 1 and run.after["backups"][0] == run.made[0], run
        assert run.start <= date_of(run.made[0]) <= run.end
        assert run.after["unmatched_file_size"] == 0
        assert run.after["last_run"]["kind"] == ("full" if run.made[0]["full"] else "incremental")


def test_full_is_made_when_it_was_forecast(history: History) -> None:
    """`should_force_full` right before each run says what the run makes.

    The size, the age, and neither of them occur as reasons.
    """
    assert history.runs[0].full_forecast and history.runs[0].made[0]["full"]
    reasons = []
    for run in history.runs[1:]:
        full, *increments = chains(run.before)[-1]
        large = sum(row["size"] for row in increments) * 2 > full["size"]
        old = run.start - date_of(full) > timedelta(days=31)
        assert run.full_forecast == run.made[0]["full"] == (large or old), run.start
        reasons.append((large, old))
    assert set(reasons) == {(False, False), (True, False), (False, True)}


def test_increments_build_on_the_newest_set(history: History) -> None:
    """Each increment names the set before it as the one that it builds on, a full none."""
    for run in history.runs[1:]:
        before = None if run.made[0]["full"] else run.before["backups"][0]["date"]
        assert run.made[0]["previous"] == before


def test_what_is_due_goes_and_nothing_else_does(history: History) -> None:
    """A set that is to go "on next daily backup" goes with the next run.

    Each other one of a chain before the last full stays.
    """
    kept = gone = 0
    for run in history.runs:
        for row in [row for chain in chains(run.before)[:-1] for row in chain]:
            due = row["deleted_in"] == SOON
            assert (row["date"] in run.gone) == due, (run.start, row)
            gone, kept = gone + due, kept + (not due)
    assert gone >= 20 and kept >= 20, (gone, kept)


def test_the_current_chain_stays_until_it_is_three_days_old(history: History) -> None:
    """Sets of the chain of the last full go with no run.

    But for one that makes a new full when they are over three days old.
    """
    cases = 0
    for run in history.runs[1:]:
        current = chains(run.before)[-1]
        if gone := [row for row in current if row["date"] in run.gone]:
            assert gone == current and run.made[0]["full"], run.start
            assert run.end - date_of(current[-1]) > timedelta(days=3), run.start
            cases += 1
    assert cases == 1, "the machine was meant to be off for some days right before a full, once"


def test_exact_promise_is_kept_to_the_night(history: History) -> None:
    """Once a set's deletion is told in days and hours, the time told stays the same.

    The set goes with the first run after it.
    """
    promises: dict[str, tuple[datetime, datetime]] = {}
    kept = 0
    for run in history.runs:
        for now, status in ((run.start, run.before), (run.end, run.after)):
            for row in status["backups"]:
                stamp = row["date"]
                if is_exact(row["deleted_in"]):
                    earliest, latest = told = promised_time(row["deleted_in"], now)
                    known = promises.get(stamp, told)
                    promises[stamp] = max(earliest, known[0]), min(latest, known[1])
                    assert promises[stamp][0] < promises[stamp][1], (row, now, "not as told", known)
                elif stamp in promises:
                    assert row["deleted_in"] == SOON, (row, now, "is told otherwise than before")
                    assert promises[stamp][0] <= now, (row, now, "is told too early")
            if status is run.before:
                for stamp in stamps(run.before) & promises.keys():
                    earliest, latest = promises[stamp]
                    is_kept = run.end >= earliest if stamp in run.gone else run.start < latest
                    assert is_kept, (stamp, run.start, earliest, latest)
                    kept += stamp in run.gone
    assert kept >= 20, kept


def test_estimates_are_never_negative_and_not_far_off(history: History) -> None:
    """The last chain has an estimate, right to two days where all goes on as before."""
    went = {stamp: run.start for run in history.runs for stamp in run.gone}
    quiet_errors: list[float] = []
    errors: list[float] = []
    for run in history.runs:
        full, *increments = chains(run.after)[-1]
        match = re.fullmatch(r"approx\. (?:(1) day|(0|[2-9]|[1-9]\d+) days)", full["deleted_in"])
        assert match and {row["deleted_in"] for row in increments} <= {full["deleted_in"]}, full
        if full["date"] in went:
            told = run.end + timedelta(days=int(match[1] or match[2]))
            error_days = (told - went[full["date"]]) / timedelta(days=1)
            days = [(date - FIRST_DAY).days for date in (run.start, went[full["date"]])]
            is_quiet = all(day in QUIET_DAYS for day in days)
            (quiet_errors if is_quiet else errors).append(error_days)
    for kind, values in (("quiet", sorted(quiet_errors)), ("all other", sorted(errors))):
        print(f"{kind} nights: {len(values)} estimates,",
              f"off by {values[0]:+.1f} to {values[-1]:+.1f} days,",
              f"half of them by {values[len(values) // 2]:+.1f} or less")
    assert len(quiet_errors) >= 15 and max(abs(error) for error in quiet_errors) <= 2
    assert min(errors) > -5


def test_newest_and_oldest_set_restore(history: History) -> None:
    """The newest set and the oldest restore to their trees, every fifteen runs or so."""
    assert len({restore.stamp for restore in history.restores}) >= 2 * len(RESTORED_RUNS) - 1
    for restore in history.restores:
        assert restore.restored == restore.original, (restore.run, restore.stamp)


def test_nothing_goes_right_after_a_long_absence(keyed: Store) -> None:
    """After over 31 days without a backup a run says so and deletes nothing; the next one does.

    It is the one exception.
    """
    add_archive(keyed)
    back_up(keyed, FIRST_DAY)
    old = stamps(back_up(keyed, FIRST_DAY + timedelta(days=1), "--full").after)
    first, second = (back_up(keyed, FIRST_DAY + timedelta(days=day)) for day in (40, 41))
    assert first.exit_code == 3 and "31 days" in first.printed
    assert first.made[0]["full"] and not first.gone
    assert {row["deleted_in"] for row in second.before["backups"] if row["date"] in old} == {SOON}
    assert (second.exit_code, second.printed, second.gone) == (0, "", old)


@pytest.fixture(scope="module")
def three_nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a full and two increments. Never written to."""
    store = make_store(tmp_path_factory.mktemp("three-nights"))
    store.put_key()
    add_archive(store)
    for day in range(3):
        back_up(store, FIRST_DAY + timedelta(days=day))
    yield store
    store.clean()


def make_orphans(store: Store, three_nights: Store, lost: int) -> set[str]:
    """Put a full and two increments into a store, and delete one of the three by hand.

    Returns the stamps of those that lead back to no full now.
    """
    add_archive(store)
    shutil.copy2(three_nights.root / "archive", store.root)
    copy_backups(three_nights, store)
    made = [name.split(".manifest")[0][-16:] for name in store.manifests()]
    assert len(made) == 3
    for path in store.encrypted.iterdir():
        if f".{made[lost]}." in path.name and f".{made[lost]}.to." not in path.name:
            path.unlink()
    return set(made[lost + 1:])


@pytest.mark.parametrize("lost", [0, 1])
def test_orphans_go_when_they_are_old(keyed: Store, three_nights: Store, lost: int) -> None:
    """Increments whose full, or a set between, was deleted by hand go as told: when they are old.

    The first run makes a full, which restores. What duplicity says of orphans is not told as mail
    that could not be read.
    """
    orphans = make_orphans(keyed, three_nights, lost)
    first, run = (back_up(keyed, FIRST_DAY + timedelta(days=day, hours=1)) for day in (4, 5))
    assert first.full_forecast and first.made[0]["full"] and "could not read" not in first.printed
    due = {row["date"] for row in run.before["backups"] if row["deleted_in"] == SOON}
    assert orphans <= due <= run.gone
    assert run.after["unmatched_file_size"] == 0
    assert run.running == ["dovecot", "postfix"]
    keyed.assert_restores()


def test_missing_entries_are_seen(keyed: Store, three_nights: Store) -> None:
    """A full that lacks a file which vanished is thrown away, whatever else duplicity warns of."""
    make_orphans(keyed, three_nights, 0)
    keyed.stand_in("duplicity", DUPLICITY_WITH_VANISHING_FILE)
    run = back_up(keyed, FIRST_DAY + timedelta(days=3))
    assert (run.exit_code, run.made) == (1, []), run.printed


def test_nights_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """It goes on measuring this script, with its checks and without, beside the order of 2015."""
    with bench_of(Path("/var/tmp"), 100, None) as bench:  # gpg's agent fails under a long path
        compare(bench, 1)
    told = capsys.readouterr().out
    for kind in ("full", "incremental"):
        for name in ("this script", "without the checks", "order of 2015", "floor"):
            assert f"| {kind}, {name} | " in told
