"""The lock: one run at a time, named by the second one, released by the kernel and never followed elsewhere."""

import fcntl
import re
import signal
import stat
import subprocess

import pytest

import utils
from conftest import Store
from test_services import start_and_reach, wait_for


def test_second_run_exits_at_once_and_names_the_first(keyed: Store) -> None:
    """Exit 4 with process id and time of the first run; nothing is touched, and no last-run.json tells of it."""
    first = start_and_reach(keyed)
    calls = len(keyed.calls())
    result = keyed.backup(exit_code=4)
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    assert re.search(rf"another run \(process {first.pid}, since {since}\) holds the lock", result.stderr)
    assert len(keyed.calls()) == calls and not (keyed.backups / "last-run.json").exists()
    first.terminate()
    first.communicate()
    (keyed.bin / "duplicity").unlink()
    keyed.backup()


def test_lock_is_released_when_its_holder_is_killed(keyed: Store) -> None:
    """The kernel releases it; until mail is back the keeper holds it."""
    for action in ("stop", "start"):
        (keyed.bin / f"dovecot.waits-{action}").touch()
    first = subprocess.Popen(keyed.command(), env=keyed.environment, stdin=subprocess.DEVNULL)
    wait_for(lambda: "dovecot stop" in keyed.calls())
    first.kill()
    first.wait()
    (keyed.bin / "dovecot.waits-stop").unlink()
    wait_for(lambda: "dovecot start" in keyed.calls())
    assert f"process {first.pid}" in keyed.backup(exit_code=4).stderr
    (keyed.bin / "dovecot.waits-start").unlink()
    wait_for(lambda: not keyed.stopped_list.exists())
    wait_for(lambda: keyed.backup(exit_code=None).returncode == 0)


def test_programs_inherit_neither_lock_nor_pipe(keyed: Store) -> None:
    """A daemon that a service starts must not hold the lock, nor the pipe that keeps mail stopped."""
    (keyed.bin / "service").write_text((keyed.bin / "service").read_text().replace(
        "case $2 in", f'ls -l /proc/$$/fd > {keyed.scratch}/descriptors-$2\ncase $2 in'))
    keyed.backup()
    for action in ("stop", "start"):
        text = (keyed.scratch / f"descriptors-{action}").read_text()
        assert "memfd:output" in text
        assert "pipe:" not in text and "backup/lock" not in text


def test_lock_file_stays(keyed: Store) -> None:
    """It is root's alone, and never deleted: two runs could otherwise hold two locks."""
    keyed.backup()
    before = (keyed.backups / "lock").stat()
    keyed.backup()
    after = (keyed.backups / "lock").stat()
    assert before.st_ino == after.st_ino and stat.S_IMODE(after.st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "dangling", "directory"])
def test_lock_that_is_no_regular_file(keyed: Store, kind: str) -> None:
    """A symbolic link is not followed, nothing else is opened: exit 1 with a sentence, what it points to untouched."""
    lock, elsewhere = keyed.backups / "lock", keyed.scratch / "elsewhere"
    if kind == "link":
        elsewhere.write_text("precious")
    if kind in ("link", "dangling"):
        lock.symlink_to(elsewhere)
    else:
        lock.mkdir()
    result = keyed.backup(exit_code=1)
    assert str(lock) in result.stderr and keyed.calls() == []
    assert not elsewhere.exists() if kind != "link" else elsewhere.read_text() == "precious"


def test_lock_whose_holder_has_written_nothing_yet(keyed: Store) -> None:
    """Between the lock and its text there is an instant; a second run says what it knows."""
    with open(keyed.backups / "lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "which has only just begun" in keyed.backup(exit_code=4).stderr


def test_another_failure_to_open_is_told(keyed: Store) -> None:
    """What the operating system refuses otherwise comes through as it is."""
    with pytest.raises(FileNotFoundError), utils.exclusive_process(keyed.backups / "missing" / "lock"):
        raise AssertionError("no lock can be there")


def test_killed_in_the_lock(keyed: Store) -> None:
    """A text that a killed run left does not keep anybody out."""
    (keyed.backups / "lock").write_text("process 1, since ever, and some more text that is longer than what comes next will be" * 2)
    process = subprocess.Popen(keyed.command(), env=keyed.environment, stdin=subprocess.DEVNULL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    keyed.backup()
    assert (keyed.backups / "lock").read_text().count("process") == 1
