"""The two-pass copy: mail is down for a restart, and a restore equals the tree of that moment.

Without a copy the night goes on.
"""

import contextlib
import errno
import io
import os
import pwd
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import utils
from conftest import PYTHON, USER, FirstNight, Store, pass_the_second_of, tree_of
from test_hooks import put_hook
from test_services import STARTS, STOPS, wait_for

SLOW_FULL = """#!/bin/sh
if [ "$1" = full ]; then
    ps -o ni= -p $$ > PLACE/priority
    while [ ! -e PLACE/go ]; do sleep 0.05; done
fi
exec REAL "$@"
"""


@contextlib.contextmanager
def disk_at(store: Store, place: Path, size: str = "900M", *options: str) -> Iterator[None]:
    """Mount an ext4 file system while the block runs."""
    image = store.scratch / f"{place.name}.disk"
    place.mkdir(exist_ok=True)
    store.run("truncate", "-s", size, image)
    store.run("mkfs.ext4", "-q", "-m", "0", *options, image)
    store.run("mount", "-o", "loop", image, place)
    (place / "lost+found").rmdir()
    try:
        yield
    finally:
        store.run("umount", place)
        image.unlink()  # another namespace may have it mounted still: the next is to be another


def assert_no_copy_left(store: Store) -> None:
    """Check that the copy is gone from both its places."""
    assert not os.path.lexists(store.backups / "snapshot")
    assert not os.path.lexists(store.root / ".backup-snapshot")


def start_and_wait_for_duplicity(store: Store) -> "subprocess.Popen[str]":
    """Start a night whose duplicity waits for the file `go`, and return when mail is back."""
    store.stand_in("duplicity", SLOW_FULL.replace("PLACE", str(store.scratch)))
    process = subprocess.Popen(
        store.command(), env=store.environment, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True)
    wait_for((store.scratch / "priority").exists)
    wait_for(lambda: (store.scratch / "priority").read_text().endswith("\n"))
    return process


def test_mail_runs_while_duplicity_reads(keyed: Store) -> None:
    """With services back, duplicity reads at low priority, and nothing of the user's is touched.

    What changes then is not in this backup, but in the next.
    """
    message = keyed.root / "mail/mailboxes/example.com/alice/cur/170001.M1P1.host,S=20:2,S"
    late = keyed.root / "mail/mailboxes/example.com/alice/new/170020.M1P1.host"
    before = tree_of(keyed.root)
    inodes = {path: path.lstat().st_ino
              for path in keyed.root.rglob("*") if "backup" not in path.parts}
    process = start_and_wait_for_duplicity(keyed)
    assert keyed.running() == ["dovecot", "postfix"]
    assert keyed.calls("stop", "start") == STOPS + STARTS
    assert (keyed.scratch / "priority").read_text().strip() == "19"
    snapshot = keyed.backups / "snapshot"
    assert (snapshot.stat().st_mode & 0o7777, snapshot.stat().st_uid) == (0o700, 0)
    tree, root = (snapshot / "tree").stat(), keyed.root.stat()
    assert (tree.st_mode, tree.st_uid, tree.st_gid) == (root.st_mode, root.st_uid, root.st_gid)
    assert (snapshot / "tree" / message.relative_to(keyed.root)).samefile(message)
    late.write_text("late")
    message.unlink()
    (keyed.root / "ssl/private.pem").write_text("changed")
    (keyed.scratch / "go").touch()
    assert process.communicate()[1] == "" and process.returncode == 0
    assert keyed.last_run()["source"] == "copy" and keyed.last_run()["message"] == ""
    assert tree_of(keyed.restore("then")) == before
    assert all((path.lstat().st_ino, path.lstat().st_nlink) == (inode, 1)
               for path, inode in inodes.items() if path.is_file() and path != message)
    assert_no_copy_left(keyed)
    keyed.backup()
    assert len(keyed.manifests()) == 2
    keyed.assert_restores("now")


