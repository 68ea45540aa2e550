"""The layout of old is migrated so that, whatever happens at whatever instant, no byte of it is lost and the next run carries on."""

import contextlib
import filecmp
import logging
import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import PROJECT, PYTHON, USER, Entry, FirstNight, Store, tree_of, write_messages

import backup
import utils

MIGRATED = "migrated_unencrypted_backup"
ORPHAN = "duplicity-full.20250101T030000Z.vol1.difftar.gz"

# What a process can do to files without changing any; every other system call on files is taken for a change.
HARMLESS = frozenset(
    "access close dup dup2 dup3 epoll_create1 execve faccessat faccessat2 fadvise64 fcntl fgetxattr flistxattr fstat fstatfs fsync getcwd "
    "getdents64 getxattr ioctl lgetxattr listxattr llistxattr lseek lstat mmap newfstatat poll ppoll pread64 read readlink readlinkat "
    "stat statfs statx".split())
CHILD = """import sys
sys.path.insert(0, sys.argv[1])
import backup
backup.migrate_legacy_layout(backup.work_of({"STORAGE_ROOT": sys.argv[2]}))
"""


@dataclass(frozen=True)
class Legacy:
    """What the 2015 script left: its backup/ directory, and the trees that it saved, oldest first."""

    backups: Path
    trees: tuple[dict[str, Entry], ...]

    @property
    def times(self) -> list[str]:
        """When they were saved, as duplicity takes it: on a busy machine not the second at which it was started."""
        stamps = sorted(name.split(".manifest")[0][-16:] for name in self.plain if name.endswith(".manifest"))
        return [str(backup.stamp_date(stamp).timestamp()).split(".")[0] for stamp in stamps]

    @property
    def manifest(self) -> str:
        """The name of the full backup's manifest: the plain file that serves as an example."""
        return next(name for name in self.plain if name.startswith("duplicity-full.") and name.endswith(".manifest"))

    @property
    def plain(self) -> dict[str, bytes]:
        """The content of the plain files by name."""
        return {path.name: path.read_bytes() for path in (self.backups / "duplicity").iterdir()}

    def put(self, root: Path) -> None:
        """Put a copy of the layout into a STORAGE_ROOT."""
        subprocess.run(["cp", "--archive", f"{self.backups}/.", str(root / "backup")], check=True)


@dataclass(frozen=True)
class Instant:
    """A migration that was killed just before a system call. lost: contents that were nowhere then. final: the state after the next run."""

    call: str
    lost: frozenset[bytes]
    final: dict[str, Entry]


