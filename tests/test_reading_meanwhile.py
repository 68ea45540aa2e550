"""Reading while writing: neither a set without a manifest nor pruning is a reader's trouble.

And neither readers nor those who lock what they may read are a night's.
"""

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from conftest import USER, Entry, FirstNight, Store, copy_backups, make_store, tree_of
from test_services import programs_of, wait_for

MESSAGE = "mail/mailboxes/example.com/alice/new/170010.M1P1.host"
ADDED = "ssl/added"

# What is there, in this order, of a set that fills one volume and has no manifest yet.
VOLUME, SIGNATURES = 1, 2

# The real gpg, but once the target holds so many files what it is to encrypt next waits for as
# long as a file is there and duplicity lives, for a minute at most.
WAITING_GPG = """#!/bin/sh
case " $* " in *" --symmetric "*)
    if [ "$(ls {encrypted} | wc -l)" = {number} ]; then
        touch {scratch}/reached
        left=3000
        while [ -e {scratch}/reached ] && [ $((left -= 1)) -gt 0 ]; do
            kill -0 $PPID 2> {scratch}/gone || exit 9
            sleep 0.02
        done
    fi;;
esac
exec REAL "$@"
"""

# The real duplicity, but it stops itself before it restores anything.
STOPPED_DUPLICITY = """#!/bin/sh
if [ "$1" = restore ]; then
    echo "$GNUPGHOME" > {scratch}/home
    echo $$ > {scratch}/stopping
    mv {scratch}/stopping {scratch}/stopped
    kill -STOP $$
fi
exec REAL "$@"
"""


def change(store: Store) -> None:
    """Have a file come and a message go, so that one set cannot be taken for another."""
    (store.root / ADDED).write_text("added")
    (store.root / MESSAGE).unlink()


# Sets without a manifest: their run has been killed, or is still at work


@dataclass(frozen=True)
class Instant:
    """An instant of a backup. files: how many of the new set are there."""

    action: str
    files: int
    killed: bool

    def __str__(self) -> str:
        """Return what pytest shows."""
        files = {VOLUME: "volume", SIGNATURES: "signatures"}[self.files]
        return f"{'killed' if self.killed else 'going-on'}-{self.action}-with-{files}"


KILLED_FULL = Instant("full", SIGNATURES, killed=True)
INSTANTS = [
    KILLED_FULL,
    Instant("incremental", VOLUME, killed=True),
    Instant("full", VOLUME, killed=False),
    Instant("incremental", SIGNATURES, killed=False)]


@dataclass
class Unfinished:
    """A store with one complete set, of a tree, and another that has no manifest."""

    store: Store
    tree: dict[str, Entry]

    def assert_restores(self, name: str, *command: str) -> None:
        """Check that a command like --restore, put before it, brings the complete set back."""
        target = self.store.scratch / name
        self.store.run(*command, *self.store.command("--restore", str(target)))
        assert tree_of(target) == self.tree

    def assert_lists(self, *command: str) -> None:
        """Check that --list, after another command, tells what is in the complete set only."""
        listed = self.store.run(*command, *self.store.command("--list")).stdout.splitlines()
        assert len(listed) == len(self.tree)
        differing = set(listed) ^ set(self.tree)
        assert all("odd" in name for name in differing), differing  # that one is shown escaped


def begin_backup(store: Store, instant: Instant) -> "subprocess.Popen[str]":
    """Start a backup of what has changed, and return when it has come to an instant."""
    known = set(store.encrypted.iterdir())
    store.stand_in("gpg", WAITING_GPG.format(
        scratch=store.scratch, encrypted=store.encrypted, number=len(known) + instant.files))
    options = ["--full"] if instant.action == "full" else []
    process = subprocess.Popen(
        store.command(*options), env=store.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for((store.scratch / "reached").exists)
        (store.bin / "gpg").unlink()  # 3.2.1 encrypts something whatever it does, to try gpg
        made = sorted(path.name for path in set(store.encrypted.iterdir()) - known)
        assert len(made) == instant.files and "manifest" not in " ".join(made), made
    except BaseException:
        process.kill()
        end_backup(store, process)
        raise
    return process


def end_backup(store: Store, process: "subprocess.Popen[str]") -> str:
    """Let it go on to its end, and return what it printed."""
    (store.scratch / "reached").unlink(missing_ok=True)
    return process.communicate()[0]


def grouped(instant: Instant) -> ParameterSet:
    """Return an instant as a parameter: one process makes it, once, and runs all its tests."""
    return pytest.param(instant, id=str(instant), marks=pytest.mark.xdist_group(str(instant)))


@pytest.fixture(scope="module", params=[grouped(instant) for instant in INSTANTS])
def unfinished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
    first_night: FirstNight,
) -> Iterator[Unfinished]:
    """A store at such an instant; for readers only, who change nothing there."""
    instant: Instant = request.param
    store = make_store(tmp_path_factory.mktemp("unfinished"))
    first_night(store)
    tree = tree_of(store.root)
    change(store)
    process = begin_backup(store, instant)
    try:
        if instant.killed:
            process.kill()
            process.wait()
            wait_for(lambda: programs_of(store) == [])
        yield Unfinished(store, tree)
    finally:
        end_backup(store, process)
        store.clean()


