"""Settings and surroundings: whatever is wrong gives one clear sentence and touches nothing.

Mail is never stopped for it.
"""

import dataclasses
import os
import pwd
import shlex
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest

import backup
import utils
from conftest import PYTHON, SCRIPT, USER, FirstNight, Store, pass_the_second_of, tree_of


def refused(store: Store, told: str, exit_code: int = 2, *arguments: str) -> None:
    """Check that a run is refused with one sentence, and that nothing was touched."""
    before = tree_of(store.root, without="nothing")
    result = store.backup(*arguments, exit_code=exit_code)
    assert told in result.stderr and result.stderr.startswith("backup: ") and result.stdout == ""
    assert result.stderr.count("\n") == 1 and not result.stderr.endswith(".\n")
    assert not any(call.split()[1] in ("stop", "start") for call in store.calls())
    after = tree_of(store.root, without="nothing")
    # A lock is taken, the refusal is noted, and the time of their directory tells.
    for name in ("backup/lock", "backup/last-run.json", "backup"):
        before.pop(name, None)
        after.pop(name, None)
    assert before == after


IN_ROOT = "STORAGE_ROOT=ROOT\n"
WHOLE = f"{IN_ROOT}STORAGE_USER=nobody\n"


@pytest.mark.parametrize("text, told", [
    ("STORAGE_USER=nobody\n", "STORAGE_ROOT is missing"),
    ("STORAGE_ROOT=relative/path\nSTORAGE_USER=nobody\n", "absolute path"),
    ("STORAGE_ROOT=/no/such/place\nSTORAGE_USER=nobody\n", "/no/such/place is not a directory"),
    ("STORAGE_ROOT=/etc/passwd\nSTORAGE_USER=nobody\n", "/etc/passwd is not a directory"),
    ("STORAGE_ROOT=//\nSTORAGE_USER=nobody\n", "STORAGE_ROOT is /, the whole system"),
    (IN_ROOT, "STORAGE_USER is missing"),
    (f"{IN_ROOT}STORAGE_USER=no-such-user\n", "there is no user no-such-user"),
    (f"{WHOLE}BACKUP_KEEP_DAYS=0\n", "BACKUP_KEEP_DAYS is 0"),
    (f"{WHOLE}BACKUP_KEEP_DAYS=three\n", "BACKUP_KEEP_DAYS is three"),
    (f"{WHOLE}BACKUP_KEEP_DAYS=\n", "BACKUP_KEEP_DAYS is empty"),
    (f"{WHOLE}BACKUP_EXCLUDE=www /etc\n", "BACKUP_EXCLUDE names /etc"),
    (f"{WHOLE}BACKUP_EXCLUDE=www/../mail\n", "BACKUP_EXCLUDE names www/../mail"),
    (f"{WHOLE}BACKUP_EXCLUDE=.\n", "BACKUP_EXCLUDE names ."),
    (f"{WHOLE}BACKUP_EXCLUDE=www # not mail\n", "BACKUP_EXCLUDE names #"),
    (f"{WHOLE}BACKUP_EXCLUDE=''\n", "BACKUP_EXCLUDE names an empty path"),
    (f"{WHOLE}BACKUP_EXCLUDE=migrated_unencrypted_backup/a\n",
     "BACKUP_EXCLUDE names migrated_unencrypted_backup/a"),
    (f"{WHOLE}BACKUP_EXCLUDE='.Sent Items\n", "BACKUP_EXCLUDE cannot be read: No closing"),
    (f"{WHOLE}BACKUP_SERVICES=dovecot --full\n", "--full is not the name of a service"),
    (f"{IN_ROOT}STORAGE_USER nobody\n", "line 2"),
    (f"{WHOLE}STORAGE_USER=root\n", "line 3"),
    (f"{WHOLE}A=\0\n", "line 3"),  # no environment can hold it
])
def test_wrong_settings(store: Store, text: str, told: str) -> None:
    """One sentence for each thing that can be wrong in the file."""
    store.settings.write_text(text.replace("=ROOT\n", f"={store.root}\n"))
    refused(store, told)


