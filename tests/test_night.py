"""The night as a whole: the order of calls, when a set is believed, and what is restored."""

import os
import re
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import backup
from conftest import FirstNight, OldNights, Store
from test_services import STARTS, STOPS

# Records its arguments and runs the real one.
RECORDING = """#!/bin/sh
echo "duplicity $*" >> "$(dirname "$0")/calls"
exec REAL "$@"
"""


def test_full_then_incremental_restore_equal(keyed: Store) -> None:
    """Both nights are silent, and a restore with plain duplicity equals the tree after each."""
    result = keyed.backup()
    assert (result.stdout, result.stderr) == ("", "")
    keyed.assert_restores("first")
    mailbox = keyed.root / "mail/mailboxes/example.com/alice"
    (mailbox / "new/170010.M1P1.host").rename(mailbox / "cur/170010.M1P1.host:2,S")
    next((mailbox / "cur").glob("170001*")).unlink()
    (mailbox / "new/170020.M1P1.host").write_text("Subject: later\n")
    began = datetime.now(timezone.utc).replace(microsecond=0)
    result = keyed.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert [name.split(".")[0] for name in keyed.manifests()] == ["duplicity-full", "duplicity-inc"]
    keyed.assert_restores("second")
    assert keyed.running() == ["dovecot", "postfix"]
    assert_told(keyed, began)
    for name in keyed.manifests():  # a random key needs no more, and each file took gpg 0.3 s
        packets = keyed.run(
            "gpg", "--batch", "--pinentry-mode", "cancel", "--list-packets",
            keyed.encrypted / name, exit_code=None,
            environment={"GNUPGHOME": str(keyed.gnupg())}).stdout
        assert re.findall(r"\tsalt \w+, count (\d+)", packets) == ["1048576"]


def assert_told(store: Store, began: datetime) -> None:
    """Check that last-run.json tells STORAGE_USER's group of an increment made since then."""
    content = store.last_run()
    assert (content["kind"], content["source"]) == ("incremental", "copy")
    assert (content["exit_code"], content["message"]) == (0, "")
    assert content["duplicity_version"].count(".") == 2
    start, end = (datetime.fromisoformat(content[key]) for key in ("start", "end"))
    assert start.utcoffset() == timedelta(0)
    assert began <= start <= end <= datetime.now(timezone.utc)
    assert isinstance(content["downtime_seconds"], float) and 0 < content["downtime_seconds"] < 60
    status = (store.backups / "last-run.json").stat()
    owner = (status.st_uid, status.st_gid)
    assert (stat.S_IMODE(status.st_mode), *owner) == (0o640, 0, store.root.stat().st_gid)
    assert [path.name for path in store.backups.iterdir() if path.name.startswith(".")] == []


def test_every_byte_in_names(keyed: Store) -> None:
    """Messages whose names hold any byte but / and NUL, alone and between others, are restored."""
    mailbox = keyed.root / "mail/mailboxes/example.com/alice/cur"
    for number in set(range(1, 256)) - {ord("/")}:
        for name in (bytes([number]), b"a" + bytes([number]) + b"b"):
            if name != b".":
                Path(os.fsdecode(os.path.join(os.fsencode(mailbox), name))).write_bytes(name)
    assert keyed.backup().stderr == ""
    keyed.assert_restores()


