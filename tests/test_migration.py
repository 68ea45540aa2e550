"""The layout of old is migrated: at whatever instant a run ends, no old backup is lost."""

import contextlib
import errno
import io
import itertools
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest

import backup
import utils
from conftest import (
    PROJECT, PYTHON, FirstNight, Result, Store, long, tree_of, write_messages)

MIGRATED = "migrated_unencrypted_backup"
PART = f"{MIGRATED}.part"
ORPHAN = "duplicity-full.20250101T030000Z.vol1.difftar.gz.enc"
MIGRATE = """import sys
sys.path.insert(0, sys.argv[1])
import backup
backup.migrate_legacy_layout(backup.work_of({"STORAGE_ROOT": sys.argv[2]}))
"""

# The calls that change what an admin finds; one that opens a new file is followed by others.
CHANGES = (
    "chmod,fchmod,fchmodat,chown,fchown,lchown,fchownat,link,linkat,symlink,symlinkat,mkdir,"
    "mkdirat,rmdir,rename,renameat,renameat2,unlink,unlinkat,truncate,ftruncate,write,"
    "sendfile,copy_file_range,utimensat,setxattr,fsetxattr")


@dataclass(frozen=True)
class Legacy:
    """What the 2015 script left: its backup/ directory."""

    backups: Path

    @property
    def plain(self) -> dict[str, bytes]:
        """The content of the plain files by name."""
        return files_in(self.backups / "duplicity")

    @property
    def manifest(self) -> str:
        """The name of the manifest: the plain file that serves as an example."""
        return next(name for name in self.plain if name.endswith(".manifest"))

    def put(self, root: Path) -> None:
        """Put a copy of the layout into a STORAGE_ROOT."""
        subprocess.run(["cp", "-a", f"{self.backups}/.", str(root / "backup")], check=True)

    def not_to_be_lost(self, root: Path) -> frozenset[bytes]:
        """Return what is in a STORAGE_ROOT, less the openssl copies of the plain files."""
        return contents_of(root) - contents_of(self.backups / "encrypted")


