"""Restore as people do it: any spelling of a path, progress, refusals in time, and who may not."""

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import PROJECT, PYTHON, SCRIPT, FirstNight, Store, make_store, tree_of
from test_reading_meanwhile import StoppedReader
from test_terminal import on_terminal
from test_traps import SMALL_VOLUMES

pytestmark = pytest.mark.xdist_group("restore")  # one process makes what they restore

ALICE = "mail/mailboxes/example.com/alice"

# Takes its time for each volume, so that the progress is drawn several times.
SLOW_GPG = """#!/bin/sh
case " $* " in *encrypted/*) ;; *" --decrypt "*) sleep 1.2;; esac
exec REAL "$@"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a full backup in three volumes, and an increment in one. Never written to.

    Its list does not fit into a pipe.
    """
    store = make_store(tmp_path_factory.mktemp("made"))
    store.put_key()
    store.stand_in("duplicity", SMALL_VOLUMES)
    for number in range(400):
        (store.root / f"{number:0200}").touch()
    (store.root / "big").write_bytes(os.urandom(2_500_000))
    store.backup()
    (store.root / "ssl/later").write_bytes(os.urandom(500_000))
    store.backup()
    yield store
    store.clean()


def test_any_spelling_of_a_path(made: Store) -> None:
    """A mailbox is restored beside the live one, and the set taken is named first."""
    beside = made.root / f"{ALICE}.restored"
    for path in (f"/./{ALICE}/", str(made.root / ALICE)):
        try:
            errors = made.backup("--restore", str(beside), "--path", path).stderr
            assert re.fullmatch(r"backup: backup of [\d-]{10} [\d:]{8}\+00:00\n", errors)
            assert tree_of(beside) == tree_of(made.root / ALICE)
        finally:
            made.run("rm", "-rf", beside)


def test_progress_is_that_of_the_volumes(made: Store) -> None:
    """On a terminal it is told how much of all volumes has been read, and nothing is left of it."""
    made.stand_in("gpg", SLOW_GPG)
    volumes = sum(path.stat().st_size for path in made.encrypted.glob("*.difftar.gpg"))
    lines = on_terminal(made, "--restore", str(made.scratch / "all"))
    (made.bin / "gpg").unlink()
    assert "restoring everything" in lines[1] and f"restored to {made.scratch}/all" in lines[-1]
    drawn = [line.strip() for line in lines if not line.startswith("backup: ")]
    progress = re.compile(rf"([\d.]+) \w+ of {volumes / 1e6:.1f} MB")
    told = [match[1] for line in drawn if (match := progress.fullmatch(line))]
    assert len(told) == len(drawn) and told[0] == "0" and "1.1" in told, drawn


def test_list_that_nobody_reads_on(made: Store) -> None:
    """It says nothing and exits as one that SIGPIPE ended; so does the status."""
    for command, reader in (("--list", "head -n 1"), ("--status", "exec true")):
        line = shlex.join(made.command(command))
        script = f"{{ sleep 0.1; {line}; echo $? >&2; }} | {reader}"
        assert made.run("bash", "-c", script).stderr == "141\n"


def test_backup_is_no_place_to_restore_to(store: Store) -> None:
    """Nor is STORAGE_ROOT: refused before anything is read, even that there is no backup."""
    store.backups.mkdir()
    before = tree_of(store.root, "")
    (store.scratch / "link").symlink_to(store.backups)
    for place in (store.root, store.backups, store.backups / "a/b", store.scratch / "link/new"):
        errors = store.backup("--restore", str(place), exit_code=2).stderr
        assert errors.startswith(f"backup: {place} ") and errors.count("\n") == 1
    assert tree_of(store.root, "") == before


def test_second_restore_to_the_same_place(keyed: Store, first_night: FirstNight) -> None:
    """It is refused and leaves nothing there; the first one goes on."""
    first_night(keyed)
    target = keyed.scratch / "restored"
    first = StoppedReader(keyed, target)
    try:
        before = os.listdir(target)
        errors = keyed.backup("--restore", str(target), exit_code=2).stderr
        assert "is under way" in errors and os.listdir(target) == before
        first.go_on()
    finally:
        first.remove()
    assert tree_of(target) == tree_of(keyed.root)
    (keyed.scratch / "held").mkdir()
    keyed.run("env", "-C", keyed.scratch, "flock", "held", *keyed.command("--restore", "held"),
              exit_code=2)
    assert os.listdir(keyed.scratch / "held") == []