def encrypt(plain: Path, copy: Path, key: Path) -> None:
    """Make an openssl copy as the 2015 script made it, with the digest of its time."""
    subprocess.run(["openssl", "enc", "-aes-256-cbc", "-a", "-salt", "-md", "md5", "-pass", f"file:{key}", "-in", str(plain),
                    "-out", str(copy)], check=True, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Legacy:
    """A real legacy layout: a plain full backup and an increment made by duplicity, and an openssl copy of each of their files."""
    scratch = tmp_path_factory.mktemp("legacy")
    root = scratch / "user-data"
    backups = root / "backup"
    for directory in (backups / "duplicity", backups / "encrypted"):
        directory.mkdir(mode=0o755, parents=True)
    key = backups / "secret_key.txt"
    key.touch(mode=0o600)
    subprocess.run(["openssl", "rand", "-base64", "-out", str(key), "2048"], check=True)
    write_messages(root)
    trees: list[dict[str, Entry]] = []
    for action, time_of_night in (("full", "2026-01-01 03:00:00"), ("incremental", "2026-01-02 03:00:00")):
        if trees:
            mailbox = root / "mail/mailboxes/example.com/alice"
            next((mailbox / "cur").glob("170001*")).unlink()
            (mailbox / "new/1800.M1P1.host").write_text("Subject: of the second night\n")
            (mailbox / "dovecot.index").write_bytes(b"changed" * 500)
        trees.append(tree_of(root))
        subprocess.run(
            ["faketime", time_of_night, "duplicity", action, "--no-encryption", "--archive-dir", str(scratch / "archive"),
             "--exclude", str(backups), str(root), (backups / "duplicity").as_uri()],
            env={**os.environ, "TZ": "UTC"}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    for path in (backups / "duplicity").iterdir():
        encrypt(path, backups / "encrypted" / f"{path.name}.enc", key)
    assert len(list((backups / "encrypted").iterdir())) == 6
    return Legacy(backups, tuple(trees))


@pytest.fixture
def old(store: Store, legacy: Legacy) -> Store:
    """A mail store with the legacy layout, whose mail has changed since."""
    legacy.put(store.root)
    (store.root / "mail/mailboxes/example.com/alice/new/1900.M1P1.host").write_text("Subject: of today\n")
    return store


@contextlib.contextmanager
def mounted(path: Path, size: str = "2g") -> Iterator[Path]:
    """Mount an empty file system of its own at a directory, made if it is missing, while the block runs."""
    path.mkdir(mode=0o755, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def empty(directory: Path) -> None:
    """Delete all that is in a directory; a file system that is mounted there stays, empty."""
    for path in directory.iterdir():
        if path.is_mount():
            empty(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def state_of(root: Path) -> dict[str, Entry]:
    """Return all that is in a STORAGE_ROOT, backup/ included; the times of directories tell when something ran, not what it left."""
    return {name: (*entry[:4], None, *entry[5:]) if entry[0] == stat.S_IFDIR else entry
            for name, entry in tree_of(root, without="").items()}


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())


def contents_of(root: Path) -> frozenset[bytes]:
    """Return the contents of all regular files in a tree."""
    return frozenset(entry[5] for entry in tree_of(root, without="").values() if isinstance(entry[5], bytes) and entry[0] == stat.S_IFREG)


def migrate(root: Path) -> None:
    """Migrate the layout in a STORAGE_ROOT, undisturbed."""
    filecmp.clear_cache()
    backup.migrate_legacy_layout(backup.work_of({"STORAGE_ROOT": str(root)}))


def traced_migration(root: Path, *options: str) -> tuple[int, list[str]]:
    """Migrate in a process of its own under strace. Returns its exit code, negative if by a signal, and the lines that strace wrote."""
    log = root.parent / f"{root.name}.strace"
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}  # measuring writes files too
    finished = subprocess.run(  # not with --seccomp-bpf: strace 6.1 then injects no signals
        ["strace", "-f", "-qqq", "-o", str(log), *options, PYTHON, "-B", "-c", CHILD, str(PROJECT), str(root)],
        env=unmeasured, stdin=subprocess.DEVNULL, capture_output=True)
    lines = [re.sub(r"^\d+ +", "", line) for line in log.read_text(errors="replace").splitlines()]
    return finished.returncode, [line for line in lines if not line.startswith("+++")]


def changes_in(lines: Sequence[str]) -> list[tuple[str, int, str]]:
    """Return the calls that change files, and the end: each with its name, how many of that name there were so far, and its text."""
    numbers: dict[str, int] = {}
    changes = []
    for line in lines:
        name, _, arguments = line.partition("(")
        numbers[name] = numbers.get(name, 0) + 1
        writes = re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments) if name == "openat" else name not in HARMLESS
        if writes or name == "ioctl" and "FICLONE" in arguments:
            changes.append((name, numbers[name], call_in(line)))
    return [*changes, ("exit_group", 1, "exit_group(0")]


def call_in(line: str) -> str:
    """Return the beginning of a line of strace's, up to what differs between two runs: lists of times, arguments that a call fills in."""
    return re.split(r", \[|\) += ", line)[0]


def kill_everywhere(root: Path, make_layout: Callable[[], None], saved: frozenset[bytes]) -> tuple[dict[str, Entry], list[Instant]]:
    """Kill the migration before each change that it makes and before its end, and let the next run carry on.

    Before a change is after the one before it: no state is left out. root: of the throwaway layouts. make_layout: fills it.
    saved: the contents that must never be lost. Returns the state that an undisturbed migration leaves, and what came of each kill.
    """
    make_layout()
    code, lines = traced_migration(root, "-e", "trace=%file,%desc")
    assert code == 0
    undisturbed = state_of(root)
    instants = []
    for name, number, text in changes_in(lines):
        empty(root)
        make_layout()
        code, lines = traced_migration(root, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={number}")
        assert code == -9 and call_in(lines[-1]) == text, (code, text, lines[-1:])
        lost = saved - contents_of(root)
        migrate(root)
        instants.append(Instant(text, lost, state_of(root)))
    empty(root)
    return undisturbed, instants


def put_with_strays(root: Path, legacy: Legacy) -> None:
    """Put a layout in which one openssl copy has no original, and another is of a size that its original does not have."""
    legacy.put(root)
    for name, text in ((ORPHAN, "the only copy\n"), (legacy.manifest, "more\n")):
        path = root / "backup/encrypted" / f"{name}.enc"
        with path.open("a") as stream:
            stream.write(text)
        os.utime(path, (1_600_000_000, 1_600_000_000))


def strays_in(root: Path, legacy: Legacy) -> dict[str, bytes]:
    """Return the contents of those two copies in a layout by name."""
    return {name: (root / "backup/encrypted" / name).read_bytes() for name in (f"{ORPHAN}.enc", f"{legacy.manifest}.enc")}


def interrupt_by_hand(root: Path) -> None:
    """Bring a layout to where a migration to another file system may have stood: some moved, one copied, some openssl copies deleted."""
    plain, migrated = root / "backup/duplicity", root / MIGRATED
    migrated.mkdir(mode=0o700)
    paths = sorted(plain.iterdir())
    for path in paths[:3]:
        shutil.copy2(path, migrated)
    for path in paths[:2]:
        path.unlink()
    (root / "backup/encrypted" / f"{paths[0].name}.enc").unlink()
    (migrated / f".{paths[3].name}.copy").write_text("begun")


def assert_proved(store: Store, legacy: Legacy) -> None:
    """Check that plain duplicity restores, from the new backup, the old backups, and from those both trees that they hold."""
    assert not (store.backups / "duplicity").exists() and not (store.root / MIGRATED).exists()
    assert not list(store.encrypted.glob("*.enc"))
    restored = store.restore("proof")
    assert {name: entry for name, entry in tree_of(restored).items() if not name.startswith(MIGRATED)} == tree_of(store.root)
    migrated = restored / MIGRATED
    assert stat.S_IMODE(migrated.stat().st_mode) == 0o700 and migrated.stat().st_uid == 0
    assert {path.name: path.read_bytes() for path in migrated.iterdir()} == legacy.plain
    for seconds, tree in zip(legacy.times, legacy.trees):
        target = store.scratch / f"old-{seconds}"
        store.run("duplicity", "restore", "--no-encryption", "--archive-dir", store.scratch / "old-archive", "-t", seconds,
                  migrated.as_uri(), target)
        assert tree_of(target) == tree


# A night


def test_old_backups_come_back_out_of_the_new_one(old: Store, legacy: Legacy) -> None:
    """One night: silent, the old layout gone, and plain duplicity restores from the new backup the old ones, and from those their trees."""
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert_proved(old, legacy)
    assert not (old.backups / "legacy").exists()
    assert old.running() == ["dovecot", "postfix"]


def test_migrated_backups_stay_until_a_backup_is_complete(old: Store, legacy: Legacy) -> None:
    """When the first backup fails the plain files wait, readable by root only, and the next complete one holds them."""
    old.stand_in("duplicity", "#!/bin/sh\ncase $1 in full) exit 50;; esac\nexec REAL \"$@\"\n")
    old.backup(exit_code=1)
    migrated = old.root / MIGRATED
    assert stat.S_IMODE(migrated.stat().st_mode) == 0o700
    assert {path.name: path.read_bytes() for path in migrated.iterdir()} == legacy.plain
    (old.bin / "duplicity").unlink()
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert_proved(old, legacy)


def test_unread_migrated_backup_is_kept(old: Store, legacy: Legacy) -> None:
    """When duplicity could not read one of the plain files they all stay until a night in which it could."""
    unread = old.backups / "snapshot/tree" / MIGRATED / legacy.manifest
    old.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) exec strace -qq -o /dev/null -P '{unread}' -e trace=openat -e inject=openat:error=EIO REAL "$@";; esac
exec REAL "$@"
""")
    result = old.backup(exit_code=3)
    assert MIGRATED in result.stderr
    assert {path.name: path.read_bytes() for path in (old.root / MIGRATED).iterdir()} == legacy.plain
    (old.bin / "duplicity").unlink()
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert_proved(old, legacy)


def test_migrated_backup_that_is_hidden_from_the_copy(old: Store, legacy: Legacy) -> None:
    """STORAGE_USER gives the directory another name while the copy is made, and then its own again: it is in no backup, and is kept."""
    migrated = old.root / MIGRATED
    hidden = old.root / ".backup-snapshot"
    old.stand_in("nice", f"#!/bin/sh\nmv {hidden} {migrated}\nexec REAL \"$@\"\n")
    (old.backups / "before-backup").write_text(f"#!/bin/sh\nmv {migrated} {hidden}\n")
    (old.backups / "before-backup").chmod(0o755)
    assert f"{migrated} is kept because it was changed" in old.backup(exit_code=3).stderr
    assert {path.name: path.read_bytes() for path in migrated.iterdir()} == legacy.plain
    (old.backups / "before-backup").unlink()
    (old.bin / "nice").unlink()
    old.backup()
    assert_proved(old, legacy)


def test_migrated_backup_that_cannot_be_deleted(old: Store) -> None:
    """The backup was made: the rest of the night goes on, and what is to be looked at is said."""
    (old.backups / "after-backup").write_text("#!/bin/sh\n")
    (old.backups / "after-backup").chmod(0o755)
    migrated = old.root / MIGRATED
    result = old.run("strace", "-qqq", "-o", "/dev/null", "-P", migrated, "-e", "trace=unlinkat", "-e", "inject=unlinkat:error=EPERM",
                     *old.command("-v"), exit_code=3)
    assert f"{migrated} could not be deleted, {migrated}/duplicity-" in result.stderr and "running the hook" in result.stderr
    old.backup()
    assert not migrated.exists()


def test_new_backups_are_left_alone(keyed: Store, first_night: FirstNight, legacy: Legacy) -> None:
    """Files of the new format beside openssl copies stay to the byte, and an increment takes the old backups in."""
    first_night(keyed)
    before = {path.name: path.read_bytes() for path in keyed.encrypted.iterdir()}
    (keyed.backups / "secret_key.txt").rename(keyed.scratch / "key")
    legacy.put(keyed.root)
    (keyed.scratch / "key").rename(keyed.backups / "secret_key.txt")
    result = keyed.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert before == {name: (keyed.encrypted / name).read_bytes() for name in before}
    assert len(keyed.manifests()) == 2 and "-inc." in keyed.manifests()[1]
    assert_proved(keyed, legacy)


# Killed at every instant


def assert_nothing_lost(undisturbed: dict[str, Entry], instants: Sequence[Instant]) -> None:
    """Check that at each instant all was somewhere, and that each following run ended where an undisturbed one does."""
    assert [instant.call for instant in instants if instant.lost] == []
    assert [instant.call for instant in instants if instant.final != undisturbed] == []


def test_kill_before_every_change(tmp_path: Path, legacy: Legacy) -> None:
    """Killed before any of its changes, on one file system, the migration has lost nothing and the next run ends where it would have."""
    root = tmp_path / "root"
    root.mkdir()
    put_with_strays(root, legacy)
    strays = strays_in(root, legacy)
    saved = frozenset([*legacy.plain.values(), *strays.values()])
    assert len(saved) == 8
    empty(root)
    undisturbed, instants = kill_everywhere(root, lambda: put_with_strays(root, legacy), saved)
    assert {name: entry[5] for name, entry in undisturbed.items() if name.endswith(".enc")} == {
        f"backup/legacy/{name}": content for name, content in strays.items()}
    # mode, rename, the five copies whose originals are there, legacy/, the two strays, the end
    assert len(instants) >= 11, [instant.call for instant in instants]
    assert_nothing_lost(undisturbed, instants)


@pytest.mark.parametrize("begun", [False, True], ids=["whole", "begun"])
def test_kill_before_every_change_on_another_file_system(tmp_path: Path, legacy: Legacy, begun: bool) -> None:
    """The same where backup/ is a file system of its own and files are copied, whole or begun by an earlier run; no half copy stays."""
    def make_layout() -> None:
        put_with_strays(root, legacy)
        if begun:
            interrupt_by_hand(root)
        else:
            for name in set(legacy.plain) - set(plain):
                (root / "backup/duplicity" / name).unlink()
                (root / "backup/encrypted" / f"{name}.enc").unlink()

    # Three files are copied in either case: of the whole layout the full backup's, which are enough.
    plain = {name: content for name, content in legacy.plain.items() if begun or name.startswith("duplicity-full")}
    root = tmp_path / "root"
    root.mkdir()
    with mounted(root / "backup"):
        make_layout()
        saved = frozenset([*plain.values(), *strays_in(root, legacy).values()])
        empty(root)
        undisturbed, instants = kill_everywhere(root, make_layout, saved)
    # For each file that is copied: try to rename, open, write, mode, times, rename, delete; and 10 before, between and after.
    assert len(instants) >= 3 * 7 + 10, [instant.call for instant in instants]
    assert {name.partition("/")[2]: entry[5] for name, entry in undisturbed.items() if name.startswith(f"{MIGRATED}/")} == plain
    assert_nothing_lost(undisturbed, instants)


def test_kill_before_every_change_with_clashing_names(tmp_path: Path, legacy: Legacy) -> None:
    """Two different files of one name on two file systems: killed before any change nothing is lost, then or after the next run."""
    def make_layout() -> None:
        legacy.put(root)
        for name in set(legacy.plain) - {legacy.manifest}:
            (root / "backup/duplicity" / name).unlink()
            (root / "backup/encrypted" / f"{name}.enc").unlink()
        (root / MIGRATED).mkdir(mode=0o700)
        (root / MIGRATED / legacy.manifest).write_text("another of this name\n")
        os.utime(root / MIGRATED / legacy.manifest, (1_600_000_000, 1_600_000_000))

    root = tmp_path / "root"
    root.mkdir()
    saved = frozenset([legacy.plain[legacy.manifest], b"another of this name\n"])
    with mounted(root / "backup"):
        undisturbed, instants = kill_everywhere(root, make_layout, saved)
    assert undisturbed[f"{MIGRATED}/{legacy.manifest}"][5] == b"another of this name\n"
    assert undisturbed[f"{MIGRATED}/{legacy.manifest}.1"][5] == legacy.plain[legacy.manifest]
    assert len(instants) >= 12, [instant.call for instant in instants]
    assert_nothing_lost(undisturbed, instants)


def kill_night(store: Store, call: str, path: Path) -> None:
    """Begin a whole night and kill it just before it makes a system call on a path."""
    store.run("strace", "-qqq", "-o", "/dev/null", "-P", path, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL",
              *store.command(), exit_code=-9)
    assert store.calls("stop") == [] and store.running() == ["dovecot", "postfix"]


def test_good_night_after_one_killed_before_the_move(old: Store, legacy: Legacy) -> None:
    """A whole night killed before its first step of the migration leaves mail running, and the next night is a good one that holds all."""
    kill_night(old, "rename", old.backups / "duplicity")
    assert (old.backups / "duplicity" / legacy.manifest).exists()
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert_proved(old, legacy)


def test_good_night_after_one_killed_among_the_copies(old: Store, legacy: Legacy) -> None:
    """The same when some openssl copies were deleted and others not."""
    kill_night(old, "unlink", old.encrypted / f"{legacy.manifest}.enc")
    assert 0 < len(names_in(old.encrypted)) < 6
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert_proved(old, legacy)


def test_good_night_after_one_killed_between_file_systems(old: Store, legacy: Legacy) -> None:
    """The same where backup/ is a file system of its own and the kill comes when a file was copied and not yet deleted."""
    shutil.rmtree(old.backups)
    with mounted(old.backups):
        legacy.put(old.root)
        kill_night(old, "unlink", old.backups / "duplicity" / legacy.manifest)
        assert (old.backups / "duplicity" / legacy.manifest).exists() and (old.root / MIGRATED / legacy.manifest).exists()
        result = old.backup()
        assert (result.stdout, result.stderr) == ("", "")
        assert_proved(old, legacy)


@pytest.mark.parametrize("call", ["unlinkat:when=2", "unlinkat:when=6", "rmdir"])
def test_good_night_after_one_killed_while_the_migrated_are_deleted(old: Store, legacy: Legacy, call: str) -> None:
    """What is left of the migrated backups, or of what lies beside them, when a kill comes is deleted by the next night."""
    name, _, when = call.partition(":")
    migrated = old.root / MIGRATED
    (old.backups / "duplicity/notes").mkdir()
    (old.backups / "duplicity/notes/by hand").touch()
    old.run("strace", "-qqq", "-o", "/dev/null", "-P", migrated, "-e", f"trace={name}",
            "-e", ":".join([f"inject={name}:signal=SIGKILL", *filter(None, [when])]), *old.command(), exit_code=-9)
    assert old.running() == ["dovecot", "postfix"] and migrated.exists()
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "") and not migrated.exists()


# What is on the disk when


def trace_order(root: Path) -> list[str]:
    """Migrate under strace. Returns in their order, with paths relative to STORAGE_ROOT: "sync PATH", "delete PATH", "rename FROM TO"."""
    code, lines = traced_migration(root, "-y", "-e", "trace=fsync,fdatasync,sync,unlink,unlinkat,rename,renameat,renameat2")
    assert code == 0
    words = {"fsync": "sync", "fdatasync": "sync", "unlink": "delete", "rename": "rename"}
    done = []
    for line in lines:
        name = line.partition("(")[0]
        paths = re.findall(r'[<"]([^>"]+)[>"]', line)
        if line.endswith(" = 0"):
            done.append(" ".join([words[name], *(os.path.relpath(path, root) for path in paths)]))
    return done


def test_directories_are_synced_before_copies_are_deleted(tmp_path: Path, legacy: Legacy) -> None:
    """The move is on the disk, in both directories that it changes, before the first openssl copy goes."""
    legacy.put(tmp_path)
    done = trace_order(tmp_path)
    move = done.index(f"rename backup/duplicity {MIGRATED}")
    deleted = [index for index, action in enumerate(done) if action.startswith("delete backup/encrypted/")]
    assert len(deleted) == 6
    assert {"sync .", "sync backup"} <= set(done[move:deleted[0]])


def test_file_is_synced_before_its_original_is_deleted(tmp_path: Path, legacy: Legacy) -> None:
    """Between file systems an original goes only when its copy and then its new name are on the disk."""
    with mounted(tmp_path / "backup"):
        legacy.put(tmp_path)
        done = trace_order(tmp_path)
    for name in legacy.plain:
        renamed = next(index for index, action in enumerate(done) if action.endswith(f" {MIGRATED}/{name}"))
        source = done[renamed].split()[1]
        assert f"sync {source}" in done[:renamed]
        assert f"sync {MIGRATED}" in done[renamed:done.index(f"delete backup/duplicity/{name}")]


@pytest.mark.parametrize(("call", "error"), [("fsync", "EIO"), ("sendfile", "ENOSPC"), ("unlink", "EIO")])
def test_disk_that_fails_loses_nothing(tmp_path: Path, legacy: Legacy, call: str, error: str) -> None:
    """A copy, sync or deletion that the disk refuses ends the migration with every file still there, and the next run goes on."""
    with mounted(tmp_path / "backup"):
        legacy.put(tmp_path)
        code, lines = traced_migration(tmp_path, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1")
        assert code == 1 and "INJECTED" in lines[0]
        assert set(legacy.plain) == set(names_in(tmp_path / "backup/duplicity"))
        assert contents_of(tmp_path) >= set(legacy.plain.values())
        migrate(tmp_path)
        assert {path.name: path.read_bytes() for path in (tmp_path / MIGRATED).iterdir()} == legacy.plain
        assert not (tmp_path / "backup/duplicity").exists()


def test_no_room_for_the_old_backups(tmp_path: Path, legacy: Legacy) -> None:
    """Without room to copy the old backups to another file system the run fails, says so, and has moved nothing."""
    root = tmp_path / "root"
    with mounted(root, "256k"), mounted(root / "backup"):
        legacy.put(root)
        (root / "backup/duplicity/large").write_bytes(bytes(300_000))
        before = contents_of(root)
        with pytest.raises(utils.Failure, match="has no room") as caught:
            migrate(root)
        assert caught.value.exit_code == 1
        assert contents_of(root) == before and len(names_in(root / "backup/duplicity")) == 7
        assert not (root / MIGRATED).exists()


# What is found


def test_both_directories_are_there(tmp_path: Path, legacy: Legacy) -> None:
    """Files of one name and one content become one; of one name and different contents both are kept; directories are merged."""
    legacy.put(tmp_path)
    plain, migrated = tmp_path / "backup/duplicity", tmp_path / MIGRATED
    same, different = sorted(legacy.plain)[:2]
    migrated.mkdir(mode=0o700)
    (migrated / same).write_bytes(legacy.plain[same])
    (migrated / different).write_text("another of this name\n")
    (migrated / f"{different}.1").write_text("one more\n")
    for directory, name in ((plain, "b"), (migrated, "a")):
        (directory / "directory").mkdir()
        (directory / "directory" / name).write_text(name)
    migrate(tmp_path)
    assert {path.name: path.read_bytes() for path in migrated.iterdir() if path.is_file()} == {
        **legacy.plain, different: b"another of this name\n", f"{different}.1": b"one more\n", f"{different}.2": legacy.plain[different]}
    assert names_in(migrated / "directory") == ["a", "b"]
    assert not plain.exists()
    assert names_in(tmp_path / "backup/legacy") == [f"{different}.enc"]


def test_encrypted_is_missing(tmp_path: Path, legacy: Legacy) -> None:
    """Without encrypted/ the plain files are migrated all the same."""
    legacy.put(tmp_path)
    shutil.rmtree(tmp_path / "backup/encrypted")
    migrate(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / MIGRATED).iterdir()} == legacy.plain
    assert names_in(tmp_path / "backup") == ["secret_key.txt"]


def test_half_of_the_copies_are_gone(tmp_path: Path, legacy: Legacy) -> None:
    """Where a run has moved the plain files and deleted half of the openssl copies, the next deletes the other half."""
    legacy.put(tmp_path)
    migrate(tmp_path)
    for name in sorted(legacy.plain)[3:]:
        shutil.copy2(legacy.backups / "encrypted" / f"{name}.enc", tmp_path / "backup/encrypted")
    migrate(tmp_path)
    assert names_in(tmp_path / "backup/encrypted") == []
    assert {path.name: path.read_bytes() for path in (tmp_path / MIGRATED).iterdir()} == legacy.plain


def test_copy_without_original_is_kept_and_told_of_once(old: Store, legacy: Legacy) -> None:
    """An openssl copy that is somebody's only one goes to legacy/, where openssl still opens it; the admin is told, in one night only."""
    (old.backups / "duplicity" / legacy.manifest).unlink()
    result = old.backup()
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and str(old.backups / "legacy") in result.stderr
    kept = old.backups / "legacy" / f"{legacy.manifest}.enc"
    assert names_in(kept.parent) == [kept.name] and stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    opened = old.run(
        "openssl", "enc", "-d", "-aes-256-cbc", "-a", "-md", "md5", "-in", kept, "-pass", f"file:{old.backups}/secret_key.txt")
    assert os.fsencode(opened.stdout) == legacy.plain[legacy.manifest]
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert names_in(kept.parent) == [kept.name]


@pytest.mark.parametrize("bytes_more", [-16, 16, 1000])
def test_copy_of_another_size_is_kept(tmp_path: Path, legacy: Legacy, bytes_more: int) -> None:
    """An openssl copy whose original has not the size that it implies may be the better one: both are kept."""
    legacy.put(tmp_path)
    os.truncate(tmp_path / "backup/duplicity" / legacy.manifest, len(legacy.plain[legacy.manifest]) + bytes_more)
    migrate(tmp_path)
    assert names_in(tmp_path / "backup/legacy") == [f"{legacy.manifest}.enc"]
    assert (tmp_path / MIGRATED / legacy.manifest).exists()


def test_truncated_copy_is_kept(tmp_path: Path, legacy: Legacy) -> None:
    """An openssl copy that the 2015 script had not finished is no copy of its original, and nothing is deleted for it."""
    legacy.put(tmp_path)
    os.truncate(tmp_path / "backup/encrypted" / f"{legacy.manifest}.enc", 20)
    migrate(tmp_path)
    assert names_in(tmp_path / "backup/legacy") == [f"{legacy.manifest}.enc"]
    assert (tmp_path / MIGRATED / legacy.manifest).read_bytes() == legacy.plain[legacy.manifest]


def test_name_is_taken_in_legacy(tmp_path: Path, legacy: Legacy) -> None:
    """A second openssl copy of one name does not overwrite the first in legacy/, and legacy/ is closed if it was open."""
    put_with_strays(tmp_path, legacy)
    kept = tmp_path / "backup/legacy"
    kept.mkdir(mode=0o755)
    (kept / f"{ORPHAN}.enc").write_text("the first\n")
    (kept / f"{ORPHAN}.enc.1").symlink_to("nowhere")
    migrate(tmp_path)
    assert names_in(kept) == [f"{ORPHAN}.enc", f"{ORPHAN}.enc.1", f"{ORPHAN}.enc.2", f"{legacy.manifest}.enc"]
    assert (kept / f"{ORPHAN}.enc").read_text() == "the first\n"
    assert (kept / f"{ORPHAN}.enc.2").read_text() == "the only copy\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_files_that_are_no_openssl_copies_stay(tmp_path: Path, legacy: Legacy) -> None:
    """In encrypted/ only regular files whose names end in .enc are touched."""
    legacy.put(tmp_path)
    encrypted = tmp_path / "backup/encrypted"
    stray = ["duplicity-full.20260103T030000Z.manifest.gpg", "duplicity-full.20260103T030000Z.vol1.difftar.gpg", "enc",
             f"{legacy.manifest}.enc.1", "notes.txt", legacy.manifest]
    for name in stray:
        (encrypted / name).write_text(name)
    (encrypted / "directory.enc").mkdir()
    (encrypted / "link.enc").symlink_to(f"../duplicity/{legacy.manifest}")
    migrate(tmp_path)
    assert names_in(encrypted) == sorted([*stray, "directory.enc", "link.enc"])
    assert not (tmp_path / "backup/legacy").exists()


def test_nothing_to_migrate_changes_nothing(keyed: Store) -> None:
    """Without a legacy layout the migration leaves no trace."""
    before = state_of(keyed.root)
    migrate(keyed.root)
    assert state_of(keyed.root) == before


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 47, 48, 49, 1000, 100_000])
def test_size_that_a_copy_implies(tmp_path: Path, legacy: Legacy, size: int) -> None:
    """Real openssl writes what the formula says, and an original of one cipher block more or less does not fit."""
    original, copy = tmp_path / "original", tmp_path / "original.enc"
    original.write_bytes(os.urandom(size))
    encrypt(original, copy, legacy.backups / "secret_key.txt")
    for wrong in (size - 16, size + 16):
        if wrong >= 0:
            os.truncate(original, wrong)
            assert not backup.delete_copy(copy, original) and copy.exists()
    os.truncate(original, size)
    assert backup.delete_copy(copy, original) and not copy.exists() and original.exists()


