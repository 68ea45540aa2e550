"""A sweep of death: killed or signalled at every instant, the next night is a good one.

An instant is a change of the file system or the start of a program. The night is a whole one on a
small store with a real layout of old to migrate. fault_hook counts its instants, in the script, its
keeper and duplicity alike, and strikes at one of them, one run each. SWEEP_STEP=1 tries all
instants, without it a sample is tried.
"""

import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import backup
import utils
from conftest import SUMMARY, Result, Store, make_store, tree_of
from test_migration import MIGRATED, Legacy, files_in, legacy
from test_services import processes_of, programs_of, wait_for

__all__ = ["legacy"]
pytestmark = pytest.mark.sampled
STEP = int(os.environ.get("SWEEP_STEP", "199"))
ALLOWED = {
    "cache", "encrypted", "last-run.json", "last-verify.json", "lock", "secret_key.txt"}


def store_at(place: Path, legacy: Legacy) -> Store:
    """Make a store with the layout of old in a new directory, and one of each kind of file."""
    place.mkdir()
    store = make_store(place)
    mailbox = store.root / "mail" / "mailboxes" / "example.com" / "alice"
    for path in (mailbox / ".Sent", mailbox / "tmp", *mailbox.glob("cur/17000[1-4]*")):
        utils.remove(path)
    legacy.put(store.root)
    return store


def run_hooked(store: Store, instant: int, kind: str, *before: str) -> Result:
    """Run a night, after a command, in which fault_hook strikes at an instant (0: never)."""
    directory = store.scratch / "faults"
    directory.mkdir()
    prefixes = f"{store.root}:/run/backup-"
    return store.run(*before, *store.command(), exit_code=None, environment={
        "PYTHONPATH": str(Path(__file__).parent / "fault_hook"),
        "FAULT_DIRECTORY": str(directory), "FAULT_PREFIXES": prefixes,
        "FAULT_AT": str(instant), "FAULT_KIND": kind, "TMPDIR": str(store.scratch),
        "PYTHONDONTWRITEBYTECODE": "1"})  # it would be an instant, but only once


def instants_of(store: Store) -> list[str]:
    """Return what happened at each instant of a hooked night."""
    return (store.scratch / "faults" / "count").read_text().splitlines()


def assert_good_next_night(store: Store, legacy: Legacy) -> None:
    """Run once more without a fault, and check all that a night promises.

    Services run, the restore equals the tree, the old backups are inside, nothing else is left.
    """
    store.backup()
    assert store.running() == ["dovecot", "postfix"] and not store.stopped_list.exists()
    assert {path.name for path in store.backups.iterdir()} == ALLOWED
    assert all(path.name.endswith(".gpg") for path in store.encrypted.iterdir())
    cached = (store.backups / "cache").rglob("*")
    assert [path for path in cached if path.name.endswith((".part", "-tempdir"))] == []
    left = backup.complete_sets(store.encrypted)
    assert {name for found in left for name in found.files} == set(os.listdir(store.encrypted))
    restored = store.restore()
    inside = files_in(restored / MIGRATED) if (restored / MIGRATED).exists() else {}
    shutil.rmtree(restored / MIGRATED, ignore_errors=True)
    if len(store.manifests()) > 1:  # the night that was struck had made its backup
        first = backup.stamp_date(store.manifests()[0].split(".")[1])
        inside = files_in(store.restore("old", "-t", str(int(first.timestamp())), "-r", MIGRATED))
    now, then = tree_of(store.root), tree_of(restored)
    assert now == then
    assert not (store.root / MIGRATED).exists()
    assert inside == legacy.plain
    wait_for(lambda: processes_of(store) == [])


def survive(place: Path, legacy: Legacy, instant: int, kind: str) -> None:
    """Live through one instant of death, and check what the kind of death promises."""
    store = store_at(place, legacy)
    result = run_hooked(store, instant, kind)
    if len(instants_of(store)) < instant:  # gpg's agent has removed a socket before the script did
        assert result.returncode == 0, result
    elif kind in ("script", "keeper"):
        assert result.returncode == -signal.SIGKILL, result
    else:
        assert result.returncode == 128 + int(kind) and "Traceback" not in result.stderr, result
        assert store.running() == ["dovecot", "postfix"] and not store.stopped_list.exists()
    if kind != "keeper":
        wait_for(lambda: store.running() == ["dovecot", "postfix"], seconds=5)
    wait_for(lambda: programs_of(store) == [])
    assert_good_next_night(store, legacy)
    store.clean()
    shutil.rmtree(place)


def sweep(
    tmp_path: Path, legacy: Legacy, kinds: list[str], name: str, step: int = STEP, only: str = ""
) -> None:
    """Try every step-th instant of a night; kinds take turns.

    only: the program in whose life the instants must lie.
    """
    whole = store_at(tmp_path / "whole", legacy)
    result = run_hooked(whole, 0, "none")
    assert result.returncode == 0, result.stderr
    happened = instants_of(whole)
    numbers = range(1, len(happened) + 1)
    if only:
        inside = [number for number in numbers if happened[number - 1].startswith(only)]
        numbers = range(inside[0], inside[-1] + 1)
    chosen = numbers[::step]
    failures: list[str] = []

    def try_instant(number: int) -> None:
        try:
            survive(tmp_path / f"instant-{number}", legacy, number, kinds[number % len(kinds)])
        except Exception as error:  # every instant is to be heard of, not only the first
            failures.append(f"instant {number}, before {happened[number - 1]}: {error!r}")

    with ThreadPoolExecutor(max_workers=2) as workers:
        list(workers.map(try_instant, chosen))
    SUMMARY.append(f"{name}: {len(chosen)} of {len(happened)} instants tried")
    assert not failures, "\n".join(failures)


def test_script_and_children_killed(tmp_path: Path, legacy: Legacy) -> None:
    """SIGKILL for all but the keeper: services run within 5 seconds, and the next night is good."""
    sweep(tmp_path, legacy, ["script"], "script killed")


def test_keeper_killed_too(tmp_path: Path, legacy: Legacy) -> None:
    """SIGKILL for all, while the keeper lives: services run after the next night, which is good."""
    sweep(tmp_path, legacy, ["keeper"], "keeper killed too", min(STEP, 49), only="utils.py")


def test_signals(tmp_path: Path, legacy: Legacy) -> None:
    """After each signal: exit 128+n, services up, duplicity gone; then a good night."""
    kinds = [str(int(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    sweep(tmp_path, legacy, kinds, "signals", max(STEP, 12))


def test_hook_counts_all_that_strace_sees(tmp_path: Path, legacy: Legacy) -> None:
    """The instants are no fewer than what strace sees of the script.

    Of that count the renames, removals and new directories below the root.
    """
    store = store_at(tmp_path / "traced", legacy)
    log = tmp_path / "strace"
    run_hooked(store, 0, "none", "strace", "-qq", "-o", str(log), "-e",
               "trace=rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat")
    seen = [line for line in log.read_text().splitlines()
            if str(store.root) in line or re.match(r"[a-z][^/]*$", line)]  # relative, in backup/
    calls = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    counted = [line for line in instants_of(store)
               if line.startswith("backup.py os.") and line.split()[1] in calls]
    assert 5 < len(seen) <= len(counted)
