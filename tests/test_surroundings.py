"""What stands where files should, and what nobody foresaw: a sentence, and nothing hangs."""

import json
import os
import pwd
import shutil
import stat
import struct
from pathlib import Path

import pytest

import utils
from conftest import PYTHON, FirstNight, Store


@pytest.mark.parametrize("device, name, exit_code", [
    ("fifo", "mailinabox.conf", 2), ("link", "user-data/backup/secret_key.txt", 2),
    ("link", "user-data/backup/last-run.json", 3), ("fifo", "user-data/backup/last-verify.json", 0),
    ("fifo", "user-data/backup/encrypted/duplicity-full.20260101T030000Z.manifest.gpg", 1),
])
def test_no_file_is_waited_for(
    keyed: Store, first_night: FirstNight, name: str, exit_code: int, device: str
) -> None:
    """A run that opened a pipe would wait for ever, with the lock in its hand."""
    first_night(keyed)
    path = keyed.scratch / name
    path.unlink(missing_ok=True)
    if device == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to("/dev/zero")
    result = keyed.run("timeout", "60", *keyed.command(), exit_code=exit_code)
    assert exit_code == 0 or path.name in result.stderr


def test_what_nobody_foresaw(keyed: Store, first_night: FirstNight) -> None:
    """It ends a night like a failure: mail is back, it is told, and the set is thrown away."""
    first_night(keyed)
    before = {path.name for path in keyed.encrypted.iterdir()}
    line = "    record.size, record.newest_set = made[0].size, made[0].stamp\n"
    program = keyed.changed_program(line, f"    1 // 0\n{line}")
    result = keyed.run(PYTHON, program, *keyed.command()[2:], exit_code=1)
    assert result.stderr.count("\n") == 1 and "ZeroDivisionError" in result.stderr
    assert "ZeroDivisionError" in keyed.last_run()["message"]
    assert keyed.running() == ["dovecot", "postfix"]
    assert {path.name for path in keyed.encrypted.iterdir()} == before
    told = keyed.run(PYTHON, program, "-v", *keyed.command()[2:], exit_code=1).stderr
    assert "Traceback" in told


def test_rest_of_a_long_line_is_no_line() -> None:
    """A name of any length in a message cannot forge a record of duplicity's own."""
    lines: list[str] = []
    program = "print('x' * 100000 + 'ERROR 21 x'); print('last')"
    utils.shell([PYTHON, "-c", program], os.environ, on_line=lines.append)
    assert lines == ["x" * 100000, "last"]


def test_pruning_that_hangs(keyed: Store, first_night: FirstNight) -> None:
    """duplicity may do so after it has told of an error: it is ended, and the lock given up."""
    first_night(keyed)
    keyed.stand_in("duplicity", """#!/bin/bash
if [ $1 = cleanup ]; then
    echo "ERROR 30 x" >&${2#--log-fd=}
    sleep 1000
fi
exec REAL "$@"
""")
    program = keyed.changed_program("HANGING_SECONDS = 5", "HANGING_SECONDS = 0")
    result = keyed.run("timeout", "60", PYTHON, program, *keyed.command()[2:], exit_code=3)
    assert "duplicity cleanup failed: duplicity met an error of its own" in result.stderr


def test_duplicity_that_stands_still(keyed: Store) -> None:
    """A pipe without a writer, where it was to read a file while mail is down: mail comes back."""
    keyed.stand_in("duplicity", f"""#!/bin/sh
if [ $1 = full ]; then
    cat {keyed.root}/mail/mailboxes/example.com/alice/fifo
fi
exec REAL "$@"
""")
    (keyed.root / "disk").mkdir()
    program = keyed.changed_program("STALLED_SECONDS = 600", "STALLED_SECONDS = 1")
    result = keyed.run("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0/disk" && "$@"',
                       keyed.root, "timeout", "60", PYTHON, program, *keyed.command()[2:],
                       exit_code=1)
    assert "in 1 seconds nothing had come of the backup" in result.stderr
    assert keyed.running() == ["dovecot", "postfix"] and keyed.manifests() == []


def test_comparison_that_stands_still(keyed: Store, first_night: FirstNight) -> None:
    """A pipe was put in place of a live file between duplicity's look at it and its opening it."""
    first_night(keyed)
    keyed.stand_in("duplicity", f"""#!/bin/sh
if [ $1 = verify ]; then
    cat {keyed.root}/mail/mailboxes/example.com/alice/fifo
fi
exec REAL "$@"
""")
    program = keyed.changed_program("STALLED_SECONDS = 600", "STALLED_SECONDS = 1")
    command = keyed.command("--verify", "--compare")[2:]
    result = keyed.run("timeout", "60", PYTHON, program, *command, exit_code=1)
    assert "duplicity stood still for 1 seconds" in result.stderr


def test_duplicity_of_a_launcher(keyed: Store) -> None:
    """A shell that only waits for it does not pass for one that stands still."""
    keyed.stand_in("duplicity", """#!/bin/sh
if [ $1 = full ]; then
    (for time in $(seq 80); do sleep 0.1; done)
fi
REAL "$@"
exit $?
""")
    program = keyed.changed_program("STALLED_SECONDS = 600", "STALLED_SECONDS = 1")
    result = keyed.run("timeout", "120", PYTHON, program, *keyed.command("--full")[2:])
    assert result.stderr == "" and len(keyed.manifests()) == 1