@pytest.mark.parametrize(("wrong", "word"), [
    ("link in place of duplicity", "symbolic link"),
    ("migrated is a link", "symbolic link"),
    ("migrated is a dangling link", "symbolic link"),
    ("migrated is a file", "not a directory"),
    ("migrated belongs to another user", "not owned by root"),
    ("migrated is open to all", "written to by others"),
    ("legacy is a link", "symbolic link"),
])
def test_what_is_not_as_it_must_be_is_refused(old: Store, legacy: Legacy, wrong: str, word: str) -> None:
    """A directory that is not root's own is refused with exit code 2 before anything is touched, and mail is never stopped."""
    migrated, elsewhere = old.root / MIGRATED, old.scratch / "elsewhere"
    elsewhere.mkdir()
    if wrong == "link in place of duplicity":
        (old.backups / "duplicity").rename(elsewhere / "duplicity")
        (old.backups / "duplicity").symlink_to(elsewhere / "duplicity")
    elif wrong == "migrated is a link":
        migrated.symlink_to(elsewhere)
    elif wrong == "migrated is a dangling link":
        migrated.symlink_to("nowhere")
    elif wrong == "migrated is a file":
        migrated.write_text("")
    elif wrong == "migrated belongs to another user":
        migrated.mkdir()
        os.chown(migrated, pwd.getpwnam(USER).pw_uid, -1)
    elif wrong == "migrated is open to all":
        migrated.mkdir()
        migrated.chmod(0o777)
    else:
        (old.backups / "legacy").symlink_to(elsewhere)
    (old.backups / "lock").touch(mode=0o600)
    before = {name: entry for name, entry in state_of(old.scratch).items() if name != "user-data/backup/lock"}
    result = old.backup(exit_code=2)
    assert len(result.stderr.splitlines()) == 1 and word in result.stderr
    assert {name: entry for name, entry in state_of(old.scratch).items() if name != "user-data/backup/lock"} == before
    assert old.calls() == []


