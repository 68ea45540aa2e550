"""--verify, --list and --restore: they find every damage, need neither cache/ nor a settings file, and disturb no backup."""

import itertools
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import backup
from conftest import PYTHON, SCRIPT, FirstNight, Result, Store, tree_of
from utils import Failure

pytestmark = pytest.mark.xdist_group("reading")  # one process makes what they read

MESSAGE = "mail/mailboxes/example.com/alice/new/170010.M1P1.host"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with two chains: a full and two increments, and a full.

    One message is only in the first set. Never written to.
    """
    import conftest
    place = tmp_path_factory.mktemp("made")
    store: Store = conftest.make_store(place)
    store.put_key()
    store.backup()
    (store.root / MESSAGE).unlink()
    for number in range(2):
        (store.root / f"file{number}").write_bytes(os.urandom(100 * number))
        store.backup()
    store.backup("--full")
    yield store
    store.clean()


@pytest.fixture
def copy(made: Store, tmp_path: Path) -> Iterator[Store]:
    """A copy of that store, to be damaged."""
    root = tmp_path / "user-data"
    subprocess.run(["cp", "-a", made.root, root], check=True)
    settings = tmp_path / "settings"
    settings.write_text(made.settings.read_text().replace(str(made.root), str(root)))
    store = Store(root, settings, made.bin, tmp_path, made.environment)
    yield store
    store.clean()


def reads(store: Store, *arguments: str, exit_code: int = 0, program: Path = SCRIPT) -> Result:
    """Run a command that reads, without a settings file, and check that it leaves nothing behind."""
    before = sorted(os.listdir(store.backups))
    result = store.run(
        PYTHON, program, "--storage-root", store.root, *arguments, exit_code=exit_code)
    assert "Traceback" not in result.stderr
    assert sorted(os.listdir(store.backups)) == before
    return result


def names_of(store: Store) -> list[str]:
    """Return the names in encrypted/."""
    return sorted(path.name for path in store.encrypted.iterdir())


def test_verify_of_sound_backups(made: Store) -> None:
    """It says how many sets, files and bytes were checked, on standard output; exit 0."""
    result = reads(made, "--verify")
    size = sum(path.stat().st_size for path in made.encrypted.iterdir())
    assert result.stdout.startswith("checked 4 backup sets: 12 files, ") and result.stderr == ""
    assert f"{size / 1000:.1f} kB" in result.stdout


def damage(path: Path, wrong: str) -> None:
    """Flip a bit of a file, cut its last byte off, or delete it."""
    content = bytearray(path.read_bytes())
    if wrong == "missing":
        path.unlink()
    elif wrong == "short":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("cached", [True, False])
def test_verify_finds_every_damage(copy: Store, cached: bool) -> None:
    """Of all files of a kind one bit flipped, the last byte lost, or they are missing: each is named.

    Of manifests one is left, for a set without one is no backup. With cache/ and without.
    """
    if not cached:
        shutil.rmtree(copy.backups / "cache")
    sound = {path: path.read_bytes() for path in copy.encrypted.iterdir()}
    newest = copy.encrypted / copy.manifests()[-1]
    for kind, wrong in itertools.product((".vol1.", ".sigtar.", ".manifest."),
                                         ("flipped", "short", "missing")):
        paths = {path for path in sound if kind in path.name}
        paths -= {newest} if (kind, wrong) == (".manifest.", "missing") else set()
        for path in paths:
            damage(path, wrong)
        errors = reads(copy, "--verify", exit_code=3).stderr
        for path in paths:
            assert path.name in errors, errors
            path.write_bytes(sound[path])
    reads(copy, "--verify")
    newest.unlink()
    reads(copy, "--verify", exit_code=3)


def test_verify_finds_a_whole_set_that_is_missing(copy: Store) -> None:
    """An increment in the middle of a chain: the next one leads back to nothing.

    The newest: the last run named it.
    """
    increment = [name for name in copy.manifests() if name.startswith("duplicity-inc")][0]
    for stamps, told in ((increment.split(".manifest")[0][-36:], f"{increment} is missing"),
                         (copy.manifests()[-1].split(".")[1], "the newest backup, of")):
        saved = {path: path.read_bytes() for path in copy.encrypted.glob(f"*.{stamps}.*")}
        assert len(saved) == 3
        for path in saved:
            path.unlink()
        assert told in reads(copy, "--verify", exit_code=3).stderr
        for path, content in saved.items():
            path.write_bytes(content)


def test_wrong_key(copy: Store) -> None:
    """It is said once, with what to do, and nothing is made; an empty one is not even tried."""
    key, target = copy.backups / "secret_key.txt", copy.scratch / "restored"
    for command in (["--verify"], ["--list"], ["--restore", str(target)]):
        key.write_text("k" * 64 + "\n")
        assert reads(copy, *command, exit_code=1).stderr == (
            f"backup: the backups in {copy.encrypted} were made with another key than that in "
            f"{key}; put the old key back\n")
        key.write_text("")
        assert "is no passphrase" in reads(copy, *command, exit_code=2).stderr
    assert not target.exists()


@pytest.mark.parametrize("damaged", ["newest set", "manifests"])
def test_key_of_a_part(copy: Store, damaged: str) -> None:
    """While the key opens something the others are damaged files: those are told of one by one, and the rest is there to be restored."""
    names = [name for name in names_of(copy) if (name in copy.manifests()[-1:] if damaged == "newest set" else ".manifest." in name)]
    for name in names:
        copy.run("gpg", "--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase", "k" * 64, "--output", copy.encrypted / name,
                 "--symmetric", "/dev/null", environment={"GNUPGHOME": str(copy.gnupg())})
    errors = reads(copy, "--verify", exit_code=3).stderr
    assert all(f"{copy.encrypted / name} was made with another key" in errors for name in names)
    assert len(errors.splitlines()) == len(names)


def test_compare(copy: Store) -> None:
    """--compare lists what differs between the newest backup and the live files."""
    assert reads(copy, "--verify", "--compare").stderr == ""
    (copy.root / "ssl/private.pem").write_text("changed")
    (copy.root / "ssl/added\udcff").write_text("new")
    (copy.root / "file1").unlink()
    result = reads(copy, "--verify", "--compare", exit_code=3)
    for name in ("ssl/private.pem", r"ssl/added\udcff", "file1"):
        assert name in result.stderr
    assert len([line for line in result.stderr.splitlines() if "ifference found" in line and "ssl has" not in line]) >= 3
    copy.settings.write_text("BACKUP_EXCLUDE=ssl file1\n")  # which the newest backup holds
    result = reads(copy, "--config", str(copy.settings), "--verify", "--compare", exit_code=3)
    assert "File . has mtime" in result.stderr and result.stderr.count("\n") == 1


def test_list(made: Store) -> None:
    """The paths in the newest backup and in an older one, one a line, odd names escaped."""
    newest = reads(made, "--list").stdout.splitlines()
    expected = {name.encode("unicode_escape", "backslashreplace").decode().replace(r"\udcff", r"\xff") for name in tree_of(made.root)}
    assert {name for name in newest if "odd" not in name} == {name for name in expected if "odd" not in name}
    assert len(newest) == len(expected) and r"17001\xff\n.odd:2," in "\n".join(newest)
    assert MESSAGE not in newest
    first = made.manifests()[0].split(".")[1]
    oldest = f"{first[:4]}-{first[4:6]}-{first[6:11]}:{first[11:13]}:{first[13:15]}+00:00"
    result = reads(made, "--list", "--time", oldest)
    assert MESSAGE in result.stdout.splitlines()
    assert result.stderr == f"backup: backup of {oldest.replace('T', ' ')}\n"


def test_restore_of_everything(copy: Store) -> None:
    """Equal to the tree, the directory itself included, into one that did not exist and, without cache/, into an empty one."""
    fresh, empty = copy.scratch / "fresh", copy.scratch / "empty"
    reads(copy, "--restore", str(fresh))
    shutil.rmtree(copy.backups / "cache")
    empty.mkdir()
    reads(copy, "--restore", str(empty))
    assert tree_of(fresh) == tree_of(empty) == tree_of(copy.root)


def set_at(hours: float) -> backup.BackupSet:
    """Return a set of so many hours before 20 November 2026, 15:00 UTC."""
    date = datetime(2026, 11, 20, 15, tzinfo=timezone.utc) - timedelta(hours=hours)
    return backup.BackupSet(f"{date:%Y%m%dT%H%M%SZ}", None, True, frozenset(), 0)


SETS = [set_at(before) for before in (9000, 800, 400, 48, 24, 0)]


@pytest.mark.parametrize("asked, hours", [
    ("1h", 24), ("24h", 24), ("1D", 24), ("1d", 24), ("1D12h", 48), ("2W", 400), ("2w", 400),
    ("1M", 800), ("1Y", 9000), ("1y", 9000), ("1440m", 24), ("86400s", 24), ("0s", 0), ("2026-11-20", 24),
    ("20261120", 24), ("2026-11-20 10:00", 0), ("2026-11-20 09:59", 24),
    ("2026-11-20T15:00:00Z", 0), ("2026-11-20T15:30:00+01:00", 24), ("20261120T145959Z", 24), ("2030-01-01", 0)])
def test_time(monkeypatch: pytest.MonkeyPatch, asked: str, hours: float) -> None:
    """The newest set then is taken; times without a zone are local, a date alone is its midnight."""
    monkeypatch.setenv("TZ", "America/New_York")  # five hours behind
    time.tzset()
    try:
        assert backup.set_of_time(SETS, asked, set_at(0).date) == set_at(hours)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("asked, told, exit_code", [
    *[(asked, "is not a time", 2) for asked in (
        "2020", "2020-01", "2020-W10-1", "now", "3D4", "999999999999D", "2026-13-77", "")],
    ("40000D", "there is no backup as old as 40000D", 1),
    ("2020-01-01T03:00:00+02:00", "name the time of one of these", 1)])
def test_wrong_time(asked: str, told: str, exit_code: int) -> None:
    """What is no time is usage (2); one before the first backup is told with those there are (1)."""
    with pytest.raises(Failure, match=told) as caught:
        backup.set_of_time(SETS, asked, set_at(0).date)
    assert caught.value.exit_code == exit_code


def test_restore_to_btrfs(made: Store, tmp_path: Path) -> None:
    """There a directory that is open does not list what was restored into it since."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    made.run("truncate", "-s", "300M", image)
    made.run("mkfs.btrfs", "-q", image)
    made.run("mount", "-o", "loop", image, place)
    try:
        reads(made, "--restore", str(place / "restored"))
        assert tree_of(place / "restored") == tree_of(made.root)
    finally:
        made.run("umount", place)