def test_restore_is_of_the_newest_complete_set(unfinished: Unfinished) -> None:
    """It equals that set, with no night between that would throw the other away."""
    unfinished.assert_restores("restored")


def test_list_is_of_the_newest_complete_set(unfinished: Unfinished) -> None:
    """It has that set's files, all of them, and none of the other's."""
    unfinished.assert_lists()


def test_verify_calls_no_damage_what_is_unfinished(unfinished: Unfinished) -> None:
    """It says in a word what it met, and exits 0."""
    result = unfinished.store.backup("--verify")
    assert "unfinished" in result.stdout + result.stderr


def test_compare_is_with_the_newest_complete_set(unfinished: Unfinished) -> None:
    """What has changed since is told, and duplicity does not end with an error of its own."""
    result = unfinished.store.backup("--verify", "--compare", exit_code=3)
    assert ADDED in result.stderr and MESSAGE in result.stderr


def test_backup_that_is_read_meanwhile_is_made(keyed: Store, first_night: FirstNight) -> None:
    """It notices no reader: it ends in silence with exit 0, and restores."""
    first_night(keyed)
    change(keyed)
    process = begin_backup(keyed, Instant("full", SIGNATURES, killed=False))
    keyed.backup("--verify", exit_code=None)
    assert (end_backup(keyed, process), process.returncode) == ("", 0)
    keyed.assert_restores()


# Where nothing can be linked


NO_LINKS = ["strace", "--seccomp-bpf", "-f", "-qq", "-o", "/dev/null",
            "-e", "trace=link,linkat", "-e", "inject=link,linkat:error=EPERM"]


@pytest.mark.parametrize("unfinished", [grouped(KILLED_FULL)], indirect=True)
@pytest.mark.parametrize("disk", ["read-only", "without-links"])
def test_disk_that_takes_no_links(unfinished: Unfinished, disk: str) -> None:
    """A rescue lists and restores the newest complete set, and leaves nothing behind."""
    store = unfinished.store
    temporary = store.scratch / f"temporary-{disk}"
    temporary.mkdir()
    command = ["env", f"TMPDIR={temporary}", *(NO_LINKS if disk == "without-links" else [])]
    if disk == "read-only":
        store.run("mount", "--bind", store.backups, store.backups)
        store.run("mount", "-o", "remount,bind,ro", store.backups)
    try:
        unfinished.assert_lists(*command)
        unfinished.assert_restores(disk, *command)
    finally:
        if disk == "read-only":
            store.run("umount", store.backups)
    assert [*temporary.iterdir(), *store.backups.glob("reader-*")] == []


def test_no_temporary_directory_can_be_had(keyed: Store, first_night: FirstNight) -> None:
    """Where only the disk of backup/ has room that is enough for a rescue."""
    first_night(keyed)
    keyed.run("env", "-u", "TMPDIR", "unshare", "--mount", "sh", "-c", """\
for place in /tmp /var/tmp; do
    mount --bind $place $place && mount -o remount,bind,ro $place || exit 9
done
mount --bind "$0" "$0" && mount -o remount,bind,rw "$0" && cd /proc && exec "$@"
""", keyed.root, *keyed.command("--list"))


# Nights that prune


@pytest.fixture(scope="module")
def old_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with a full and an incremental that are old enough to go. Never written to."""
    store = make_store(tmp_path_factory.mktemp("old-chain"))
    store.put_key()
    store.run("faketime", "6 days ago", *store.command())
    (store.root / "ssl/of-old").write_text("of old")
    store.run("faketime", "5 days ago", *store.command())
    yield store
    store.clean()


@pytest.fixture
def pruning(keyed: Store, old_chain: Store) -> Store:
    """A store whose next full backup has that chain pruned."""
    copy_backups(old_chain, keyed)
    return keyed


@dataclass
class StoppedReader:
    """A --restore that is stopped, its duplicity too. home: its gpg's, directory: its own."""

    store: Store
    target: Path
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        scratch, there = self.store.scratch, set(self.store.backups.iterdir())
        (scratch / "stopped").unlink(missing_ok=True)
        self.store.stand_in("duplicity", STOPPED_DUPLICITY.format(scratch=scratch))
        self.process = subprocess.Popen(
            self.store.command("--restore", str(self.target), *self.options),
            env=self.store.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True)
        wait_for((scratch / "stopped").exists)
        self.process.send_signal(signal.SIGSTOP)
        (self.store.bin / "duplicity").unlink()
        self.duplicity = int((scratch / "stopped").read_text())
        self.home = Path((scratch / "home").read_text().strip())
        (self.directory,) = set(self.store.backups.iterdir()) - there
        assert self.home.is_dir()

    def kill(self) -> None:
        """Kill it; duplicity dies with it."""
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not Path("/proc", str(self.duplicity)).exists())

    def remove(self) -> None:
        """Leave nothing in /run, whatever came of a test."""
        self.kill()
        shutil.rmtree(self.home, ignore_errors=True)

    def go_on(self) -> None:
        """Let it restore, and check that it exits 0."""
        for process in (self.duplicity, self.process.pid):
            os.kill(process, signal.SIGCONT)
        errors = self.process.communicate()[1]
        assert self.process.returncode == 0, errors