@pytest.mark.parametrize("option", ["--restore=--", "--config=--"])
def test_value_that_argparse_takes_away(keyed: Store, option: str) -> None:
    """`--` is an empty list to it: what was to be a restore stops no mail."""
    result = keyed.backup(option, exit_code=2)
    assert "an option has no value" in result.stderr and keyed.calls() == []


def test_no_thread_can_be_had(store: Store) -> None:
    """Where processes are limited that is told in a sentence, too."""
    result = store.run("setpriv", "--reuid=65534", "--clear-groups", "prlimit", "--nproc=1",
                       *store.command("--verify"), exit_code=1)
    assert result.stderr == "backup: only root can read all mail and the backups; run it as root\n"


@pytest.mark.parametrize("threads", [0, 1])
def test_thread_that_is_refused(keyed: Store, threads: int) -> None:
    """Whichever it is, that there is none is said, and not only an exit code."""
    program = keyed.changed_program('if __name__ == "__main__":\n    sys.exit(main(', f"""\
import threading
START, STARTED = threading.Thread.start, []

def start(thread):
    if len(STARTED) == {threads}:
        raise RuntimeError("can't start new thread")
    STARTED.append(thread)
    START(thread)

threading.Thread.start = start
if __name__ == "__main__":
    sys.exit(main(""")
    result = keyed.run(PYTHON, program, *keyed.command()[2:], exit_code=1)
    assert "can't start new thread" in result.stderr


def test_disk_of_the_system_takes_nothing(keyed: Store) -> None:
    """A night needs STORAGE_ROOT and /run only; just then a backup is wanted."""
    keyed.run("env", "-u", "TMPDIR", "-u", "COV_CORE_SOURCE", "unshare", "--mount", "sh", "-c", """\
mount -t tmpfs none /run && mount -o remount,bind,ro / &&
mount --bind "$0" "$0" && mount -o remount,bind,rw "$0" && exec "$@"
""", keyed.scratch, *keyed.command())
    assert len(keyed.manifests()) == 1


def test_time_before_1970(keyed: Store) -> None:
    """duplicity takes it for 1970: worth a remark, but no alarm and no word of the disk."""
    for name in ("ancient", "mail", "latin\udce9", "break\nError accessing nothing"):
        path = keyed.root / name
        path.touch()
        os.utime(path, (-1e9, -1e9))
    assert keyed.backup().stderr == ""
    assert "before 1970" in keyed.last_run()["message"]
    restored = keyed.restore()
    assert Path(restored, "ancient").stat().st_mtime == 0
    assert json.loads(keyed.backup("--status", "--json").stdout)["ok"]


def test_damaged_notes_bring_nothing_back(keyed: Store, first_night: FirstNight) -> None:
    """A bit flipped in duplicity's own signatures: they are made anew before they are used."""
    first_night(keyed)
    signatures = next((keyed.backups / "cache/backup").glob("*.sigtar.gz"))
    content = bytearray(signatures.read_bytes())
    content[len(content) // 2] ^= 1
    signatures.write_bytes(content)
    (keyed.root / "new").touch()
    (keyed.root / "ssl/private.pem").unlink()
    assert keyed.backup().stderr == ""
    assert "made anew" in keyed.last_run()["message"] and "-inc." in keyed.manifests()[-1]
    keyed.assert_restores()


def test_storage_root_that_is_gone(keyed: Store) -> None:
    """--status does not speak of a backup that is overdue."""
    keyed.root.rename(keyed.scratch / "elsewhere")
    assert f"{keyed.root} is not a directory" in keyed.backup("--status", exit_code=2).stderr
    (keyed.scratch / "elsewhere").rename(keyed.root)


@pytest.mark.parametrize("source", ["", "/.."])
def test_storage_root_mounted_inside_itself(keyed: Store, source: str) -> None:
    """It would be refused by the copy, and by duplicity with mail down, or hold its own backups."""
    (keyed.root / "again").mkdir()
    script = f'mount --bind "$0{source}" "$0/again" && exec "$@"'
    result = keyed.run("unshare", "--mount", "sh", "-c", script, keyed.root, *keyed.command(),
                       exit_code=2)
    assert f"{keyed.root}/again shows it once more" in result.stderr and not keyed.calls()
    with keyed.settings.open("a") as stream:
        stream.write("BACKUP_EXCLUDE=again\n")
    keyed.run("unshare", "--mount", "sh", "-c", script, keyed.root, *keyed.command())


def test_mount_that_is_hidden_by_another(keyed: Store) -> None:
    """The kernel lists it, and nothing leads there: a backup is made."""
    (keyed.root / "disk").mkdir()
    script = ('cd "$0" && mount -t tmpfs none disk && mkdir disk/inner && mount -t tmpfs none '
              'disk/inner && mount -t tmpfs none disk && exec "$@"')
    keyed.run("unshare", "--mount", "sh", "-c", script, keyed.root, *keyed.command())


def test_default_acl(keyed: Store) -> None:
    """STORAGE_USER owns STORAGE_ROOT: what he has inherited there gives him nothing in backup/."""
    shutil.rmtree(keyed.backups)
    everybody = [(tag, 7, 0xffffffff) for tag in (1, 4, 16, 32)]  # see acl(5): owner to others
    everybody.insert(1, (2, 7, pwd.getpwnam("nobody").pw_uid))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in everybody)
    os.setxattr(keyed.root, "system.posix_acl_default", acl)
    for _ in range(2):
        keyed.backup()
        for path in [*keyed.backups.glob("encrypted/**"), *keyed.backups.glob("encrypted/*")]:
            assert os.listxattr(path) == []
        assert stat.S_IMODE((keyed.backups / "cache/backup").stat().st_mode) & 0o022 == 0