def test_restore_of_a_part(made: Store, tmp_path: Path) -> None:
    """A single message as of a time, a mailbox, a directory; the directory made is root's alone when a file goes there."""
    first = made.manifests()[0].split(".")[1]
    oldest = f"{first[:4]}-{first[4:6]}-{first[6:11]}:{first[11:13]}:{first[13:15]}+00:00"
    reads(made, "--restore", str(tmp_path / "message"), "--path", MESSAGE, "--time", oldest)
    assert [path.name for path in (tmp_path / "message").iterdir()] == [Path(MESSAGE).name]
    assert stat.S_IMODE((tmp_path / "message").stat().st_mode) == 0o700
    mailbox = "mail/mailboxes/example.com/alice"
    reads(made, "--restore", str(tmp_path / "mailbox"), "--path", mailbox + "/")
    assert tree_of(tmp_path / "mailbox") == tree_of(made.root / mailbox)
    reads(made, "--restore", str(tmp_path / "ssl"), "--path", "ssl", "--time", oldest)
    before, after = (int(path.stat().st_mtime) for path in (made.root / "ssl", tmp_path / "ssl"))
    assert before == after


def test_restore_into_no_directory(made: Store, tmp_path: Path) -> None:
    """A directory that would be in one that is not there cannot be made, and is named."""
    place = tmp_path / "missing" / "target"
    errors = reads(made, "--restore", str(place), exit_code=1).stderr
    assert errors == f"backup: {place.parent}: No such file or directory; see to that and run this again\n"