def test_killed_while_mail_runs(keyed: Store) -> None:
    """Killed with the copy in place, duplicity dies too; the next run is a good one."""
    process = start_and_wait_for_duplicity(keyed)
    process.kill()
    process.communicate()
    assert (keyed.backups / "snapshot/tree").exists()
    (keyed.scratch / "go").touch()
    pgrep = ["pgrep", "-f", str(keyed.backups)]
    wait_for(lambda: subprocess.run(pgrep, stdout=subprocess.DEVNULL).returncode == 1)
    keyed.backup()
    assert_no_copy_left(keyed)
    keyed.assert_restores()


def test_backup_on_a_second_disk(keyed: Store) -> None:
    """backup/ on a disk of its own: the copy is beside the mail, and never in a backup."""
    keyed.run("rm", "-r", keyed.backups)
    with disk_at(keyed, keyed.backups):
        keyed.backups.chmod(0o750)
        keyed.put_key()
        process = start_and_wait_for_duplicity(keyed)
        place = keyed.root / ".backup-snapshot"
        assert (place / "tree/mail").is_dir()
        assert (place.stat().st_mode & 0o7777, place.stat().st_uid) == (0o700, 0)
        (keyed.scratch / "go").touch()
        assert process.communicate()[1] == "" and process.returncode == 0
        assert keyed.last_run()["source"] == "copy"
        assert_no_copy_left(keyed)
        keyed.assert_restores()
        place.mkdir(mode=0o700)  # a dead run's
        (place / "tree").mkdir()
        (place / "tree/left").touch()
        keyed.backup()
        assert_no_copy_left(keyed)
        (keyed.root / "mounted").mkdir()
        with disk_at(keyed, keyed.root / "mounted", "4M"):
            keyed.backup()
            assert keyed.last_run()["source"] == "direct"
        (keyed.root / "mounted").rmdir()


def test_disk_of_mail_fills_while_backup_is_on_another(keyed: Store) -> None:
    """The copy holds room there: the run is ended, and the copy goes. A full one is none of its."""
    filler = keyed.root / "box/cur/message"
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) [ -e {filler} ] || {{ head -c 97M /dev/zero > {filler}; sleep 60; }};; esac
exec REAL "$@"
""")
    mounted: list[Path] = []
    try:
        for place, size in ((keyed.root, "100M"), (keyed.backups, "2G")):
            place.mkdir(exist_ok=True)
            keyed.run("mount", "-t", "tmpfs", "-o", f"size={size},mode=750", "none", place)
            mounted.insert(0, place)
        for name in ("cur", "new", "tmp"):
            (keyed.root / "box" / name).mkdir(parents=True)
        keyed.put_key()
        assert f"took the last room of {keyed.root}; make" in keyed.backup(exit_code=1).stderr
        assert_no_copy_left(keyed)
        assert keyed.manifests() == [] and keyed.running() == ["dovecot", "postfix"]
        keyed.backup()
        assert keyed.last_run()["source"] == "copy"
    finally:
        for place in mounted:
            keyed.run("umount", place)


@pytest.mark.parametrize("moment", ["status", "stop"])
def test_copy_by_another_name(keyed: Store, moment: str) -> None:
    """STORAGE_USER renames the copy beside the mail: it is not copied itself, and does not stay."""
    keyed.run("rm", "-r", keyed.backups)
    with disk_at(keyed, keyed.backups):
        keyed.backups.chmod(0o750)
        keyed.put_key()
        place, other = keyed.root / ".backup-snapshot", keyed.root / "other"
        service = keyed.bin / "service"
        service.write_text(service.read_text().replace(
            "\n", f"\n[ $2 != {moment} ] || [ -e {other} ] || mv {place} {other}\n", 1))
        keyed.backup()
        assert keyed.last_run()["source"] == "copy"
        other.rmdir()
        keyed.assert_restores()


def test_another_file_system_in_the_tree(keyed: Store) -> None:
    """A mount in the tree: duplicity reads the tree itself while mail is stopped, and it is said.

    The next set is from a copy again, and tells that what was there counts as deleted: nothing
    old goes, in whatever run, until it is mounted again or --full is asked for.
    """
    reason = "not on the same file system"
    mounted = keyed.root / "mail/archive"
    with disk_at(keyed, mounted, "4M"):
        (mounted / "file").write_text("on another disk")
        assert keyed.backup().stderr == ""
        told = keyed.last_run()
        assert told["source"] == "direct"
        assert str(mounted) in told["message"] and reason in told["message"]
        status = keyed.backup("--status").stdout
        assert "read directly" in status and reason in status
        assert_no_copy_left(keyed)
        keyed.assert_restores("direct")
    (keyed.root / "new").write_text("new")
    keyed.stand_in("duplicity", """#!/bin/sh