def test_damaged_increment(made: Store, tmp_path: Path) -> None:
    """A restore of it ends, with what to do: duplicity itself would hang for ever."""
    made.run("cp", "-a", made.root, tmp_path / "damaged")
    (volume,) = (tmp_path / "damaged/backup/encrypted").glob("*.to.*difftar.gpg")
    content = bytearray(volume.read_bytes())
    content[len(content) // 2] ^= 1
    volume.write_bytes(content)
    command = [PYTHON, str(SCRIPT), "--storage-root", str(tmp_path / "damaged")]
    result = made.run(*command, "--restore", tmp_path / "restored", exit_code=1)
    assert "take an older backup with --time" in result.stderr
    told = made.run(*command, "--verify", "--compare", exit_code=3).stderr
    assert told.index(f"{volume} is damaged") < told.index("take an older backup with --time")
    for manifest in volume.parent.glob("duplicity-full.*.manifest.gpg"):
        manifest.unlink()
    assert "leads back to a full one" in made.run(*command, "--list", exit_code=1).stderr


def test_full_disk_to_restore_to(made: Store, tmp_path: Path) -> None:
    """It is told as that, not as an error of duplicity's own, and where what fitted is."""
    made.run("mount", "-t", "tmpfs", "-o", "size=1M", "none", tmp_path)
    try:
        errors = made.backup("--restore", str(tmp_path), exit_code=1).stderr
        (left,) = os.listdir(tmp_path)
    finally:
        made.run("umount", tmp_path)
    assert f"is in {tmp_path}/{left}\n" in errors and "the disk is full; make room" in errors


def test_others_than_root(made: Store) -> None:
    """All that reads the backups says to run it as root, whoever may read the settings."""
    settings = made.scratch / "of-root"
    settings.write_bytes(made.settings.read_bytes())
    settings.chmod(0o600)
    program = made.program_for_others()
    for arguments in (["--list"], ["--verify"], ["--restore", "/dev/null/x"], ["--status"]):
        config = made.settings if arguments == ["--status"] else settings
        result = subprocess.run(
            [PYTHON, program, "--config", config, *arguments], env=made.environment, user="daemon",
            group="daemon", extra_groups=[], capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (1, ""), arguments
        assert re.fullmatch("backup: .*run it as root\n", result.stderr), result.stderr


def test_interrupted_while_it_imports() -> None:
    """^C in the first instants is no traceback."""
    calls = "openat,stat,newfstatat"
    process = subprocess.run(
        ["strace", "-qq", "-o", "/dev/null", "-P", PROJECT / "utils.py", "-e", f"trace={calls}",
         "-e", f"inject={calls}:signal={signal.SIGINT}:when=1", PYTHON, SCRIPT, "--version"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")


def test_path_that_looks_like_a_variable(keyed: Store) -> None:
    """duplicity would put the value in its place, and restore another file."""
    names = ("$LANGUAGE", "$HOME", "$WANTED", "a{b}$X${Y}\\")
    for name in ("C", *names):
        (keyed.root / name).write_text(name)
    keyed.backup()
    for number, name in enumerate(names):
        target = keyed.scratch / f"restored-{number}"
        keyed.backup("--restore", f"/{target}", "--path", name)
        assert (target / name).read_text() == name


def test_place_with_more_room(made: Store) -> None:
    """On a full disk duplicity's temporary files go where more room is, not always to /tmp."""
    small = made.scratch / "small"
    small.mkdir(exist_ok=True)
    made.run("unshare", "--mount", "sh", "-c",
             'mount -t tmpfs -o size=100k none "$0" && TMPDIR="$0" exec "$@"', small, PYTHON,
             made.changed_program("TEMPORARY_BYTES = 575_000_000", "TEMPORARY_BYTES = 10**16"),
             *made.command("--restore", str(made.scratch / "there"))[2:])