@pytest.mark.parametrize("arguments, told, exit_code", [
    (["--path", "mail/mailboxes/example.com/bob"], "there is:\nbackup:     mail/mailboxes/example.com/alice\n", 1),
    (["--path", "../etc"], "../etc is not in the backup; there is:\nbackup:     file0\nbackup:     file1\nbackup:     mail\n", 1),
    (["--path", ""], "an option has no value", 2),
    (["--time", "40D"], "there is no backup as old as 40D", 1),
    (["--time", "yesterday"], "is not a time", 2),
])
def test_restore_of_what_is_not_there(made: Store, tmp_path: Path, arguments: list[str], told: str, exit_code: int) -> None:
    """A clear error that lists what there is, and no directory is left."""
    assert told in reads(made, "--restore", str(tmp_path / "target"), *arguments, exit_code=exit_code).stderr
    assert not (tmp_path / "target").exists()


def test_restore_into_a_directory_that_is_not_empty(made: Store, tmp_path: Path) -> None:
    """Refused, and so are a file and a dangling link; nothing changes."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/nowhere")
    for name, told, code in (("full", "not empty", 2), ("file", "Not a directory", 1),
                             ("link", "leads through a symbolic link to /nowhere", 2)):
        assert told in reads(made, "--restore", str(tmp_path / name), exit_code=code).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]


def test_no_backups(store: Store) -> None:
    """All three say so, exit 1."""
    for arguments in (["--verify"], ["--list"], ["--restore", str(store.scratch / "target")]):
        assert "there is no complete backup" in store.backup(*arguments, exit_code=1).stderr


def test_rescue_is_no_time_for_manners(copy: Store) -> None:
    """A key that others can read is warned of, no more."""
    (copy.backups / "secret_key.txt").chmod(0o644)
    assert "chmod 600" in reads(copy, "--verify").stderr


@pytest.mark.parametrize("arguments", [
    ["--verify", "--list"], ["--list", "--full"], ["--compare"], ["--path", "x"], ["--time", "3D"], ["--restore"], ["--restore", ""],
    ["--verify", "--path", "x"], ["--verify", "--time", "3D"]])
def test_wrong_usage_of_commands(arguments: list[str]) -> None:
    """Exit 2, one sentence."""
    with pytest.raises(Failure, match="--help") as caught:
        backup.parse_arguments(arguments)
    assert caught.value.exit_code == 2


def test_manifest_that_names_no_volume(copy: Store) -> None:
    """That gpg opens it does not make it whole."""
    manifest = copy.manifests()[0]
    copy.run("gpg", "--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase-file", copy.backups / "secret_key.txt",
             "--output", copy.encrypted / manifest, "--symmetric", "/dev/null", environment={"GNUPGHOME": str(copy.gnupg())})
    assert f"{copy.encrypted / manifest} is damaged" in reads(copy, "--verify", exit_code=3).stderr


@pytest.mark.parametrize("instant", ["before", "meanwhile", "after"])
@pytest.mark.parametrize("name", ["target", "target/.restoring-*"])
def test_restore_where_others_can_rename(
    keyed: Store, first_night: FirstNight, name: str, instant: str
) -> None:
    """Who owns DIR, or what holds it, puts a link in its place: what that leads to is not touched."""
    first_night(keyed)
    target, precious = keyed.scratch / "target", keyed.scratch / "precious"
    precious.mkdir(mode=0o711)
    (precious / "private.pem").write_text("of root")
    (precious / "restored").mkdir()
    before = tree_of(precious)
    exchange = f"cd {keyed.scratch} && for it in {name}; do mv $it away; ln -s {precious} $it; done"
    run = {"before": f"({exchange}); exec REAL \"$@\"", "after": f"REAL \"$@\"; ({exchange})",
           "meanwhile": f"(sleep 0.25; {exchange}) & REAL \"$@\"; wait"}[instant]
    keyed.stand_in("duplicity", f"#!/bin/sh\n[ $1 = restore ] || exec REAL \"$@\"\n{run}\n")
    keyed.backup("--restore", str(target), "--path", "ssl", exit_code=None)
    (keyed.bin / "duplicity").unlink()
    assert (keyed.scratch / "away").exists() and tree_of(precious) == before
    assert list(keyed.scratch.glob("**/away/**/private.pem")) or (target / "private.pem").exists()


def test_restore_to_what_was_exchanged_at_once(keyed: Store, first_night: FirstNight) -> None:
    """The owner of DIR puts a directory of his own in place of root's before root has opened it."""
    first_night(keyed)
    line = "    with utils.opened(fresh, parent=place) as descriptor:\n"
    program = keyed.changed_program(line, (
        "    os.rename(fresh, 'away', src_dir_fd=place, dst_dir_fd=place)\n"
        f"    os.mkdir(fresh, dir_fd=place); os.chown(fresh, 65534, 65534, dir_fd=place)\n{line}"))
    target = keyed.scratch / "target"
    result = keyed.run(PYTHON, program, *keyed.command("--restore", str(target))[2:], exit_code=1)
    assert "somebody has put another directory in place of" in result.stderr
    assert not list(target.rglob("restored"))