def test_settings_file_that_cannot_be_read(store: Store) -> None:
    """A missing file, and a directory in its place, are named."""
    store.settings.unlink()
    refused(store, f"cannot read the settings file {store.settings}: No such file or directory")
    store.settings.mkdir()
    refused(store, "Is a directory")


def test_settings_file_with_all_that_is_allowed(store: Store) -> None:
    """Blank lines, comments, spaces, CRLF, a line twice, keys of others, = and bytes in values."""
    text = (f"# settings\r\n\r\n  STORAGE_ROOT = {store.root} \r\n"
            f"STORAGE_USER={USER}\nSTORAGE_USER={USER}\n  # more\nA=b=c\u2028d=e\nEMPTY=\n")
    store.settings.write_bytes(text.encode() + b"NAME=\xff\n")
    assert utils.load_environment(store.settings) == {
        "STORAGE_ROOT": str(store.root), "STORAGE_USER": USER,
        "A": "b=c\u2028d=e", "EMPTY": "", "NAME": "\udcff"}
    store.backup("--dry-run")


def test_storage_root_needs_no_settings_file(store: Store) -> None:
    """With --storage-root the owner of the directory is STORAGE_USER.

    A relative path and a symbolic link will do: what that leads to is backed up. No file is open
    to others, whatever the umask, and a note in encrypted/ does not keep the first key from being
    made.
    """
    store.encrypted.mkdir(parents=True)
    (store.encrypted / "README").touch(mode=0o600)
    link = store.scratch / "link"
    link.symlink_to(store.root)
    program = shlex.join([PYTHON, str(SCRIPT)])
    result = store.run("sh", "-c",
                       f"umask 000; cd {store.scratch} && exec {program} --storage-root link")
    assert "keep a copy" in result.stderr
    assert store.encrypted.stat().st_gid == store.root.stat().st_gid
    for path in store.backups.rglob("*"):
        assert not stat.S_IMODE(path.lstat().st_mode) & 0o027, path
    store.assert_restores()


@pytest.mark.parametrize("directory, told", [
    ("/no/such", "cannot read /no/such: No such file"), ("unowned", "nobody here owns")])
def test_wrong_storage_root(store: Store, directory: str, told: str) -> None:
    """A directory that is missing, or whose owner has no name."""
    if directory == "unowned":
        directory = str(store.scratch / "unowned")
        os.mkdir(directory)
        os.chown(directory, 54321, 54321)
    refused(store, told, 2, "--storage-root", directory)
    refused(store, "an option has no value", 2, "--storage-root", "")


def test_storage_root_that_is_not_utf_8(store: Store) -> None:
    """It is backed up like any other, whether from a copy or, with a mount inside, directly."""
    root = store.root.rename(os.fsdecode(os.fsencode(store.scratch) + b"/\xff"))
    (root / "mount").mkdir()
    command = [*store.command()[:2], "--storage-root", str(root)]
    for full in ("copy", "direct"):
        if full == "direct":
            store.run("mount", "-t", "tmpfs", "none", root / "mount")
        try:
            store.run(*command, "--full")
        finally:
            store.run("umount", root / "mount", exit_code=None)
        assert f'"source": "{full}"' in (root / "backup/last-run.json").read_text()
    store.run(*command, "--restore", store.scratch / "restored")
    assert tree_of(store.scratch / "restored").keys() == tree_of(root).keys()
    store.root.mkdir()


def test_root_alone_makes_backups(store: Store) -> None:
    """Another user is told so."""
    store.settings.chmod(0o644)
    user = ("setpriv", "--reuid", USER, "--clear-groups")
    result = store.run(*user, *store.command_for_others(), exit_code=2)
    assert "run it as root" in result.stderr and not store.backups.exists()


