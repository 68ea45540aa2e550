"""The ways in which duplicity loses data silently: backup.py is not caught.

That they bite is shown with plain duplicity.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import FirstNight, Result, Store, pass_the_second_of, tree_of
from test_services import programs_of, wait_for

pytestmark = pytest.mark.long

KEY = "correct horse battery staple correct horse battery staple"
BIG = 30_000_000

# The real duplicity with volumes of 1 MB, so that a small tree fills several.
SMALL_VOLUMES = """#!/bin/bash
arguments=("$@")
for place in "${!arguments[@]}"; do
    if [ "${arguments[$place]}" = 250 ]; then arguments[$place]=1; fi
done
exec REAL "${arguments[@]}"
"""


class Plain:
    """Plain duplicity on a store's tree, with target, archive and gpg home of its own."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.target, self.archive = store.scratch / "plain", store.scratch / "plain-archive"
        self.version = store.run("duplicity", "--version").stdout.split()[1]

    def command(self, action: str, *arguments: str) -> list[str]:
        """Return a command line as a script that knows no traps would run it."""
        return ["duplicity", action, "--archive-dir", str(self.archive),
                "--allow-source-mismatch", *arguments]

    def environment(self, key: str = KEY) -> dict[str, str]:
        """Return the environment for it."""
        return {"PASSPHRASE": key, "GNUPGHOME": str(self.store.gnupg())}

    def command_to_back_up(self, action: str, *options: str) -> list[str]:
        """Return the command line that backs up the tree, in volumes of 1 MB."""
        return self.command(
            action, *options, "--exclude", str(self.store.backups), "--volsize", "1",
            str(self.store.root), self.target.as_uri())

    def back_up(
        self, action: str, *options: str, key: str = KEY, exit_code: int | None = 0,
        prefix: tuple[str, ...] = ()
    ) -> Result:
        """Back up the tree, in another second than the backups before."""
        pass_the_second_of(self.target)
        command = self.command_to_back_up(action, *options)
        return self.store.run(
            *prefix, *command, exit_code=exit_code, environment=self.environment(key))

    def restore(self, name: str, key: str = KEY, exit_code: int | None = 0) -> Path:
        """Restore it, and return where to."""
        target = self.store.scratch / name
        command = self.command("restore", self.target.as_uri(), str(target))
        self.store.run(*command, exit_code=exit_code, environment=self.environment(key))
        return target

    def kill_midway(self, action: str) -> None:
        """Start a backup and kill it when its second volume is in the target."""
        pass_the_second_of(self.target)
        before = len(list(self.target.glob("*.vol*"))) if self.target.exists() else 0
        process = subprocess.Popen(
            self.command_to_back_up(action),
            env={**self.store.environment, **self.environment()}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: len(list(self.target.glob("*.vol*"))) >= before + 2)
        process.kill()
        process.wait()