@pytest.mark.parametrize("below", ["", "alice"])
def test_restore_follows_no_link(made: Store, tmp_path: Path, below: str) -> None:
    """A mail user may have put one where root is about to restore."""
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.mkdir()
    link.symlink_to(precious)
    before = tree_of(precious)
    errors = reads(made, "--restore", str(link / below), exit_code=2).stderr
    assert f"{link / below} leads through a symbolic link to {precious / below}; name that" in errors
    assert tree_of(precious) == before
    reads(made, "--restore", str(precious / below), "--path", "ssl")
    assert (precious / below / "private.pem").exists()


def test_gpg_that_is_killed_finds_no_damage(keyed: Store, first_night: FirstNight) -> None:
    """Neither by --verify nor by a night: nothing is to be moved aside for it."""
    first_night(keyed)
    before = (keyed.backups / "last-verify.json").read_text()
    keyed.stand_in("gpg", """#!/bin/sh
case $* in *--status-fd*) kill -9 $$;; esac
exec REAL "$@"
""")
    for option in ("--full", "--verify"):
        errors = keyed.backup(option, exit_code=1).stderr
        assert "gpg could not check" in errors and "damaged" not in errors
    assert (keyed.backups / "last-verify.json").read_text() == before


def test_restore_of_nothing_keeps_the_directory(made: Store, tmp_path: Path) -> None:
    """An empty directory that was there is there afterwards, whatever came of the restore; one that was made is not."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o1777)
    for name in ("there", "made"):
        assert "is not in the backup" in reads(made, "--restore", str(tmp_path / name), "--path", "no/such", exit_code=1).stderr
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o1777 and not (tmp_path / "made").exists()
    reads(made, "--restore", str(tmp_path / "there"), "--path", "ssl/private.pem")
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o1777


def test_backups_of_somebody_else(copy: Store) -> None:
    """STORAGE_USER can put a directory of its own in place of backup/: nothing of that is read."""
    os.chown(copy.backups, 65534, -1)
    assert "chown root" in reads(copy, "--list", exit_code=2).stderr
    os.chown(copy.backups, 0, -1)
    os.chown(copy.encrypted, 65534, -1)
    assert "may be somebody else's" in reads(copy, "--list").stderr


def test_odd_names(keyed: Store) -> None:
    """--list shows a name as it is, and as --path takes it; one that looks like a record of duplicity's log does not stop it."""
    name = "ssl/Einkäufe 娘 it's \\ odd"
    (keyed.root / name).write_text("found")
    (keyed.root / "a\n\"Mon Nov 22 (").touch()
    keyed.backup()
    listed = reads(keyed, "--list").stdout.splitlines()
    assert name in listed and len(listed) == len(tree_of(keyed.root))
    reads(keyed, "--restore", str(keyed.scratch / "target"), "--path", name)
    assert (keyed.scratch / "target" / os.path.basename(name)).read_text() == "found"