@pytest.mark.parametrize("name", ["duplicity", "gpg", "gpg-agent"])
def test_missing_program(keyed: Store, name: str) -> None:
    """A program that is not installed costs no second of mail.

    The machine keeps it: PATH ends at links to all others.
    """
    programs = keyed.scratch / "programs"
    programs.mkdir()
    for program in backup.PROGRAMS:
        if program != name:
            (programs / program).symlink_to(shutil.which(program) or keyed.bin / program)
    settings = utils.load_environment(keyed.settings)
    night = backup.night_of(settings)
    night = dataclasses.replace(night, environment={**night.environment, "PATH": str(programs)})
    with pytest.raises(utils.Failure, match=f"^{name} is not installed") as caught:
        backup.check_surroundings(night)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("script, told", [
    ("#!/bin/sh\necho no module named duplicity; exit 1\n", "no module named duplicity"),
    ("#!/bin/sh\nexit 0\n", "duplicity does not run"),
])
def test_duplicity_that_does_not_run(keyed: Store, script: str, told: str) -> None:
    """A broken duplicity costs no second of mail."""
    keyed.stand_in("duplicity", script)
    result = keyed.backup(exit_code=2)
    assert told in result.stderr and keyed.calls() == []


def test_newer_duplicity_is_never_refused(keyed: Store) -> None:
    """Nor is one whose version is no number."""
    for version in ("0.8.21", "3.2.1 September 28, 2026", "99.0.0", "4.dev"):
        keyed.stand_in("duplicity", f"#!/bin/sh\necho duplicity {version}\n")
        night = backup.night_of(utils.load_environment(keyed.settings))
        path = f"{keyed.bin}:{night.environment['PATH']}"
        night = dataclasses.replace(night, environment={**night.environment, "PATH": path})
        assert backup.duplicity_version(night) == version.split()[0]


@pytest.mark.parametrize("content, mode, told", [
    (b"", 0o600, "is no passphrase"),
    (b"\n" + b"x" * 64 + b"\n", 0o600, "is no passphrase"),
    (b"x" * 42 + b"\n", 0o600, "less than 43 characters"),
    (b"\xff" * 64 + b"\n", 0o600, "is no passphrase"),
    (b"x" * 64 + b"\n", 0o644, "chmod 600"),
    (b"x" * 64 + b"\n", 0o640, "chmod 600"),
    (None, 0o600, "Is a directory"),
])
def test_wrong_key(keyed: Store, content: bytes, mode: int, told: str) -> None:
    """A key that is empty, short, binary, a directory or open to others is refused."""
    key = keyed.backups / "secret_key.txt"
    key.unlink()
    key.write_bytes(content) if content is not None else key.mkdir()
    key.chmod(mode)
    refused(keyed, told)


def test_key_is_its_first_line_stripped(keyed: Store) -> None:
    """43 characters will do; spaces around them and further lines do not count."""
    (keyed.backups / "secret_key.txt").write_text("  " + "k" * 43 + "\t\r\nsecond line\n")
    keyed.backup()
    keyed.assert_restores()


@pytest.mark.parametrize("present", [
    "encrypted/duplicity-full.20260101T030000Z.manifest.gpg", "duplicity/x"])
def test_missing_key_with_backups_present(store: Store, present: str) -> None:
    """No new key where backups need the old one."""
    (store.backups / present).parent.mkdir(parents=True)
    (store.backups / present).touch()
    refused(store, "is missing although there are backups")


@pytest.mark.parametrize("name, wrong, told", [
    *[(name, *wrong) for name in ("", "encrypted") for wrong in (
        ("link", "is a symbolic link"), ("file", "is not a directory"),
        ("owner", "is not owned by root"), ("writable", "chmod go-w"))],
    *[(name, "link", "is a symbolic link") for name in ("cache", "tmp", "legacy", "duplicity")]])
def test_hostile_directories(keyed: Store, name: str, wrong: str, told: str) -> None:
    """A backup/ or part of it that STORAGE_USER replaced, owns or can write to: refused."""
    elsewhere = keyed.scratch / "elsewhere"
    elsewhere.mkdir()
    path = keyed.backups / name
    if name == "":
        keyed.backups.rename(keyed.scratch / "moved")
    if wrong == "link":
        path.symlink_to(elsewhere)
    elif wrong == "file":
        path.touch()
    else:
        path.mkdir()
    if wrong == "owner":
        os.chown(path, 12345, 0)
    elif wrong == "writable":
        path.chmod(0o770)
    refused(keyed, told)
    assert list(elsewhere.iterdir()) == []