def test_order_of_the_night(keyed: Store) -> None:
    """Mail is stopped only for the copy, dovecot first, and started likewise; then duplicity.

    That has the options that the design says, and the target last.
    """
    keyed.stand_in("duplicity", RECORDING)
    for name in ("before-backup", "after-backup"):
        hook = keyed.backups / name
        hook.write_text(f"#!/bin/sh\necho hook {name} >> {keyed.bin}/calls\n")
        hook.chmod(0o755)
    (keyed.bin / "calls").touch()
    (keyed.bin / "calls").chmod(0o666)
    keyed.backup()
    assert [" ".join(call.split()[:2]) for call in keyed.calls()] == [
        "duplicity --version", "hook before-backup", "dovecot status", "postfix status",
        "dovecot stop", "postfix stop", "dovecot start", "postfix start",
        "dovecot status", "postfix status",
        "duplicity full", "duplicity remove-older-than", "duplicity cleanup", "hook after-backup"]
    target, archive = "file://encrypted", "--log-fd=LOG --archive-dir cache --name backup"
    quiet = f"{archive} --force --verbosity error"
    assert [re.sub("--log-fd=[0-9]+", "--log-fd=LOG", call) for call in keyed.calls()
            if re.match("duplicity (?!--version)", call)] == [
        f"duplicity full {archive} --volsize 250 --gpg-options=--cipher-algo=AES256 "
        f"--allow-source-mismatch --num-retries 1 snapshot/tree {target}",
        f"duplicity remove-older-than {quiet} 3D {target}", f"duplicity cleanup {quiet} {target}"]


def test_first_run_makes_a_key_and_says_so_once(store: Store) -> None:
    """The key is one line of 48 random bytes in base64, 0600; the admin is told of it once.

    backup/ and what is in it have the modes of the design.
    """
    result = store.backup()
    assert result.stdout == "" and result.stderr.count("\n") == 1 and "keep a copy" in result.stderr
    key = store.backups / "secret_key.txt"
    assert len(key.read_text().strip()) == 64 and key.read_text().count("\n") == 1
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert store.backup().stderr == ""
    group = store.root.stat().st_gid
    for path, mode in (
        (store.backups, 0o750), (store.encrypted, 0o750), (store.backups / "cache", 0o700)
    ):
        assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_uid) == (mode, 0)
    for_the_group = (store.backups, store.encrypted, *store.encrypted.iterdir())
    assert {path.stat().st_gid for path in for_the_group} == {group}
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.encrypted.iterdir()} == {0o640}
    assert not (store.backups / "tmp").exists()


@pytest.mark.parametrize("mode, expected", [(0o700, 0o710), (0o755, 0o755)])
def test_existing_backup_directory_gets_group_search(
    keyed: Store, mode: int, expected: int
) -> None:
    """A backup/ lets STORAGE_USER's group pass through, and keeps its mode otherwise."""
    os.chown(keyed.backups, 0, 0)
    keyed.backups.chmod(mode)
    keyed.stand_in("duplicity", "#!/bin/sh\nexit 1\n")
    keyed.backup(exit_code=2)
    assert stat.S_IMODE(keyed.backups.stat().st_mode) == expected


def test_passphrase_is_nowhere_but_in_duplicitys_environment(keyed: Store) -> None:
    """Nothing else ever has the passphrase, not even when duplicity prints it.

    That is no argument, message, hook, service or file, but for the key itself.
    """
    passphrase = (keyed.backups / "secret_key.txt").read_text().strip()
    for program in ("duplicity", "gpgconf"):
        keyed.stand_in(program, f"""#!/bin/sh
echo "{program} $* $(env | tr '\\n' ' ')" >> {keyed.scratch}/recorded
echo "my passphrase is $PASSPHRASE"
exec REAL "$@"
""")
    service = keyed.bin / "service"
    service.write_text(
        service.read_text().replace("cd ", f"env >> {keyed.scratch}/recorded-services; cd "))
    for name in ("before-backup", "after-backup"):
        (keyed.backups / name).write_text(f"#!/bin/sh\nenv >> {keyed.scratch}/recorded-hooks\n")
        (keyed.backups / name).chmod(0o755)
    (keyed.scratch / "recorded-hooks").touch()
    (keyed.scratch / "recorded-hooks").chmod(0o666)
    result = keyed.backup("-v")
    assert "my passphrase is [secret]" in result.stderr
    assert passphrase not in result.stdout + result.stderr
    assert "STORAGE_ROOT" in (keyed.scratch / "recorded-hooks").read_text()
    for name in ("recorded-hooks", "recorded-services"):
        assert passphrase not in (keyed.scratch / name).read_text()
    for line in (keyed.scratch / "recorded").read_text().splitlines():
        arguments, _, rest = line.partition(" PATH=")
        assert passphrase not in arguments.split(" PASSPHRASE=")[0]
        if line.startswith("gpgconf") or "--version" in line:
            assert passphrase not in line
    files = [path for path in keyed.backups.rglob("*") if path.is_file()]
    kept = [path for path in files if passphrase.encode() in path.read_bytes()]
    assert kept == [keyed.backups / "secret_key.txt"]