def test_paths_from_where_one_is(made: Store, tmp_path: Path) -> None:
    """A relative DIR is meant from the directory one is in; one that is gone is no obstacle."""
    script = 'cd "$1" && shift && rmdir "$1" 2> /dev/null; shift; exec "$@"'
    (tmp_path / "gone").mkdir()
    for place, leaving, arguments in (
        (tmp_path, "nothing", ["--restore", "here"]), (tmp_path / "gone", "../gone", ["--list"]),
    ):
        made.run("sh", "-c", script, "sh", place, leaving, PYTHON, SCRIPT, "--storage-root",
                 made.root, *arguments)
    assert tree_of(tmp_path / "here") == tree_of(made.root)


def test_last_run_that_names_no_set(copy: Store) -> None:
    """Rubbish in last-run.json is no set that is missing."""
    for rubbish in ('[1]', '5', '"../x"'):
        (copy.backups / "last-run.json").write_text(f'{{"newest_set": {rubbish}}}')
        assert reads(copy, "--verify").stderr == ""


@pytest.mark.parametrize("kind", ["manifest", "signatures"])
@pytest.mark.parametrize("damaged", [0, 2])
def test_restore_beside_damage(copy: Store, kind: str, damaged: int) -> None:
    """On a new machine, which has no cache/, only what the backup needs is read, and no signatures."""
    shutil.rmtree(copy.backups / "cache")
    sets = backup.complete_sets(copy.encrypted)
    path = copy.encrypted / (sets[damaged].manifest if kind == "manifest" else sets[damaged].signatures)
    path.write_bytes(path.read_bytes()[:-10])
    for number, found in enumerate(sets):
        target = copy.scratch / f"restored{number}"
        needed = kind == "manifest" and damaged <= number < 3
        reads(copy, "--restore", str(target), "--time", found.stamp, exit_code=1 if needed else 0)
        if not needed:
            assert {name for name in (MESSAGE, "file0", "file1") if (target / name).exists()} == (
                {MESSAGE}, {"file0"}, {"file0", "file1"}, {"file0", "file1"})[number]