case $1 in remove-older-than|cleanup) exit 99;; esac
exec REAL "$@"
""")
    missing = f"no old backups were deleted, for {mounted} is not mounted and was when they"
    for _ in range(2):
        assert missing in keyed.backup(exit_code=3).stderr
    assert keyed.last_run()["source"] == "copy"
    assert len(keyed.manifests()) == 3 and "inc" in keyed.manifests()[1]
    keyed.assert_restores("copy")
    (keyed.bin / "duplicity").unlink()
    with disk_at(keyed, mounted, "4M"):
        (keyed.root / "newer").write_text("newer")
        keyed.backup()
        assert keyed.last_run()["source"] == "direct" and len(keyed.manifests()) == 4
        keyed.assert_restores("direct-again")
    keyed.stand_in("duplicity", '#!/bin/sh\ncase $1 in full) exit 1;; esac\nexec REAL "$@"\n')
    keyed.backup("--full", exit_code=1)
    (keyed.bin / "duplicity").unlink()
    assert missing in keyed.backup(exit_code=3).stderr
    assert f"{mounted} is not mounted and was" in keyed.backup("--full", exit_code=3).stderr
    assert keyed.backup().stderr == ""


def test_mount_of_a_night_that_failed(keyed: Store, first_night: FirstNight) -> None:
    """No backup has what is on it, and none misses it."""
    first_night(keyed)
    keyed.stand_in("duplicity", """#!/bin/sh