def test_dry_run_touches_nothing(old: Store) -> None:
    """A dry run names the layout of old and leaves it as it is."""
    before = state_of(old.root)
    assert str(old.backups / "duplicity") in old.backup("--dry-run").stdout
    assert state_of(old.root) == before


# What is harder to get right


def test_open_migrated_directory_is_closed(tmp_path: Path, legacy: Legacy) -> None:
    """A migrated_unencrypted_backup that an earlier script left open to all holds plain mail: it becomes root's alone."""
    legacy.put(tmp_path)
    (tmp_path / MIGRATED).mkdir(mode=0o755)
    (tmp_path / MIGRATED / "moved").write_text("by an earlier script\n")
    migrate(tmp_path)
    assert stat.S_IMODE((tmp_path / MIGRATED).stat().st_mode) == 0o700


def test_link_to_the_original_is_no_copy_of_it(tmp_path: Path, legacy: Legacy) -> None:
    """A symbolic link in migrated_unencrypted_backup that leads to the plain file itself is not taken for its equal."""
    legacy.put(tmp_path)
    (tmp_path / MIGRATED).mkdir(mode=0o700)
    (tmp_path / MIGRATED / legacy.manifest).symlink_to(f"../backup/duplicity/{legacy.manifest}")
    migrate(tmp_path)
    assert contents_of(tmp_path) >= set(legacy.plain.values())