def test_what_is_pruned_meanwhile_is_restored(pruning: Store, old_chain: Store) -> None:
    """A night deletes the sets that a restore is about to read: both do it, and exit 0."""
    old = set(pruning.encrypted.iterdir())
    change(pruning)
    reader = StoppedReader(pruning, pruning.scratch / "restored", ["--time", "4D"])
    try:
        pruning.backup("--full")
        assert len(old) == 6 and not old & set(pruning.encrypted.iterdir())
        reader.go_on()
    finally:
        reader.remove()
    assert tree_of(reader.target) == tree_of(old_chain.root)


def test_directory_of_a_dead_reader_goes_and_that_of_a_living_one_stays(
    keyed: Store, first_night: FirstNight
) -> None:
    """So does gpg's home in /run; the living one restores what it was asked for.

    Something else that an admin has put into backup/ is no reader's, and stays.
    """
    first_night(keyed)
    tree = tree_of(keyed.root)
    dead = StoppedReader(keyed, keyed.scratch / "dead")
    dead.kill()
    assert dead.directory.is_dir() and dead.home.is_dir()
    (keyed.backups / "reader-notes").mkdir()  # no reader's
    (keyed.backups / "reader-filefile").touch()
    (keyed.backups / "reader-linklink").symlink_to(keyed.root)
    living = StoppedReader(keyed, keyed.scratch / "living")
    try:
        change(keyed)
        keyed.backup()
        places = [dead.directory, dead.home, living.directory, living.home]
        assert [place.exists() for place in places] == [False, False, True, True]
        assert len(list(keyed.backups.glob("reader-*"))) == 4
        living.go_on()
        assert not living.directory.exists() and not living.home.exists()
    finally:
        living.remove()
        dead.remove()
    assert tree_of(living.target) == tree


# Locks


def test_locks_keep_neither_a_night_nor_a_reader(pruning: Store) -> None:
    """One of STORAGE_USER's group locks all that the group can open.

    Sets are listed, old ones pruned and dead ones thrown away, and there is not a word of it.
    """
    user, lock = pwd.getpwnam(USER), ["flock", "--no-fork", "--exclusive"]
    holder = subprocess.Popen(
        [*lock, pruning.backups, *lock, pruning.encrypted, "sh", "-c", "echo; exec sleep 1000"],
        user=user.pw_uid, group=user.pw_gid, extra_groups=[], cwd="/", stdout=subprocess.PIPE)
    try:
        assert holder.stdout and holder.stdout.readline()
        assert pruning.backup("--list").stderr == ""
        begun = datetime.now(timezone.utc) - timedelta(minutes=1)
        dead = pruning.encrypted / f"duplicity-full.{begun:%Y%m%dT%H%M%SZ}.vol1.difftar.gpg"
        dead.touch()
        old = set(pruning.encrypted.iterdir())
        assert pruning.backup("--full").stderr == ""
        assert len(old) == 7 and not old & set(pruning.encrypted.iterdir())
    finally:
        holder.kill()
        holder.communicate()


def test_reader_whose_place_is_exchanged(keyed: Store, first_night: FirstNight) -> None:
    """STORAGE_USER gives backup/ its name meanwhile, and puts a link there: backup/ stays."""
    first_night(keyed)
    before = tree_of(keyed.backups, "")
    keyed.stand_in("gpg", f"""#!/bin/sh
if [ -d {keyed.backups}/cache ] && [ ! -L {keyed.backups} ]; then
    own=$(basename {keyed.backups}/reader-*)
    mv {keyed.backups} {keyed.root}/$own && ln -s . {keyed.backups}
fi
exec REAL "$@"
""")
    keyed.backup("--verify")
    (moved,) = keyed.root.glob("reader-*")
    assert tree_of(moved, "").keys() == before.keys()


def test_chain_that_is_being_pruned_is_no_damage(pruning: Store) -> None:
    """duplicity deletes an old chain file by file: at each instant --verify is content."""
    old = list(pruning.encrypted.iterdir())
    cached = list((pruning.backups / "cache/backup").iterdir())
    pruning.stand_in(
        "duplicity", "#!/bin/sh\ncase $1 in remove*|cleanup) ;; *) exec REAL \"$@\";; esac\n")
    pruning.backup("--full")
    order = sorted(old, key=lambda path: (".sigtar" not in path.name, ".to." not in path.name,
                                          ".manifest" not in path.name))
    for path in order + cached:
        path.unlink()
        assert pruning.backup("--verify").stderr == ""


def test_disk_that_has_no_links(keyed: Store, first_night: FirstNight) -> None:
    """As of a FAT file system, on a disk for other machines, too: the links are made elsewhere."""
    first_night(keyed)
    refuse = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=symlink:error=EPERM:when=1"]
    keyed.run(*refuse, *keyed.command("--restore", str(keyed.scratch / "restored")))
    assert tree_of(keyed.scratch / "restored") == tree_of(keyed.root)