def start(store: Store) -> "subprocess.Popen[str]":
    """Start backup.py, with its standard error to read."""
    return subprocess.Popen(store.command(), env=store.environment, stdin=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def grow(store: Store) -> None:
    """Add to the tree what fills several volumes."""
    for number in range(4):
        (store.root / f"big{number}").write_bytes(os.urandom(BIG // 4))


def change(store: Store) -> None:
    """Change what a killed run has already read, and what it has not."""
    (store.root / "big0").write_bytes(os.urandom(BIG // 4))
    (store.root / "big3").unlink()
    (store.root / "a-new-file").write_text("new")
    (store.root / "mail/mailboxes/example.com/alice/new/170010.M1P1.host").unlink()


def test_plain_duplicity_resumes_a_killed_run(keyed: Store) -> None:
    """The trap: the next run resumes the killed one, exits 0, and does not restore to the tree."""
    plain = Plain(keyed)
    grow(keyed)
    plain.kill_midway("full")
    change(keyed)
    plain.back_up("full")
    assert tree_of(plain.restore("caught")) != tree_of(keyed.root)


@pytest.mark.parametrize("action, victim", [
    ("full", "both"), ("incremental", "duplicity"), ("incremental", "script")])
def test_killed_run_is_never_resumed(
    keyed: Store, first_night: FirstNight, action: str, victim: str
) -> None:
    """Killed midway, nothing is left of the dead set, and the next one equals the tree."""
    if action == "incremental":
        first_night(keyed)
    old = {path.name for path in keyed.encrypted.iterdir()} if keyed.encrypted.exists() else set()
    grow(keyed)
    keyed.stand_in("duplicity", SMALL_VOLUMES)
    process = start(keyed)
    wait_for(lambda: len({path.name for path in keyed.encrypted.glob("*.vol*")} - old) >= 2)
    if victim != "script":
        ours = ["-P", str(process.pid), "-f", "duplicity"]
        subprocess.run(["pkill", "-KILL", *ours], check=victim != "both")
    if victim != "duplicity":
        process.kill()
    errors = process.communicate()[1]
    wait_for(lambda: keyed.running() == ["dovecot", "postfix"])
    if victim == "duplicity":
        assert process.returncode == 1 and "signal 9" in errors
        # at once, not the night after
        assert {path.name for path in keyed.encrypted.iterdir()} == old
    wait_for(lambda: programs_of(keyed) == [])
    change(keyed)
    keyed.backup()
    assert len(keyed.manifests()) == (2 if action == "incremental" else 1)
    left = [path for path in keyed.backups.rglob("*") if path.name.endswith((".part", "-tempdir"))]
    assert left == []
    keyed.assert_restores()


def test_plain_duplicity_mixes_keys(keyed: Store) -> None:
    """The trap: an increment under another key exits 0, and then neither key restores the chain.

    So 0.8.22; 3.2.1 exits 1.
    """
    plain = Plain(keyed)
    plain.back_up("full")
    (keyed.root / "new").write_text("new")
    other = "another key " * 5
    result = plain.back_up("incremental", key=other, exit_code=None)
    if int(plain.version.split(".")[0]) < 3:
        assert result.returncode == 0
        for number, key in enumerate((KEY, other)):
            plain.restore(f"caught{number}", key, exit_code=31)
    else:
        assert result.returncode != 0


def test_plain_duplicity_passes_over_unread_files(keyed: Store) -> None:
    """The trap: a file that cannot be read is left out, exit 0.

    That backup.py names it: test_night.py.
    """
    bad = keyed.root / "ssl/private.pem"
    plain = Plain(keyed)
    inject = ("-e", "trace=openat", "-e", "inject=openat:error=EIO")
    plain.back_up("full", prefix=("strace", "-qq", "-o", "/dev/null", "-P", str(bad), *inject))
    assert not (plain.restore("caught") / "ssl/private.pem").exists()


def test_plain_duplicity_believes_a_tree_that_vanishes(keyed: Store) -> None:
    """The trap: of a tree that goes while it is read, what is left is kept, exit 0.

    That backup.py does not: test_night.py.
    """
    plain = Plain(keyed)
    for number in range(300):
        (keyed.root / f"file{number:03}").write_bytes(os.urandom(20_000))
    process = subprocess.Popen(
        plain.command("full", "--volsize", "1", str(keyed.root), plain.target.as_uri()),
        env={**keyed.environment, **plain.environment()}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: list(plain.target.glob("*.vol1.*")))
    for path in keyed.root.glob("file[12]*"):
        path.unlink()
    output = process.communicate()[0]
    assert process.returncode == 0 and "Errors 0" in output
    assert len(list(plain.restore("caught").glob("file*"))) < 300


def test_plain_duplicity_makes_orphans_after_a_set_of_the_future(keyed: Store) -> None:
    """The trap: an increment on a set of the future fails, or is an orphan that no restore finds.

    That is what comes of a clock that was ahead, and then is not.
    """
    plain = Plain(keyed)
    plain.back_up("full")
    plain.back_up("incremental", prefix=("faketime", "+3 hours"))
    (keyed.root / "new").write_text("new")
    result = plain.back_up("incremental", exit_code=None)
    assert result.returncode != 0 or not (plain.restore("caught") / "new").exists()


def test_partial_manifest_of_a_complete_set(keyed: Store, first_night: FirstNight) -> None:
    """Killed between the upload of the manifest and its local rename, the next run is a good one.

    Plain duplicity 0.8.22 fails from then on.
    """
    first_night(keyed)
    manifest = next((keyed.backups / "cache").rglob("*.manifest"))
    manifest.rename(manifest.with_name(manifest.name + ".part"))
    keyed.backup()
    keyed.assert_restores()


def test_signatures_without_a_manifest(keyed: Store, first_night: FirstNight) -> None:
    """Signatures are deleted whose manifest was not made because the run was killed.

    With plain duplicity 0.8.22 every increment fails then, even after a cleanup.
    """
    first_night(keyed)
    last_run = (keyed.backups / "last-run.json").read_bytes()
    keyed.backup()
    (keyed.backups / "last-run.json").write_bytes(last_run)  # which a killed run does not write
    for manifest in keyed.backups.rglob("duplicity-inc.*.manifest*"):
        manifest.unlink()
    (keyed.root / "new").write_text("new")
    keyed.backup()
    assert len(list(keyed.encrypted.glob("*signatures*"))) == len(keyed.manifests()) == 2
    keyed.assert_restores()


def test_full_disk(keyed: Store) -> None:
    """A full disk is freed at once, and the earlier backup restores.

    Plain duplicity leaves it full.
    """
    disk, place = keyed.scratch / "disk", keyed.backups
    keyed.run("truncate", "-s", "900M", disk)
    keyed.run("mkfs.ext4", "-q", "-m", "0", disk)
    keyed.run("mount", "-o", "loop", disk, place)
    try:
        place.chmod(0o750)
        keyed.put_key()
        keyed.backup()
        kept, tree = {path.name for path in keyed.encrypted.iterdir()}, tree_of(keyed.root)
        grow(keyed)
        fill = f"fallocate -l $(( $(stat -f -c '%a*%S' {place}) - 2000000 )) {place}/filler"
        keyed.stand_in(
            "duplicity", f"#!/bin/bash\nif [ $1 = full ]; then {fill}; fi\nexec REAL \"$@\"\n")
        keyed.backup("--full", exit_code=1)
        assert keyed.running() == ["dovecot", "postfix"]
        assert os.statvfs(place).f_bavail * os.statvfs(place).f_frsize > 1_900_000
        assert {path.name for path in keyed.encrypted.iterdir()} == kept
        (place / "filler").unlink()
        assert tree_of(keyed.restore()) == tree
    finally:
        keyed.run("umount", place)


def test_run_that_is_ended_leaves_no_half_set(keyed: Store) -> None:
    """SIGTERM amid the volumes: what is there of the set goes at once, exit 143."""
    keyed.stand_in("duplicity", SMALL_VOLUMES)
    grow(keyed)
    process = start(keyed)
    wait_for(lambda: keyed.encrypted.exists() and list(keyed.encrypted.glob("*.vol*")))
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in process.communicate()[1] and process.returncode == 143
    assert list(keyed.encrypted.iterdir()) == []


@pytest.mark.parametrize("action", ["full", "incremental"])
def test_clock_that_is_set_back_during_the_run(
    keyed: Store, first_night: FirstNight, action: str
) -> None:
    """A set dated before the newest is thrown away at once: an orphan, or no backup of now."""
    first_night(keyed)
    keyed.stand_in("duplicity", """#!/bin/sh
case $1 in full|incremental) exec faketime -f -2h REAL "$@";; esac
exec REAL "$@"
""")
    before = {path.name for path in keyed.encrypted.iterdir()}
    keyed.backup(*(["--full"] if action == "full" else []), exit_code=1)
    assert {path.name for path in keyed.encrypted.iterdir()} == before


@pytest.mark.parametrize("what, content", [("*.manifest", b"rubbish"), ("*.sigtar.gz", b"\0\0")])
def test_damaged_archive_directory(
    keyed: Store, first_night: FirstNight, what: str, content: bytes
) -> None:
    """What a power cut makes of cache/ fails one night at most: it can be had anew."""
    first_night(keyed)
    for path in (keyed.backups / "cache").rglob(what):
        path.write_bytes(content)
    result = keyed.backup(exit_code=None)
    assert result.returncode in (0, 1)
    keyed.backup()
    keyed.assert_restores()


def test_backups_that_are_put_back_during_a_run_that_fails(
    keyed: Store, first_night: FirstNight
) -> None:
    """What an admin copies into encrypted/ meanwhile is not taken for the set that failed."""
    first_night(keyed)
    older = "duplicity-full.20200101T000000Z.manifest.gpg"
    failing = f"touch {keyed.encrypted}/{older}; REAL \"$@\"; exit 50"
    keyed.stand_in("duplicity", f"#!/bin/sh\ncase $1 in full) {failing};; esac\nexec REAL \"$@\"\n")
    keyed.backup("--full", exit_code=1)
    assert len(keyed.manifests()) == 2 and older in keyed.manifests()


@pytest.mark.parametrize("action", ["full", "incremental"])
def test_failures_in_a_row_delete_no_backup(
    keyed: Store, first_night: FirstNight, action: str
) -> None:
    """Without cache/ duplicity fetches what it lacks of the old sets: those did not fail."""
    first_night(keyed)
    before = {path.name for path in keyed.encrypted.iterdir()}
    keyed.stand_in(
        "duplicity", "#!/bin/sh\nREAL \"$@\" || exit\ncase $1 in full|inc*) exit 50;; esac\n")
    for _ in range(2):
        keyed.backup(*(["--full"] if action == "full" else []), exit_code=1)
        assert {path.name for path in keyed.encrypted.iterdir()} == before
    (keyed.bin / "duplicity").unlink()
    keyed.backup()
    assert len(keyed.manifests()) == 2
    keyed.assert_restores()


@pytest.mark.parametrize("action, what", [("full", "*"), ("incremental", "*full.*.vol1.*")])
def test_files_that_come_back_during_a_failing_run(
    keyed: Store, first_night: FirstNight, action: str, what: str
) -> None:
    """A volume, or a whole newer chain, comes into encrypted/ just then: it did not fail."""
    first_night(keyed)
    keyed.backup("--full")
    full = keyed.manifests()[-1].split(".")[1]
    aside = keyed.scratch / "aside"
    aside.mkdir()
    for path in [path for path in keyed.encrypted.glob(what) if full in path.name]:
        path.rename(aside / path.name)
    if what != "*":
        shutil.rmtree(keyed.backups / "cache")
    (keyed.backups / "last-run.json").unlink()  # which would miss them
    pass_the_second_of(aside)  # or the failing set bears the same names
    before = {path.name for place in (keyed.encrypted, aside) for path in place.iterdir()}
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full|incremental) mv {aside}/* {keyed.encrypted}; REAL "$@"; exit 50;; esac
exec REAL "$@"
""")
    keyed.backup(*(["--full"] if action == "full" else []), exit_code=1)
    assert before <= {path.name for path in keyed.encrypted.iterdir()}


def test_directory_by_the_name_of_a_volume(keyed: Store, first_night: FirstNight) -> None:
    """It is somebody's, and no part of a set that died: it is not among what goes.

    Here it is only planned: duplicity's cleanup tries for minutes to delete it.
    """
    first_night(keyed)
    directory = keyed.encrypted / "duplicity-full.20990301T030000Z.vol1.difftar.gpg"
    directory.mkdir()
    (directory / "precious").touch()
    assert directory.name not in keyed.backup("--dry-run").stdout