def test_new_directory_is_synced_before_originals_are_deleted(tmp_path: Path, legacy: Legacy) -> None:
    """Between file systems the directory that files are copied into is itself on the disk before the first original goes."""
    with mounted(tmp_path / "backup"):
        legacy.put(tmp_path)
        done = trace_order(tmp_path)
    assert "sync ." in done[:next(index for index, action in enumerate(done) if action.startswith("delete "))]


def test_equal_file_is_synced_before_its_original_is_deleted(tmp_path: Path, legacy: Legacy) -> None:
    """An original whose equal is there, from a run killed before it synced the directory, goes only when that is on the disk."""
    with mounted(tmp_path / "backup"):
        legacy.put(tmp_path)
        (tmp_path / MIGRATED).mkdir(mode=0o700)
        first = min(legacy.plain)
        shutil.copy2(tmp_path / "backup/duplicity" / first, tmp_path / MIGRATED)
        done = trace_order(tmp_path)
    assert f"sync {MIGRATED}" in done[:done.index(f"delete backup/duplicity/{first}")]


def test_second_of_a_name_is_not_copied_twice(tmp_path: Path, legacy: Legacy) -> None:
    """Killed between the copy of a file under a free name and its deletion, the next run knows that copy again."""
    with mounted(tmp_path / "backup"):
        legacy.put(tmp_path)
        (tmp_path / MIGRATED).mkdir(mode=0o700)
        (tmp_path / MIGRATED / legacy.manifest).write_text("another of this name\n")
        shutil.copy2(tmp_path / "backup/duplicity" / legacy.manifest, tmp_path / MIGRATED / f"{legacy.manifest}.1")
        migrate(tmp_path)
    assert names_in(tmp_path / MIGRATED) == sorted([*legacy.plain, f"{legacy.manifest}.1"])