# What duplicity may do wrong

FAILING = """#!/bin/sh
case $1 in full|incremental) ;; *) exec REAL "$@";; esac
REAL "$@" || exit
WRONG
"""


def fail_with(store: Store, wrong: str) -> None:
    """Have duplicity do its work, and then do or say something wrong."""
    store.stand_in("duplicity", FAILING.replace("WRONG", wrong))


@pytest.mark.parametrize("code", [53, 99])
def test_failing_duplicity(keyed: Store, first_night: FirstNight, code: int) -> None:
    """Exit 1, services up, nothing left of the set; and it is told what duplicity said last.

    That is the sentence on its exit code, if there is one, and its last 25 lines.
    """
    first_night(keyed)
    before = sorted(path.name for path in keyed.encrypted.iterdir())
    fail_with(keyed, f"for number in $(seq 30); do echo line $number; done; exit {code}")
    result = keyed.backup(exit_code=1)
    assert "line 30" in result.stderr
    assert "line 6" in result.stderr and "line 5\n" not in result.stderr
    assert f"exit code {code}" in result.stderr
    assert backup.DUPLICITY_EXIT_CODES.get(code, "see its last lines") in result.stderr
    assert all(line.startswith("backup: ") for line in result.stderr.splitlines())
    assert sorted(path.name for path in keyed.encrypted.iterdir()) == before
    assert keyed.calls("stop", "start") == STOPS + STARTS
    content = keyed.last_run()
    assert content["exit_code"] == 1 and "duplicity incremental failed" in content["message"]


def test_set_without_manifest_is_not_believed(keyed: Store) -> None:
    """duplicity exits 0 but has no manifest in the target: exit 1, and the set is gone."""
    fail_with(keyed, f"rm {keyed.encrypted}/*.manifest.gpg")
    assert "no new full set" in keyed.backup(exit_code=1).stderr
    assert list(keyed.encrypted.iterdir()) == []
    assert [path for path in (keyed.backups / "cache").rglob("*") if path.is_file()] == []


def test_vanishing_source_is_not_believed(keyed: Store) -> None:
    """A tree that vanishes under duplicity gives a set of what is left, with exit 0.

    The number of entries gives it away.
    """
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) rm -r {keyed.backups}/snapshot/tree/mail;; esac
exec REAL "$@"
""")
    result = keyed.backup(exit_code=1)
    assert "duplicity read 3 of the" in result.stderr
    assert list(keyed.encrypted.iterdir()) == []


@pytest.mark.parametrize("call", ["openat", "read", "newfstatat"])
def test_unread_file_is_named(keyed: Store, call: str) -> None:
    """A file that cannot be opened, read or looked at is named safely, and the backup kept.

    The exit code is 3.
    """
    bad = {"ssl/private.pem": "ssl/private.pem", "ssl/\udcff\n\x1b.pem": r"ssl/\udcff\n\x1b.pem"}
    for name in bad:
        (keyed.root / name).write_text("bad sector")
    paths = " ".join(f"-P 'snapshot/tree/{name}'" for name in bad)
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) exec strace -qq -o /dev/null {paths} -e trace={call} \\
    -e inject={call}:error=EIO REAL "$@";; esac
exec REAL "$@"
""")
    result = keyed.backup(exit_code=3)
    assert len(keyed.manifests()) == 1 and keyed.last_run()["exit_code"] == 3
    for text in (result.stderr, keyed.last_run()["message"]):
        assert "could be read" in text and "snapshot" not in text
        assert all(shown in text for shown in bad.values())