def test_last_run_that_is_a_link_is_replaced(keyed: Store) -> None:
    """What it points to is not written to."""
    elsewhere = keyed.scratch / "elsewhere"
    elsewhere.write_text("precious")
    (keyed.backups / "last-run.json").symlink_to(elsewhere)
    keyed.backup()
    assert elsewhere.read_text() == "precious"
    assert not (keyed.backups / "last-run.json").is_symlink()


def test_last_run_that_cannot_be_written(keyed: Store) -> None:
    """A directory stands there: the backup is made, and what failed is told."""
    (keyed.backups / "last-run.json").mkdir()
    result = keyed.backup(exit_code=3)
    assert "last-run.json" in result.stderr and result.stderr.count("\n") == 1
    assert len(keyed.manifests()) == 1


def test_another_key_than_the_backups(keyed: Store, first_night: FirstNight) -> None:
    """With a key that does not open the newest set nothing is stopped or written, exit 1.

    The ways out are told.
    """
    first_night(keyed)
    (keyed.backups / "secret_key.txt").write_text("another" * 10 + "\n")
    before = tree_of(keyed.encrypted)
    result = keyed.backup(exit_code=1)
    assert "made with another key" in result.stderr
    assert "put the old key back" in result.stderr
    assert keyed.calls() == []
    assert tree_of(keyed.encrypted) == before


@pytest.mark.parametrize("cached", [True, False])
def test_damaged_manifest(keyed: Store, first_night: FirstNight, cached: bool) -> None:
    """A newest manifest that gpg finds damaged is told apart from a wrong key.

    A full backup is made, without what duplicity has noted of it, too.
    """
    first_night(keyed)
    manifest = keyed.encrypted / keyed.manifests()[0]
    content = bytearray(manifest.read_bytes())
    content[-10] ^= 1
    manifest.write_bytes(content)
    (keyed.backups / "last-run.json").write_text('{"told": 5}')
    if not cached:
        shutil.rmtree(keyed.backups / "cache")
    assert f"{manifest} is damaged; fetch it" in keyed.backup(exit_code=3).stderr
    assert "-full." in keyed.manifests()[1]
    assert f"{manifest.name} is damaged" in keyed.backup("--status").stdout
    assert keyed.backup().stderr == "" and "-inc." in keyed.manifests()[2]


def test_set_of_the_future(keyed: Store) -> None:
    """A set dated ahead of the clock stops the run: the next increment would be an orphan.

    So it does the dry run.
    """
    keyed.run("faketime", "+2 hours", *keyed.command())
    keyed.forget_calls()
    for option in ("--full", "--dry-run"):
        assert "the clock is wrong, or was" in keyed.backup(option, exit_code=1).stderr
    assert keyed.calls() == [] and len(keyed.manifests()) == 1


def test_what_a_killed_run_leaves(keyed: Store, first_night: FirstNight) -> None:
    """Temporary files, gpg's home, partial files and the dead set are found and removed."""
    first_night(keyed)
    old = set(keyed.encrypted.iterdir())
    archive = next((keyed.backups / "cache").iterdir())
    (keyed.backups / "tmp").mkdir(mode=0o700)
    (keyed.backups / "tmp" / "duplicity-x-tempdir").mkdir()
    (archive / "duplicity-y-tempdir").mkdir()
    stamp, older = "20990101T000000Z", "20000101T000000Z"
    for name in (
        f"duplicity-full.{stamp}.vol1.difftar.gpg",
        f"duplicity-full-signatures.{stamp}.sigtar.gpg",
    ):
        (keyed.encrypted / name).touch()
    for name in (
        f"duplicity-full.{stamp}.manifest.part",
        f"duplicity-full-signatures.{stamp}.sigtar.gz",
        f"duplicity-full.{older}.manifest.part",
    ):
        (archive / name).touch()
    paths = backup.work_of({"STORAGE_ROOT": str(keyed.root)})
    paths.gnupg.mkdir(mode=0o700)
    assert keyed.backup().stderr == ""
    assert len(keyed.manifests()) == 2 and old < set(keyed.encrypted.iterdir())
    left = [path for path in keyed.backups.rglob("*")
            if "2099" in path.name or "tempdir" in path.name or path.suffix == ".part"]
    assert left == [] and not paths.gnupg.exists()