@pytest.mark.parametrize("content", [b"", bytes(100), b"Hostname"], ids=["empty", "zeros", "cut"])
def test_restore_beside_damaged_manifests_in_cache(copy: Store, content: bytes) -> None:
    """A message would be missing, exit 0. Where encrypted/ has the damage they are of use."""
    sets = backup.complete_sets(copy.encrypted)
    notes = [copy.backups / "cache/backup" / Path(found.manifest).stem for found in sets]
    sound = notes[1].read_bytes()
    for path in notes:
        path.write_bytes(content)
    listed = reads(copy, "--list", "--time", sets[1].stamp).stdout.splitlines()
    assert "file0" in listed and "file1" not in listed
    reads(copy, "--restore", str(copy.scratch / "old"), "--time", sets[1].stamp)
    assert {"file0", "mail"} <= set(os.listdir(copy.scratch / "old"))
    assert notes[1].read_bytes() == content
    (copy.encrypted / sets[1].manifest).write_bytes(b"damaged")
    notes[1].write_bytes(sound)
    reads(copy, "--restore", str(copy.scratch / "again"), "--time", sets[1].stamp)
    assert tree_of(copy.scratch / "again") == tree_of(copy.scratch / "old")


@pytest.mark.parametrize("cached", ["sound", "cut", "missing"])
def test_restore_by_damaged_manifests(copy: Store, cached: str) -> None:
    """Only one that names all volumes is believed, else a backup would lack what is new, exit 0."""
    newest = backup.complete_sets(copy.encrypted)[2]
    notes = copy.backups / "cache/backup" / Path(newest.manifest).stem
    if cached == "cut":
        notes.write_text(notes.read_text().partition("Volume 1")[0])
    elif cached == "missing":
        notes.unlink()
    (copy.encrypted / newest.manifest).write_bytes(b"damaged")
    options = ["--restore", str(copy.scratch / "restored"), "--time", newest.stamp]
    told = reads(copy, *options, exit_code=0 if cached == "sound" else 1).stderr
    assert (f"{newest.manifest} cannot be used; put back your copy" in told) == (cached != "sound")
    later = backup.complete_sets(copy.encrypted)[3]  # that the damaged one be of the newest chain
    for path in copy.encrypted.glob(f"*{later.stamp}*"):
        path.unlink()
    reads(copy, "--verify", "--compare", exit_code=3)