@pytest.mark.parametrize("call", ["openat", "read"])
def test_unread_file_is_told_until_a_full_backup_has_it(
    keyed: Store, old_nights: OldNights, call: str
) -> None:
    """Nothing old is deleted until then: an increment may not read the file again.

    It does if the file could not be opened.
    """
    old_nights(keyed, "-9 days")
    old = set(os.listdir(keyed.encrypted))
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) exec strace -qq -o /dev/null -P snapshot/tree/ssl/private.pem \\
    -e trace={call} -e inject={call}:error=EIO REAL "$@";; esac
exec REAL "$@"
""")
    keyed.run("faketime", "-8 days", *keyed.command("--full"), exit_code=3)
    keyed.stand_in("duplicity", '#!/bin/sh\n[ "$1" = full ] && exit 50\nexec REAL "$@"\n')
    keyed.backup("--full", exit_code=1)
    (keyed.bin / "duplicity").unlink()
    for _ in range(2):
        assert "ssl/private.pem" in keyed.backup(exit_code=3).stderr
    assert old < set(os.listdir(keyed.encrypted))
    if call == "openat":
        keyed.assert_restores()
    assert keyed.backup("--full").stderr == ""
    assert old.isdisjoint(os.listdir(keyed.encrypted))
    keyed.assert_restores("after")


def test_failing_pruning_needs_attention(keyed: Store, first_night: FirstNight) -> None:
    """The backup is made, the rest of the night goes on, exit 3 says what failed.

    It is a full one with --full, although an incremental would do.
    """
    first_night(keyed)
    keyed.stand_in("duplicity", """#!/bin/sh
case $1 in remove-older-than|cleanup) echo $1 no more; exit 50;; esac
exec REAL "$@"
""")
    errors = keyed.backup("--full", exit_code=3).stderr
    for action in ("remove-older-than", "cleanup"):
        assert f"duplicity {action} failed" in errors and f"{action} no more" in errors
    assert [name.split(".")[0] for name in keyed.manifests()] == ["duplicity-full"] * 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in keyed.encrypted.iterdir()} == {0o640}


def test_last_room_is_left_to_mail(keyed: Store) -> None:
    """duplicity is ended when the room falls below the reserve; the set goes, mail comes back."""
    keyed.stand_in("duplicity", """#!/bin/sh
case $1 in full) fallocate -l 610M "$TMPDIR/volume"; sleep 60;; esac
exec REAL "$@"
""")
    disk = keyed.scratch / "disk"
    keyed.run("truncate", "-s", "800M", disk)
    keyed.run("mkfs.ext4", "-q", "-m", "0", disk)
    keyed.run("mount", "-o", "loop", disk, keyed.backups)
    try:
        keyed.backups.chmod(0o750)
        keyed.put_key()
        room = os.statvfs(keyed.backups)
        free, reserve = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize // 20
        keyed.run("fallocate", "-l", str(free - reserve - 600_000_000), keyed.backups / "filler")
        result = keyed.backup(exit_code=1)
        assert "before it took the last room" in result.stderr
        assert keyed.calls("stop", "start") == STOPS + STARTS
        assert list(keyed.encrypted.iterdir()) == [] and not (keyed.backups / "tmp").exists()
        keyed.forget_calls()
        (keyed.bin / "duplicity").unlink()
        keyed.backup()
        keyed.run("fallocate", "-l", str(50_000_000), keyed.backups / "filler2")
        keyed.forget_calls()
        assert "make room" in keyed.backup(exit_code=1).stderr and keyed.calls("stop") == []
        assert len(keyed.manifests()) == 1
    finally:
        keyed.run("umount", keyed.backups)