def test_directory_that_is_replaced_during_the_run(keyed: Store) -> None:
    """STORAGE_USER may rename what is in STORAGE_ROOT: a backup/ of its own gets nothing."""
    evil = keyed.root / "evil"
    for name in ("encrypted", "cache", "tmp"):
        (evil / name).mkdir(parents=True)
    (evil / "secret_key.txt").write_text("e" * 64)
    (evil / "secret_key.txt").chmod(0o600)
    os.chown(evil, 65534, 65534)
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) mv {keyed.backups} {keyed.root}/mine; mv {evil} {keyed.backups};; esac
exec REAL "$@"
""")
    before = tree_of(evil, "")
    keyed.backup()
    assert tree_of(keyed.backups, "") == before
    assert len(list((keyed.root / "mine/encrypted").glob("*.manifest.gpg"))) == 1
    assert "is not owned by root" in keyed.backup(exit_code=2).stderr


def test_encrypted_that_was_moved_aside(keyed: Store, first_night: FirstNight) -> None:
    """Only cache/ is left of the backups: --full makes a new beginning, and names what is gone."""
    first_night(keyed)
    keyed.encrypted.rename(keyed.scratch / "aside")
    pass_the_second_of(keyed.scratch / "aside")
    assert "manifest.gpg is missing" in keyed.backup("--full", exit_code=3).stderr
    keyed.assert_restores()


def test_clock_that_is_seconds_behind(keyed: Store) -> None:
    """A set up to a minute ahead is waited for: an increment before it would be an orphan."""
    keyed.run("faketime", "+4 seconds", *keyed.command())
    (keyed.root / "new").write_text("new")
    keyed.backup()
    assert len(keyed.manifests()) == 2
    keyed.assert_restores()


def test_path_that_is_too_long(keyed: Store) -> None:
    """A path over PATH_MAX, which any user can make, does not keep the rest from a backup."""
    directory = os.open(keyed.root, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 240, dir_fd=directory)
        below = os.open("d" * 240, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    keyed.backup(exit_code=3)
    assert len(keyed.manifests()) == 1
    shutil.rmtree(keyed.root / ("d" * 240))


@pytest.mark.parametrize("use", [
    lambda path: utils.make_owned_directory(path, 0o750, 1), utils.work_inside])
def test_directory_that_is_exchanged_for_a_link(
    keyed: Store, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], None]
) -> None:
    """STORAGE_USER exchanges a directory for a link when it was checked: it leads nowhere."""
    precious = keyed.scratch / "precious"
    precious.mkdir(mode=0o711)
    before = precious.stat()
    real = utils.check_owned_directory

    def exchange(path: Path, status: Optional[os.stat_result] = None) -> None:
        real(path, status)
        path.rename(path.with_name("away"))
        path.symlink_to(precious)

    monkeypatch.chdir(keyed.scratch)
    monkeypatch.setattr(utils, "check_owned_directory", exchange)
    with pytest.raises(OSError):
        use(keyed.backups)
    assert Path.cwd() == keyed.scratch
    assert (precious.stat().st_mode, precious.stat().st_gid) == (before.st_mode, before.st_gid)


def test_key_of_another_owner(keyed: Store) -> None:
    """Its owner could read it, and put another in its place."""
    os.chown(keyed.backups / "secret_key.txt", pwd.getpwnam(USER).pw_uid, -1)
    refused(keyed, "is not owned by root; run: chown root")


def test_rescue_system_that_does_not_know_the_owner(keyed: Store, first_night: FirstNight) -> None:
    """What only reads needs no STORAGE_USER."""
    first_night(keyed)
    os.chown(keyed.root, 54321, -1)
    result = keyed.run(PYTHON, keyed.command()[1], "--storage-root", keyed.root, "--list")
    assert "ssl/private.pem" in result.stdout