def test_link_that_was_half_moved_is_moved(tmp_path: Path, legacy: Legacy) -> None:
    """A symbolic link among the plain files, whose copy a killed run had just begun on another file system, does not stop the next run."""
    with mounted(tmp_path / "backup"):
        legacy.put(tmp_path)
        (tmp_path / "backup/duplicity/link").symlink_to("nowhere")
        (tmp_path / MIGRATED).mkdir(mode=0o700)
        (tmp_path / MIGRATED / ".link.copy").symlink_to("nowhere")
        migrate(tmp_path)
    assert names_in(tmp_path / MIGRATED) == sorted([*legacy.plain, "link"])


def test_hidden_file_is_no_half_copy(tmp_path: Path, legacy: Legacy) -> None:
    """A plain file that is named like a half copy, and was moved in an earlier run, is a file like all others."""
    legacy.put(tmp_path)
    (tmp_path / "backup/duplicity/.notes.copy").write_text("the only one\n")
    migrate(tmp_path)
    migrate(tmp_path)
    assert (tmp_path / MIGRATED / ".notes.copy").read_text() == "the only one\n"


def test_half_copy_does_not_take_the_room_of_its_whole(tmp_path: Path, legacy: Legacy) -> None:
    """What a killed run had copied of a file does not count as room taken when the next run copies it again."""
    root = tmp_path / "root"
    with mounted(root, "2m"), mounted(root / "backup"):
        legacy.put(root)
        (root / "backup/duplicity/large").write_bytes(bytes(1_000_000))
        (root / MIGRATED).mkdir(mode=0o700)
        (root / MIGRATED / ".large.copy").write_bytes(bytes(990_000))
        migrate(root)
        assert names_in(root / MIGRATED) == sorted([*legacy.plain, "large"])