case $1 in full|incremental) exit 50;; esac
exec REAL "$@"
""")
    with disk_at(keyed, keyed.root / "usb", "4M"):
        keyed.backup(exit_code=1)
    (keyed.bin / "duplicity").unlink()
    assert keyed.backup().stderr == ""


def test_mount_that_is_no_disk_of_its_own(keyed: Store) -> None:
    """As a unit under systemd has one of what it may write to: a run by hand does not miss it."""
    keyed.run("unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && exec "$@"', keyed.root,
              *keyed.command())
    assert keyed.backup().stderr == ""


def test_mount_that_goes_before_the_copy(keyed: Store) -> None:
    """It is missed as one is that was gone when the night began."""
    mounted = keyed.root / "mail/archive"
    mounted.mkdir()
    keyed.run("mount", "-t", "tmpfs", "none", mounted)
    keyed.backup()
    keyed.stand_in("gzip", f'#!/bin/sh\numount {mounted}\nexec REAL "$@"\n')
    assert f"for {mounted} is not mounted" in keyed.backup(exit_code=3).stderr
    moved = keyed.root.rename(keyed.root.with_name("moved"))
    keyed.settings.write_text(keyed.settings.read_text().replace(str(keyed.root), str(moved)))
    assert f"for {moved}/mail/archive is not mounted" in keyed.backup(exit_code=3).stderr


@contextlib.contextmanager
def mounted_with_a_server(store: Store, place: Path) -> Iterator[io.FileIO]:
    """Mount a file system whose server is this process. Yields the file it would serve through.

    Until it answers, which it never does, or is closed, whoever looks at the place waits.
    """
    with open("/dev/fuse", "r+b", buffering=0) as server:
        options = f"fd={server.fileno()},rootmode=40000,user_id=0,group_id=0"
        subprocess.run(["mount", "-i", "-t", "fuse", "-o", options, "archive", place],
                       check=True, pass_fds=[server.fileno()])
        try:
            yield server
        finally:
            store.run("umount", "--lazy", place)


def test_backup_directory_that_does_not_answer(keyed: Store, first_night: FirstNight) -> None:
    """It holds no night silently: that is said, and mail is not stopped."""
    first_night(keyed)
    program = keyed.changed_program("STALLED_SECONDS = 600", "STALLED_SECONDS = 1")
    with mounted_with_a_server(keyed, keyed.backups):
        result = keyed.run("timeout", "--signal=KILL", "60", PYTHON, program,
                           *keyed.command()[2:], exit_code=1)
    assert result.stderr == (
        f"backup: {keyed.backups} has not answered for 1 seconds; see to its disk\n")
    assert keyed.calls() == []


@pytest.mark.parametrize("below, exit_code", [
    ("mail/archive", 1), ("mail/old\u3000mail\r", 1), ("backup/elsewhere", 0)])
def test_mount_whose_server_is_gone(
    keyed: Store, first_night: FirstNight, below: str, exit_code: int
) -> None:
    """What was there is not taken for deleted, nor mail stopped; in backup/ it is no matter."""
    first_night(keyed)
    place = keyed.root / below
    place.mkdir()
    with mounted_with_a_server(keyed, place) as server:
        server.close()
        errors = keyed.backup(exit_code=exit_code).stderr
    told = f"{utils.printable(str(place))}: Transport endpoint is not connected"
    assert (told in errors) == (exit_code == 1)
    assert (keyed.calls("stop") == []) == (exit_code == 1)


@pytest.mark.parametrize("moment", ["dovecot stop", "duplicity"])
def test_mount_in_the_tree_that_goes_meanwhile(keyed: Store, moment: str) -> None:
    """A set that lacks what was there is thrown away; it may be back when mail is."""
    place = keyed.root / "mail/archive"
    service, away = keyed.bin / "service", f"umount --lazy {place}"
    if moment == "duplicity":
        keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) {away};; esac
exec REAL "$@"
""")
    else:
        service.write_text(service.read_text().replace("case $2 in", f"""\
case "$1 $2" in "dovecot stop") {away};; "dovecot start") mount -t tmpfs none {place};; esac
case $2 in"""))
    place.mkdir()
    (place / "empty").touch()  # as many entries as on the disk
    keyed.run("mount", "-t", "tmpfs", "none", place)
    (place / "file").write_text("on another disk")
    assert f"{place} was unmounted" in keyed.backup(exit_code=1).stderr
    assert keyed.manifests() == [] and keyed.running() == ["dovecot", "postfix"]
    if moment != "duplicity":
        keyed.run("umount", place)


@pytest.mark.parametrize("name", ["new", "no-break\xa0space", "line\nbreak", "end ", "\udcfc"])
def test_directory_that_cannot_be_listed_in_a_direct_read(keyed: Store, name: str) -> None:
    """It counts as damaged, although duplicity does not say why, and is told each night."""
    bad = keyed.root / "mail/mailboxes/example.com/alice" / name
    bad.mkdir(exist_ok=True)
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) exec strace -qq -o /dev/null -P {shlex.quote(str(bad))} -e trace=getdents64 \\
    -e inject=getdents64:error=EIO REAL "$@";; esac
exec REAL "$@"
""")
    with disk_at(keyed, keyed.root / "mail/archive", "4M"):
        for _ in range(2):
            told = keyed.backup(exit_code=3).stderr
            assert re.search(f"run --full: '?Error listing directory {bad.parent}", told)


@pytest.mark.parametrize("kind", ["there", "gone", "too long"])
def test_what_duplicity_finds_gone_is_no_damage(keyed: Store, kind: str) -> None:
    """Of a directory that was removed just then it says what it says of one that is damaged."""
    place = keyed.root / ("directory/" * 420 if kind == "too long" else "sessions")
    if kind == "there":
        place.mkdir()
    keyed.stand_in("duplicity", f"""#!/bin/bash