def test_restore_without_a_volume(copy: Store) -> None:
    """Duplicity would not tell which: it is named, and what needs it not is restored."""
    found = backup.complete_sets(copy.encrypted)[2]
    (volume,) = (copy.encrypted / name for name in found.volumes)
    volume.unlink()
    options = ["--time", found.stamp, "--restore", str(copy.scratch / "restored")]
    told = copy.run(*copy.command(*options), exit_code=1).stderr
    assert f"{volume} is missing" in told and "duplicity restore failed" in told
    reads(copy, *options[:-1], str(copy.scratch / "part"), "--path", "ssl/private.pem")


def test_restore_beside_a_stray_volume(copy: Store) -> None:
    """One that no manifest names is no matter."""
    volume = next(copy.encrypted.glob("*inc*vol1*"))
    shutil.copyfile(volume, volume.with_name(volume.name.replace("vol1", "vol2")))
    reads(copy, "--restore", str(copy.scratch / "restored"), "--time",
          backup.complete_sets(copy.encrypted)[2].stamp)
    assert (copy.scratch / "restored" / "file1").exists()


def test_restore_by_another_file_in_place_of_a_manifest(copy: Store) -> None:
    """What the key opens need be no manifest: without it the backup would lack what is new."""
    newest = backup.complete_sets(copy.encrypted)[2]
    shutil.copyfile(copy.encrypted / newest.signatures, copy.encrypted / newest.manifest)
    place = str(copy.scratch / "restored")
    told = reads(copy, "--restore", place, "--time", newest.stamp, exit_code=1).stderr
    assert f"{newest.manifest} cannot be used; put back your copy" in told


def test_list_beside_damaged_notes(keyed: Store) -> None:
    """With flipped bits in cache/ names are missing from duplicity's list: it is read anew."""
    for number in range(40):
        (keyed.root / f"file{number}").write_bytes(os.urandom(1000))
    keyed.backup()
    listed = reads(keyed, "--list").stdout
    notes = next((keyed.backups / "cache/backup").glob("*.sigtar.gz"))
    good = notes.read_bytes()
    for place in range(len(good) // 4, len(good), len(good) // 4):
        damaged = bytearray(good)
        damaged[place] ^= 4
        notes.write_bytes(damaged)
        assert reads(keyed, "--list").stdout == listed
        assert notes.read_bytes() == damaged


def test_key_that_is_a_link(copy: Store) -> None:
    """One that leads to where the key lies is as good for reading as for the night."""
    key = copy.backups / "secret_key.txt"
    key.rename(copy.root / "key")
    key.symlink_to("../key")
    reads(copy, "--verify")


def test_nobody_takes_what_verify_prints(copy: Store) -> None:
    """What is damaged is told on standard error all the same."""
    (copy.encrypted / copy.manifests()[0]).write_bytes(b"damaged")
    for reader in ("> /dev/full", "| true"):
        result = copy.run("sh", "-c", f'"$@" {reader}', "sh", *copy.command("--verify"), exit_code=None)
        assert f"{copy.manifests()[0]} is damaged" in result.stderr