def encrypt(plain: Path, copy: Path, key: Path) -> None:
    """Make an openssl copy as the 2015 script made it, with the digest of its time."""
    subprocess.run(
        ["openssl", "enc", "-aes-256-cbc", "-a", "-salt", "-md", "md5", "-pass", f"file:{key}",
         "-in", str(plain), "-out", str(copy)], check=True, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Legacy:
    """A real one: a plain full backup made by duplicity, and an openssl copy of each file."""
    root = tmp_path_factory.mktemp("legacy") / "user-data"
    backups = root / "backup"
    for directory in (backups / "duplicity", backups / "encrypted"):
        directory.mkdir(mode=0o755, parents=True)
    key = backups / "secret_key.txt"
    key.touch(mode=0o600)
    subprocess.run(["openssl", "rand", "-base64", "-out", str(key), "2048"], check=True)
    write_messages(root)
    subprocess.run(
        ["duplicity", "full", "--no-encryption", "--archive-dir", str(root.parent / "archive"),
         "--exclude", str(backups), str(root), (backups / "duplicity").as_uri()],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    for path in (backups / "duplicity").iterdir():
        encrypt(path, backups / "encrypted" / f"{path.name}.enc", key)
    assert len(names_in(backups / "encrypted")) == 3
    return Legacy(backups)


@pytest.fixture
def old(store: Store, legacy: Legacy) -> Store:
    """A mail store with the legacy layout."""
    legacy.put(store.root)
    return store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A STORAGE_ROOT with an empty backup/."""
    (tmp_path / "root/backup").mkdir(parents=True)
    return tmp_path / "root"


@contextlib.contextmanager
def mounted(path: Path, size: str = "1g", disk: Optional[Path] = None) -> Iterator[None]:
    """Mount a new file system in memory, or that of a file, at a directory for the block."""
    path.mkdir(exist_ok=True)
    memory = ["-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs"]
    kind = ["-o", "loop", str(disk)] if disk else memory
    subprocess.run(["mount", *kind, str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_disk(path: Path, megabytes: int, *options: str) -> None:
    """Make a file that is an empty file system, of which nothing but that is on the disk."""
    path.write_bytes(b"")
    os.truncate(path, megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", *options, str(path)], check=True)


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory, sorted; none if it is missing."""
    return sorted(os.listdir(directory)) if directory.exists() else []


def files_in(directory: Path) -> dict[str, bytes]:
    """Return the content of the files in a directory by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def contents_of(root: Path) -> frozenset[bytes]:
    """Return the contents of all regular files in a tree."""
    return frozenset(entry[5] for entry in tree_of(root, without="").values()
                     if isinstance(entry[5], bytes) and entry[0] == stat.S_IFREG)


def state_of(root: Path) -> tuple[object, ...]:
    """Return what an admin finds after a migration: names, and all files but their names."""
    places = (root, root / "backup", root / "backup/encrypted")
    entries = {(*entry[:4], entry[5]) for entry in tree_of(root, without="").values()}
    return [names_in(place) for place in places], entries


def migrate(root: Path, *before: object, code: Optional[int] = 0) -> Result:
    """Migrate a layout, after a command in a process of its own, and check its exit code."""
    place = root / "backup" if (root / "backup").exists() else root / PART
    command = [*map(str, before), PYTHON, "-B", "-c", MIGRATE, str(PROJECT), str(root)]
    if before:
        inherited = {name: value for name, value in os.environ.items()
                     if not name.startswith("COV_")}  # measuring changes files, too
        result = subprocess.run(command, cwd=place, env=inherited, capture_output=True, text=True)
    else:  # some hundred times: here
        result = migrate_here(root, place)
    assert code in (None, result.returncode), result.stderr
    return result


def migrate_here(root: Path, place: Path) -> Result:
    """Migrate a layout in this process, working in a directory."""
    told, exit_code = io.StringIO(), 0
    handler = logging.StreamHandler(told)
    backup.log.addHandler(handler)
    with utils.opened(".") as working:
        os.chdir(place)
        try:
            backup.migrate_legacy_layout(backup.work_of({"STORAGE_ROOT": str(root)}))
        except (utils.Failure, OSError) as error:
            exit_code = 1
            told.write(f"{error}\n")
        finally:
            os.fchdir(working)
            backup.log.removeHandler(handler)
    return Result([], exit_code, "", told.getvalue())


def changes_of(root: Path) -> tuple[Result, list[tuple[str, int]]]:
    """Migrate. Returns also the changes made: names and counts of system calls, for struck."""
    log = root.parent / "strace"
    result = migrate(root, "strace", "-qqq", "-o", log, "-e", f"trace={CHANGES}")
    lines = log.read_text(errors="replace").splitlines()
    names = [line.partition("(")[0] for line in lines]
    return result, [(name, names[:place + 1].count(name)) for place, name in enumerate(names)
                    if ") = -1 " not in lines[place]]


def struck(call: str, when: int, what: str) -> list[str]:
    """Return how a command begins in which a system call is struck: `signal=…` or `error=…`."""
    return ["strace", "-qqq", "-o", "/dev/null", "-e", f"inject={call}:{what}:when={when}"]


def assert_proved(store: Store, legacy: Legacy) -> None:
    """Check that a restore equals the tree and holds the old backups, which are gone."""
    assert not (store.backups / "duplicity").exists() and not (store.root / MIGRATED).exists()
    assert not list(store.encrypted.glob("*.enc"))
    restored = store.restore("proof")
    assert files_in(restored / MIGRATED) == legacy.plain
    shutil.rmtree(restored / MIGRATED)
    assert tree_of(restored) == tree_of(store.root)


# A night


def test_old_backups_come_back_out_of_the_new_one(old: Store, legacy: Legacy) -> None:
    """A silent night leaves what plain duplicity restores them from, to the byte."""
    result = old.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert_proved(old, legacy)
    assert old.running() == ["dovecot", "postfix"]


def test_old_backups_outlast_a_backup_that_fails(old: Store, legacy: Legacy) -> None:
    """The plain files wait, readable by root only, for a complete backup."""
    old.stand_in("duplicity", "#!/bin/sh\ncase $1 in full) exit 50;; esac\nexec REAL \"$@\"\n")
    old.backup(exit_code=1)
    assert stat.S_IMODE((old.root / MIGRATED).stat().st_mode) == 0o700
    assert files_in(old.root / MIGRATED) == legacy.plain


def test_old_backup_that_was_not_read_is_kept(old: Store, legacy: Legacy) -> None:
    """When duplicity could not read one of the plain files they stay until it can."""
    unread = f"snapshot/tree/{MIGRATED}/{legacy.manifest}"
    old.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) exec strace -qq -o /dev/null -P "{unread}" -P "{old.backups}/{unread}" \\
    -e trace=openat -e inject=openat:error=EIO REAL "$@";; esac
exec REAL "$@"
""")
    for _ in range(2):
        assert MIGRATED in old.backup(exit_code=3).stderr
        assert files_in(old.root / MIGRATED) == legacy.plain
    (old.bin / "duplicity").unlink()
    old.backup("--full")
    assert_proved(old, legacy)


def test_tree_that_cannot_be_listed(old: Store, legacy: Legacy) -> None:
    """An empty backup would count as a good one, and old backups go for it: none is made."""
    trace = ["strace", "-qq", "-o", "/dev/null", "-P", str(old.root),
             "-e", "trace=getdents64", "-e", "inject=getdents64:error=EIO"]
    told = old.run(*trace, *old.command(), exit_code=1).stderr
    assert f"{old.root}: Input/output error" in told
    assert files_in(old.root / MIGRATED) == legacy.plain
    old.backup()
    assert_proved(old, legacy)


def test_old_backups_hidden_from_the_copy_are_kept(old: Store, legacy: Legacy) -> None:
    """STORAGE_USER renames them while the copy is made, and then back: no backup has them."""
    migrated, hidden = old.root / MIGRATED, old.root / ".backup-snapshot"
    old.stand_in("duplicity", f"#!/bin/sh\n[ $1 != full ] || mv {hidden} {migrated}\n"
                              "exec REAL \"$@\"\n")
    (old.backups / "before-backup").write_text(f"#!/bin/sh\nmv {migrated} {hidden}\n")
    (old.backups / "before-backup").chmod(0o755)
    assert f"{migrated} is kept because it was changed" in old.backup(exit_code=3).stderr
    assert files_in(migrated) == legacy.plain


def test_other_directory_by_the_name_of_old_backups_is_kept(old: Store, legacy: Legacy) -> None:
    """STORAGE_USER gives it to one of root's: nothing of that is deleted, nor an old backup."""
    shutil.chown(old.root / "ssl", 0, 0)
    (old.root / "ssl").rename(old.root / MIGRATED)
    assert f"{MIGRATED} is kept because it holds no plain backups" in old.backup(exit_code=3).stderr
    assert contents_of(old.root / MIGRATED) == {b"secret", *legacy.plain.values()}


def test_encrypted_backups_by_the_name_of_old_ones_are_kept(
    keyed: Store, first_night: FirstNight
) -> None:
    """An admin has moved them aside, and STORAGE_USER has given them that name."""
    first_night(keyed)
    keyed.run("rm", "-r", keyed.backups / "cache")
    keyed.encrypted.rename(keyed.root / MIGRATED)
    before = files_in(keyed.root / MIGRATED)
    told = keyed.backup("--full", exit_code=3).stderr
    assert f"{MIGRATED} is kept because it holds no plain backups" in told
    assert files_in(keyed.root / MIGRATED) == before


@pytest.mark.parametrize("call", ["unlinkat:when=2", "rmdir:when=1"])
def test_deletion_that_was_killed_is_ended_by_the_next_night(old: Store, call: str) -> None:
    """What is left of the old backups is plain mail, and does not stay for ever."""
    migrated = old.root / MIGRATED
    (old.backups / "duplicity/notes").mkdir()
    (old.backups / "duplicity/notes/by hand").touch()
    name, when = call.split(":")
    old.run("strace", "-qqq", "-o", "/dev/null", "-P", migrated, "-e", f"trace={name}",
            "-e", f"inject={name}:signal=SIGKILL:{when}", *old.command(), exit_code=-9)
    assert migrated.exists()
    old.backup()
    assert not migrated.exists()


def test_new_backups_are_left_alone(
    keyed: Store, first_night: FirstNight, legacy: Legacy
) -> None:
    """Files of the new format beside openssl copies stay; an increment takes the old in."""
    first_night(keyed)
    before = files_in(keyed.encrypted)
    key = (keyed.backups / "secret_key.txt").read_bytes()
    legacy.put(keyed.root)
    (keyed.backups / "secret_key.txt").write_bytes(key)
    keyed.backup()
    assert before.items() <= files_in(keyed.encrypted).items()
    assert len(keyed.manifests()) == 2 and "-inc." in keyed.manifests()[1]
    assert_proved(keyed, legacy)


def test_deleted_copies_make_room_for_the_backup(old: Store, legacy: Legacy) -> None:
    """Where there is room for a backup only once the openssl copies are gone, it is begun."""
    shutil.rmtree(old.backups)
    with mounted(old.backups, "700m"):
        legacy.put(old.root)  # 5 % are mail's, 575 MB must be free, and the large copy has 135
        large = old.backups / "duplicity/large"
        large.write_bytes(bytes(100_000_000))
        encrypt(large, old.encrypted / "large.enc", old.backups / "secret_key.txt")
        old.stand_in("duplicity", "#!/bin/sh\n[ $1 = full ] || exec REAL \"$@\"\nexit 99\n")
        assert "duplicity full failed" in old.backup(exit_code=1).stderr


@pytest.mark.parametrize("link", [False, True])
def test_directory_of_storage_user_gets_no_mail(old: Store, link: bool) -> None:
    """What stands where old backups go and is not root's is refused, and nothing is moved."""
    theirs = old.root / "mail/mailboxes"
    if link:
        (old.root / MIGRATED).symlink_to(theirs)
    else:
        theirs.rename(old.root / MIGRATED)
    before = contents_of(old.root / "backup")
    assert MIGRATED in old.backup(exit_code=2).stderr
    assert before <= contents_of(old.root / "backup")


def test_mail_in_a_directory_that_is_open_is_closed(root: Path, legacy: Legacy) -> None:
    """One that an earlier script left readable by all becomes root's alone; it was empty."""
    legacy.put(root)
    (root / MIGRATED).mkdir(mode=0o755)
    migrate(root)
    assert stat.S_IMODE((root / MIGRATED).stat().st_mode) == 0o700
    assert legacy.manifest in os.listdir(root / MIGRATED)


def test_dry_run_touches_nothing(old: Store) -> None:
    """A dry run names the layout of old and leaves it as it is."""
    before = tree_of(old.root, without="")
    assert str(old.backups / "duplicity") in old.backup("--dry-run").stdout
    assert tree_of(old.root, without="") == before


# Killed, without power, without room


def put_with_strays(root: Path, legacy: Legacy) -> None:
    """Put a layout with a copy of another size than its original has, and one without."""
    legacy.put(root)
    for name in (ORPHAN, f"{legacy.manifest}.enc"):
        with (root / "backup/encrypted" / name).open("a") as stream:
            stream.write(f"the only one of {name}\n")


def migrated_before(root: Path, legacy: Legacy) -> None:
    """Beside them put what an earlier run left: an equal file, and one that differs."""
    put_with_strays(root, legacy)
    (root / MIGRATED).mkdir()
    equal, other, _ = names_in(root / "backup/duplicity")
    shutil.copy2(root / "backup/duplicity" / equal, root / MIGRATED)
    (root / MIGRATED / other).write_text("another of this name\n")


def copied_before(root: Path, legacy: Legacy) -> None:
    """Put what a run leaves that was killed when it had copied all and deleted one original."""
    put_with_strays(root, legacy)
    shutil.copytree(root / "backup/duplicity", root / MIGRATED)
    next((root / "backup/duplicity").iterdir()).unlink()


def begun_before(root: Path, legacy: Legacy) -> None:
    """Put what a run leaves that was killed while it copied."""
    put_with_strays(root, legacy)
    (root / PART / "tree").mkdir(parents=True)
    (root / PART / "tree" / legacy.manifest).write_text("half")


@pytest.mark.parametrize(("put", "disks"), [
    (put_with_strays, 1), (copied_before, 2), long(begun_before, 2), long(migrated_before, 1),
    long(migrated_before, 2)])
def test_killed_at_any_instant(
    root: Path, legacy: Legacy, put: Callable[[Path, Legacy], None], disks: int
) -> None:
    """Killed before any change nothing is lost, and the next run ends as this one should."""
    def make_layout() -> frozenset[bytes]:
        for path in (*root.glob(f"{MIGRATED}*"), *root.glob("backup/*")):
            utils.remove(path)
        put(root, legacy)
        return legacy.not_to_be_lost(root) - {b"half"}

    with mounted(root / "backup") if disks == 2 else contextlib.nullcontext():
        saved = make_layout()
        undisturbed, changes = changes_of(root)
        state = state_of(root)
        assert saved <= contents_of(root) and names_in(root / "backup/encrypted") == []
        assert len(changes) > 8
        for call in changes:
            make_layout()
            killed = migrate(root, *struck(*call, "signal=SIGKILL"), code=-9)
            assert saved <= contents_of(root), call
            told = killed.stderr + migrate(root).stderr
            assert state_of(root) == state, call
            assert undisturbed.stderr in told, call


@pytest.mark.parametrize("killed_before", [False, True])
def test_power_fails_at_any_deletion(root: Path, legacy: Legacy, killed_before: bool) -> None:
    """Where the mail's disk wrote nothing unasked, and that of backup/ all, nothing is lost.

    killed_before: a run was killed just when the copy had got its name.
    """
    mail, backups = disks = root.parent / "mail.disk", root.parent / "backup.disk"

    @contextlib.contextmanager
    def power() -> Iterator[None]:
        with mounted(root, disk=mail), mounted(root / "backup", disk=backups):
            yield

    def images(*synced: Path) -> list[bytes]:
        subprocess.run(["sync", "--file-system", *(synced or (root, root / "backup"))], check=True)
        return [disk.read_bytes() for disk in disks]

    def put_back(contents: list[bytes]) -> None:
        for disk, content in zip(disks, contents):
            disk.unlink()  # the kernel may still know what was on the old one
            disk.write_bytes(content)

    for disk in disks:
        make_disk(disk, 8)
    with power():
        put_with_strays(root, legacy)
        saved = legacy.not_to_be_lost(root)
        before = images()
    for when in itertools.count(1):
        put_back(before)
        with power():
            if killed_before:
                migrate(root, "strace", "-qqq", "-o", "/dev/null", "-P", root,
                        "-e", "inject=fsync:signal=SIGKILL", code=-9)
            ended = migrate(root, *struck("unlink", when, "signal=SIGKILL"), code=None)
            left = images(root / "backup")
        put_back(left)
        with power():
            assert saved <= contents_of(root), when
            migrate(root)
            assert saved <= contents_of(root), when
        if ended.returncode == 0:
            break
    assert when > 5


def test_disk_that_cannot_write_what_it_took(root: Path, legacy: Legacy) -> None:
    """The copy seems whole; only who asks the disk to write it is told that it is not."""
    disk = root.parent / "small/disk"
    with mounted(disk.parent, "12m"):
        make_disk(disk, 64, "-O", "^has_journal")
        with mounted(root, disk=disk), mounted(root / "backup"):
            legacy.put(root)
            (root / "backup/duplicity/large").write_bytes(os.urandom(20_000_000))
            migrate(root, code=1)
            assert names_in(root / "backup/duplicity") == sorted([*legacy.plain, "large"])


@pytest.mark.parametrize(("call", "error"), [
    ("fsync", "EIO"), ("sendfile", "ENOSPC"), ("unlink", "EIO")])
def test_disk_that_fails(root: Path, legacy: Legacy, call: str, error: str) -> None:
    """A copy, sync or deletion that is refused ends the run; none is lost, the next goes on."""
    with mounted(root / "backup"):
        put_with_strays(root, legacy)
        saved = legacy.not_to_be_lost(root)
        migrate(root, *struck(call, 1, f"error={error}"), code=1)
        assert len(names_in(root / "backup/duplicity")) == 3 and saved <= contents_of(root)
        migrate(root)
        assert saved <= contents_of(root) and names_in(root / "backup/duplicity") == []


def test_no_room_for_the_old_backups(old: Store, legacy: Legacy) -> None:
    """It is said (exit 1), and everything is where it was."""
    with mounted(old.root, "256k"), mounted(old.backups):
        legacy.put(old.root)
        (old.backups / "duplicity/large").write_bytes(bytes(300_000))
        before = contents_of(old.root)
        assert "has no room for the old backups" in old.backup(exit_code=1).stderr
        assert before <= contents_of(old.root) and names_in(old.root) == ["backup"]


def test_room_that_half_a_copy_takes_is_free(root: Path, legacy: Legacy) -> None:
    """What a killed run had copied does not make the next one, and each after it, fail."""
    with mounted(root, "2m"), mounted(root / "backup"):
        legacy.put(root)
        (root / "backup/duplicity/large").write_bytes(bytes(1_000_000))
        (root / PART / "tree").mkdir(parents=True)
        (root / PART / "tree/large").write_bytes(bytes(990_000))
        migrate(root)
        assert names_in(root / MIGRATED) == sorted([*legacy.plain, "large"])


# STORAGE_USER renames what is in STORAGE_ROOT


@pytest.mark.parametrize("name", [MIGRATED, "backup"])
def test_directory_by_the_name_of_a_copy_is_kept(root: Path, legacy: Legacy, name: str) -> None:
    """Neither the old backups, where a run was killed among their deletion, nor all backups."""
    with mounted(root / "backup/duplicity"):
        copied_before(root, legacy)
        for letter in "abcdefghijklmnop":  # in whatever order they would be deleted
            (root / "backup" / letter).write_text(letter)
        saved = contents_of(root)
        (root / name).rename(root / PART)
        result = migrate(root, code=None)
        (root / PART).rename(root / name)
        assert contents_of(root) == saved and result.returncode == 1 and PART in result.stderr


def test_copy_that_is_taken_away_is_not_believed(
    root: Path, legacy: Legacy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another directory gets the name of the copy just before that is given its last one."""
    def rename(source: Path, target: Path, **options: int) -> None:
        if (root / PART).exists():
            real_rename(root / PART, root / "taken")
            (root / PART / "tree").mkdir(parents=True)
        real_rename(source, target, **options)

    real_rename = os.rename
    monkeypatch.setattr(os, "rename", rename)
    with mounted(root / "backup"):
        legacy.put(root)
        migrate(root)
        assert files_in(root / MIGRATED) == legacy.plain


# What is found


def test_both_directories_are_there(root: Path, legacy: Legacy) -> None:
    """Two files of one name are both kept, however often that happens."""
    for text in ("first\n", "second\n", "third\n"):
        legacy.put(root)
        (root / "backup/duplicity" / legacy.manifest).write_text(text)
        migrate(root)
    assert contents_of(root / MIGRATED) >= {b"first\n", b"second\n", b"third\n"}
    assert names_in(root / "backup/encrypted") == []


def test_link_to_the_original_is_no_copy_of_it(root: Path, legacy: Legacy) -> None:
    """It looks equal, and would be all that is left."""
    legacy.put(root)
    (root / MIGRATED).mkdir()
    for name in legacy.plain:
        (root / MIGRATED / name).symlink_to(f"../backup/duplicity/{name}")
    migrate(root)
    assert contents_of(root) >= set(legacy.plain.values())


@pytest.mark.parametrize("directory", ["duplicity", "encrypted"])
def test_directory_that_is_another_disk(root: Path, legacy: Legacy, directory: str) -> None:
    """backup/duplicity or backup/encrypted is where another disk is mounted."""
    with mounted(root / "backup" / directory):
        put_with_strays(root, legacy)
        saved = legacy.not_to_be_lost(root)
        migrate(root)
        assert contents_of(root) == saved
        assert names_in(root / "backup/legacy") == sorted([ORPHAN, f"{legacy.manifest}.enc"])


def test_encrypted_is_missing(root: Path, legacy: Legacy) -> None:
    """The plain files are migrated all the same."""
    legacy.put(root)
    shutil.rmtree(root / "backup/encrypted")
    migrate(root)
    assert files_in(root / MIGRATED) == legacy.plain


def test_copy_without_original_is_kept_and_told_of_once(root: Path, legacy: Legacy) -> None:
    """It goes to legacy/, where openssl still opens it; the admin is told in one night only."""
    legacy.put(root)
    (root / "backup/duplicity" / legacy.manifest).unlink()
    kept = root / "backup/legacy" / f"{legacy.manifest}.enc"
    assert str(kept.parent) in migrate(root).stderr
    opened = subprocess.run(
        ["openssl", "enc", "-d", "-aes-256-cbc", "-a", "-md", "md5", "-in", kept,
         "-pass", f"file:{root}/backup/secret_key.txt"], stdout=subprocess.PIPE, check=True)
    assert opened.stdout == legacy.plain[legacy.manifest]
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert migrate(root).stderr == "" and names_in(kept.parent) == [kept.name]


@pytest.mark.parametrize("size", [0, 15, 16, 49, 100_000])
def test_copy_of_another_size_is_kept(root: Path, legacy: Legacy, size: int) -> None:
    """One of a cipher block more or less than its original has, or one that was cut short."""
    plain, encrypted = root / "backup/duplicity", root / "backup/encrypted"
    for path in (plain, encrypted):
        path.mkdir()
    for name, more in {"cut": 0, "equal": 0, "longer": 16, "shorter": -16}.items():
        (plain / name).write_bytes(os.urandom(size))
        encrypt(plain / name, encrypted / f"{name}.enc", legacy.backups / "secret_key.txt")
        os.truncate(plain / name, max(0, size + more))
    os.truncate(encrypted / "cut.enc", 20)
    migrate(root)
    assert names_in(encrypted) == []
    kept = ["cut.enc", "longer.enc", "shorter.enc"]
    assert names_in(root / "backup/legacy") == kept[:2 if size < 16 else 3]


def test_copy_of_what_cannot_be_read_is_kept(
    root: Path, legacy: Legacy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the disk has a bad sector: the copy may be the only good one."""
    plain, encrypted = root / "backup/duplicity", root / "backup/encrypted"
    for name in ("bad", "good"):
        for path in (plain, encrypted):
            path.mkdir(exist_ok=True)
        (plain / name).write_bytes(os.urandom(50_000))
        encrypt(plain / name, encrypted / f"{name}.enc", legacy.backups / "secret_key.txt")

    def read(path: Path) -> str:
        if path.name == "bad":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return ""

    monkeypatch.setattr(utils, "sha1_of", read)
    migrate(root)
    assert names_in(encrypted) == [] and names_in(root / "backup/legacy") == ["bad.enc"]


def test_name_is_taken_in_legacy(root: Path, legacy: Legacy) -> None:
    """A second copy of one name does not overwrite the first."""
    put_with_strays(root, legacy)
    kept = root / "backup/legacy"
    kept.mkdir()
    (kept / ORPHAN).write_text("the first\n")
    (kept / f"{ORPHAN}.2").symlink_to("nowhere")
    saved = legacy.not_to_be_lost(root)
    migrate(root)
    assert saved <= contents_of(root) and (kept / ORPHAN).read_text() == "the first\n"


def test_files_that_are_no_openssl_copies_stay(root: Path, legacy: Legacy) -> None:
    """In encrypted/ only regular files whose names end in .enc are touched."""
    legacy.put(root)
    encrypted = root / "backup/encrypted"
    strays = ["duplicity-full.20260103T030000Z.manifest.gpg", "enc", f"{legacy.manifest}.enc.1",
              legacy.manifest]
    for name in strays:
        (encrypted / name).write_text(name)
    (encrypted / "directory.enc").mkdir()
    (encrypted / "link.enc").symlink_to(f"../duplicity/{legacy.manifest}")
    migrate(root)
    assert names_in(encrypted) == sorted([*strays, "directory.enc", "link.enc"])