case $1 in full) printf 'WARNING 1 x\n. Error listing directory {place}\n' >&${{2#--log-fd=}};; esac
exec REAL "$@"
""")
    assert f"Error listing directory {place}" in keyed.backup(exit_code=3).stderr
    (keyed.bin / "duplicity").unlink()
    keyed.backup(exit_code=3 if kind == "there" else 0)


@pytest.mark.parametrize("error", ["ENOTCONN", "ENODEV"])
def test_directory_of_a_server_that_is_gone_in_a_direct_read(keyed: Store, error: str) -> None:
    """To duplicity it is a directory that is gone, and so all mail in it: there is no backup."""
    bad = keyed.root / "mail/mailboxes/example.com/alice/new"
    gone = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(bad), "-e", "trace=openat",
            "-e", f"inject=openat:error={error}"]
    with disk_at(keyed, keyed.root / "mail/archive", "4M"):
        errors = keyed.run(*gone, *keyed.command(), exit_code=1).stderr
    assert f"{bad}: {os.strerror(getattr(errno, error))}; see to its server" in errors
    assert keyed.calls("stop") == [] and keyed.manifests() == []


def test_automount_whose_disk_is_gone(keyed: Store) -> None:
    """Of autofs it is there, and is not: what was on the disk is not taken for deleted."""
    place = keyed.root / "mail/archive"
    gone = ["strace", "-qq", "-o", "/dev/null", "-P", str(place), "-e", "trace=openat",
            "-e", "inject=openat:error=ENOENT"]
    with disk_at(keyed, place, "4M"):
        errors = keyed.run(*gone, *keyed.command(), exit_code=1).stderr
    assert f"{place}: No such file or directory" in errors and keyed.calls("stop") == []


def test_tree_that_is_written_to_while_duplicity_reads_it(keyed: Store) -> None:
    """A file or two that come while duplicity reads the tree itself do not cost the night.

    It is others than mail that make them.
    """
    with disk_at(keyed, keyed.root / "mail/archive", "4M"):
        keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) touch {keyed.root}/ssl/one {keyed.root}/ssl/two;; esac
exec REAL "$@"
""")
        keyed.backup()
        assert keyed.last_run()["source"] == "direct" and len(keyed.manifests()) == 1


def test_no_room_for_the_copy(keyed: Store) -> None:
    """No room for the files that must be copied: duplicity reads the tree itself.

    Messages alone need no room.
    """
    keyed.run("rm", "-r", keyed.backups)
    with disk_at(keyed, keyed.scratch / "disk", "1400M"):
        root = keyed.scratch / "disk/user-data"
        keyed.run("cp", "-a", keyed.root, root)
        keyed.settings.write_text(f"STORAGE_ROOT={root}\nSTORAGE_USER={USER}\n")
        keyed.root = root
        keyed.put_key()
        message = root / "mail/mailboxes/example.com/alice/cur/170030.M1P1.host:2,"
        keyed.run("fallocate", "-l", "50M", message)
        keyed.backup()
        assert keyed.last_run()["source"] == "copy"
        (root / "database").write_text("little in much room, as databases make it, is quickly read")
        keyed.run("fallocate", "--keep-size", "--length", "600M", root / "database")
        keyed.backup()
        last = keyed.last_run()
        assert last["source"] == "direct" and "No space left" in last["message"]
        keyed.assert_restores()
        keyed.clean()


def test_second_pass_that_fails(keyed: Store) -> None:
    """A disk is mounted in the tree just as mail stops: nothing is backed up, exit 1.

    Mail is started, and the next run is good.
    """
    place = keyed.root / "mail/archive"
    place.mkdir()
    service = keyed.bin / "service"
    real = service.read_text().replace("#!/bin/sh\n", "")
    mount = f"if [ \"$1 $2\" = 'postfix stop' ]; then mount -t tmpfs none {place}; fi"
    service.write_text(f"#!/bin/sh\n{mount}\n{real}")
    try:
        errors = keyed.backup(exit_code=1).stderr
    finally:
        keyed.run("umount", place)
    assert "not on the same file system" in errors and keyed.running() == ["dovecot", "postfix"]
    assert keyed.last_run()["exit_code"] == 1 and keyed.manifests() == []
    assert_no_copy_left(keyed)
    service.write_text(f"#!/bin/sh\n{real}")
    keyed.backup()
    keyed.assert_restores()


def test_last_pass_without_an_end(keyed: Store) -> None:
    """As when somebody moves a directory ahead of it: mail is started, and no backup made."""
    program = keyed.changed_program("utils.update_mirror(copy)", """\
[utils.update_mirror(copy) for _ in iter(int, 1)]""")
    text = program.read_text()
    program.write_text(text.replace("STALLED_SECONDS = 600", "STALLED_SECONDS = 1"))
    errors = keyed.run(PYTHON, program, *keyed.command()[2:], exit_code=1).stderr
    assert "in 1 seconds nothing had come of the backup" in errors
    assert keyed.running() == ["dovecot", "postfix"] and keyed.manifests() == []


def test_file_written_again_in_the_second_of_its_copy(keyed: Store) -> None:
    """What is written just before mail stops and just after it starts is in the next backup.

    To duplicity, which compares whole seconds, it is the same file.
    """
    file, told = keyed.root / "ssl/index", keyed.scratch / "seconds"
    service = keyed.bin / "service"
    real = service.read_text()
    service.write_text(real.replace("#!/bin/sh\n", f"""#!/bin/sh
case "$1 $2" in
"postfix stop") until date +%N | grep -q ^0; do sleep 0.03; done; printf before > {file};;
"dovecot start") stat -c %Y {file} >> {told}; printf 'after!' > {file}
    stat -c %Y {file} >> {told};;
esac
"""))
    for _ in range(3):  # as a rule it is the first in which both fall into one second
        keyed.backup()
        then, now = told.read_text().split()[-2:]
        if then == now:
            break
    assert then == now, "the test proves nothing"
    service.write_text(real)
    keyed.backup()
    assert keyed.last_run()["kind"] == "incremental"
    keyed.assert_restores()


@pytest.mark.parametrize("what", ["link", "directory", "file"])
@pytest.mark.parametrize("name", ["backup/snapshot", ".backup-snapshot"])
def test_place_of_the_copy_that_is_not_ours(keyed: Store, name: str, what: str) -> None:
    """A link, file or directory of the user's where the copy goes is left alone.

    It is said what to do.
    """
    place = keyed.root / name
    if what == "link":
        place.symlink_to("/etc")
    elif what == "directory":
        place.mkdir()
        (place / "precious").touch()
        os.chown(place, pwd.getpwnam(USER).pw_uid, pwd.getpwnam(USER).pw_gid)
    else:
        place.touch()
    errors = keyed.backup(exit_code=2).stderr
    assert str(place) in errors and keyed.calls("stop") == []
    assert os.path.lexists(place) and (what != "directory" or (place / "precious").exists())


@pytest.mark.parametrize("name", ["backup", "ssl"])
@pytest.mark.parametrize("place", [".backup-snapshot", "migrated_unencrypted_backup"])
def test_directory_of_roots_by_another_name(
    keyed: Store, first_night: FirstNight, name: str, place: str
) -> None:
    """STORAGE_USER gives what is root's the name of what a run removes: nothing of it is lost.

    It is said what to do.
    """
    first_night(keyed)
    pass_the_second_of(keyed.encrypted)
    os.chown(keyed.root / "ssl", 0, 0)
    (keyed.root / name).rename(keyed.root / place)
    before = tree_of(keyed.root / place, "")
    errors = keyed.backup(exit_code=1 if place == ".backup-snapshot" else 3).stderr
    assert str(keyed.root / place) in errors and "move it" in errors
    after = tree_of(keyed.root / place, "")
    assert before.pop(".") and after.pop(".") and after == before  # its own mode may be another


def test_backup_on_a_bind_mount(keyed: Store) -> None:
    """backup/ is mounted from elsewhere on the same disk: the copy is beside the mail.

    Files cannot be linked into such a backup/.
    """
    elsewhere = keyed.scratch / "elsewhere"
    keyed.backups.rename(elsewhere)
    keyed.backups.mkdir()
    keyed.run("mount", "--bind", elsewhere, keyed.backups)
    try:
        keyed.backup()
        assert keyed.last_run()["source"] == "copy"
        assert_no_copy_left(keyed)
        keyed.assert_restores()
    finally:
        keyed.run("umount", keyed.backups)


def test_files_that_come_and_go_while_duplicity_reads(keyed: Store) -> None:
    """Web data that changes all the time makes no night fail: duplicity reads the copy."""
    churn = subprocess.Popen(
        ["sh", "-c", "while :; do mktemp -p . >/dev/null; rm -f tmp.*; done"],
        cwd=keyed.root / "ssl")
    try:
        for _ in range(2):
            keyed.backup()
    finally:
        churn.kill()
        churn.wait()
    assert len(keyed.manifests()) == 2


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL])
def test_file_that_cannot_be_copied(keyed: Store, error: int) -> None:
    """A disk error in a file that is no message: the backup is made without it.

    The file is named, exit 3; a good disk mends it. Of damage every night tells until a full one
    is asked for: that which comes by itself has not read what a repair of the disk took away.
    """
    bad = keyed.root / "ssl/private.pem"
    trace = ["strace", "-qq", "-o", "/dev/null", "-P", str(bad),
             "-e", "trace=sendfile", "-e", f"inject=sendfile:error={errno.errorcode[error]}"]
    result = keyed.run(*trace, *keyed.command(), exit_code=3)
    told = f"with BACKUP_EXCLUDE: {bad}: {os.strerror(error)}"
    assert told in result.stderr and told in keyed.last_run()["message"]
    assert keyed.last_run()["source"] == "copy"
    assert not (keyed.restore("without") / "ssl/private.pem").exists()
    (keyed.root / "big").write_bytes(os.urandom(1_000_000))  # after it the next is a full one
    for _ in range(2):
        keyed.backup(exit_code=3 if error == errno.EIO else 0)
    assert "-full." in keyed.manifests()[-1] and len(keyed.manifests()) == 3
    keyed.assert_restores()
    assert keyed.backup("--full").stderr == ""