@pytest.mark.parametrize("directory", ["duplicity", "encrypted"])
def test_directory_that_is_a_file_system_of_its_own(tmp_path: Path, legacy: Legacy, directory: str) -> None:
    """backup/duplicity or backup/encrypted may itself be where another disk is mounted."""
    (tmp_path / "backup").mkdir()
    with mounted(tmp_path / "backup" / directory):
        put_with_strays(tmp_path, legacy)
        migrate(tmp_path)
        assert names_in(tmp_path / "backup/encrypted") == [] and len(names_in(tmp_path / "backup/legacy")) == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / MIGRATED).iterdir()} == legacy.plain


def test_warning_is_not_lost_with_the_run(tmp_path: Path, legacy: Legacy, caplog: pytest.LogCaptureFixture) -> None:
    """Killed when it was about to tell of the openssl copies without an original, the run leaves it to the next to tell."""
    put_with_strays(tmp_path, legacy)
    code, _ = traced_migration(tmp_path, "-e", "trace=write", "-e", "inject=write:signal=SIGKILL:when=1")
    assert code == -9
    with caplog.at_level(logging.WARNING):
        migrate(tmp_path)
    assert len(caplog.records) == 1


def test_deleted_copies_make_room_for_the_backup(old: Store, legacy: Legacy) -> None:
    """Where there is room for a backup only once the openssl copies are gone, the night is a good one."""
    shutil.rmtree(old.backups)
    with mounted(old.backups, "700m"):  # of which 5 % are mail's, and 575 MB must be free
        legacy.put(old.root)
        (old.backups / "duplicity/large").write_bytes(bytes(60_000_000))
        encrypt(old.backups / "duplicity/large", old.encrypted / "large.enc", old.backups / "secret_key.txt")
        result = old.backup()
        assert (result.stdout, result.stderr) == ("", "")
        assert len(old.manifests()) == 1