def test_messages_that_cannot_be_listed(keyed: Store, first_night: FirstNight) -> None:
    """They are named, although nothing has changed there, and mail was down for no longer."""
    first_night(keyed)
    bad = keyed.root / "mail/mailboxes/example.com/alice/cur"
    time.sleep(utils.SETTLED_SECONDS + 0.5)  # what is settled is not read in the second pass
    trace = ["strace", "-qq", "-o", "/dev/null", "-P", str(bad),
             "-e", "trace=getdents64", "-e", "inject=getdents64:error=EIO"]
    assert f"{bad}: Input/output error" in keyed.run(*trace, *keyed.command(), exit_code=3).stderr
    assert keyed.last_run()["source"] == "copy"
    keyed.backup(exit_code=3)
    keyed.assert_restores()


def test_direct_way_of_an_odd_root(keyed: Store) -> None:
    """A root of nothing but odd characters is backed up all the same.

    duplicity takes what it is to leave out for patterns.
    """
    keyed.root = keyed.root.rename(keyed.scratch / "user [a]*? 'data\" é")
    keyed.settings.write_text(f"STORAGE_ROOT={keyed.root}\nSTORAGE_USER={USER}\n")
    with disk_at(keyed, keyed.root / "mail/archive", "4M"):
        keyed.backup()
        assert keyed.last_run()["source"] == "direct"
        keyed.assert_restores()
    keyed.clean()


def test_backup_that_is_renamed_before_it_is_copied(keyed: Store) -> None:
    """The copy does not copy itself, whatever name STORAGE_USER gives to backup/ meanwhile."""
    put_hook(keyed, "before-backup",
             f"#!/bin/sh\nmv {keyed.backups} {keyed.root}/moved; mkdir {keyed.backups}\n")
    keyed.backups.chmod(0o711)
    keyed.backup()
    moved = keyed.root / "moved"
    moved.rename(keyed.scratch / "backup")
    keyed.backups.rmdir()
    (keyed.scratch / "backup").rename(keyed.backups)
    names = keyed.backup("--list").stdout.splitlines()
    assert "mail/mailboxes" in names and "moved/encrypted" not in names
