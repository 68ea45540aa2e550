"""The mirror in two passes: whatever happens to a tree meanwhile, the mirror equals it afterwards.

Only sockets are not in it.
"""

import contextlib
import itertools
import mmap
import os
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, BinaryIO, Optional, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies

import utils
from backup import may_link
from conftest import Store, tree_of

PLACES = ["", "box", "box/cur", "box/new", "box/tmp", "box/cur/deep", "plain", "plain/deep",
          "migrated_unencrypted_backup"]
NAMES = ["17001.M1P1.host:2,S", "17002.M2P2.host:2,", "index", "\udcff\n\\name", "deep", "tmp"]
Change = tuple[str, str, str, int]
Status = tuple[int, ...]


# Changes to a tree


def opened(path: Path, mode: str) -> BinaryIO:
    """Open a file; a fifo is an error, not something to wait for."""
    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK, 0o644)

    return cast(BinaryIO, open(path, mode, opener=opener))


def write(path: Path, other: Path, number: int) -> None:
    with opened(path, "wb") as stream:
        stream.write(b"%d" % number * number)


def append(path: Path, other: Path, number: int) -> None:
    with opened(path, "ab") as stream:
        stream.write(b"more")


def rewrite_unseen(path: Path, other: Path, number: int) -> None:
    """Rewrite in place, with the size and mtime put back: only the ctime tells."""
    status = path.lstat()
    with opened(path, "r+b") as stream:
        stream.write(bytes([number]) * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rename(path: Path, other: Path, number: int) -> None:
    path.rename(other)


def rename_unseen(path: Path, other: Path, number: int) -> None:
    """Rename with the mtimes of both directories put back."""
    before = {directory: directory.stat().st_mtime_ns for directory in (path.parent, other.parent)}
    path.rename(other)
    for directory, mtime in before.items():
        os.utime(directory, ns=(mtime, mtime))


def delete(path: Path, other: Path, number: int) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_directory(path: Path, other: Path, number: int) -> None:
    if path.is_file():
        path.unlink()
    path.mkdir()
    (path / "inside").write_text("inside")


def directory_to_file(path: Path, other: Path, number: int) -> None:
    if path.is_dir():  # rmtree would wait for the other end of a fifo
        shutil.rmtree(path)
        path.write_text("was a directory")


def change_mode(path: Path, other: Path, number: int) -> None:
    if not path.is_symlink():
        path.chmod([0o600, 0o644, 0o4755, 0o2770][number % 4])


def change_owner(path: Path, other: Path, number: int) -> None:
    os.chown(path, number, number + 1, follow_symlinks=False)


def link_to(path: Path, other: Path, number: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        delete(path, other, number)
    path.symlink_to(["/proc/self/fdinfo", "cur", "\udcff", "/proc/nowhere"][number % 4])


def hard_link(path: Path, other: Path, number: int) -> None:
    os.link(path, other)


def sparse(path: Path, other: Path, number: int) -> None:
    with opened(path, "wb") as stream:
        stream.truncate(1 << 20)
        stream.seek(number << 12)
        stream.write(b"data")


def fifo(path: Path, other: Path, number: int) -> None:
    os.mkfifo(path, 0o600 + number % 8)


def listen(path: Path, other: Path, number: int) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fsencode(path))


def swap(path: Path, other: Path, number: int) -> None:
    """Exchange two entries, such as mailboxes."""
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def store(path: Path, other: Path, number: int) -> None:
    """Write through a mapping, as databases do."""
    with opened(path, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as page:
        page[0] = number


def change_times(path: Path, other: Path, number: int) -> None:
    os.utime(path, (number, number * 1000), follow_symlinks=False)


KINDS: dict[str, Callable[[Path, Path, int], None]] = {function.__name__: function for function in (
    write, append, rewrite_unseen, rename, rename_unseen, delete, make_directory,
    directory_to_file, change_mode, change_owner, link_to, hard_link, sparse, fifo, listen, swap,
    store, change_times)}
PATHS = strategies.sampled_from(
    [os.path.join(place, name) for place in PLACES for name in NAMES] + PLACES[1:])
CHANGES: strategies.SearchStrategy[Change] = strategies.tuples(
    strategies.sampled_from(sorted(KINDS)), PATHS, PATHS, strategies.integers(1, 50))


def apply(root: Path, change: Change) -> None:
    """Make a change; one that is not possible as the tree is now changes nothing."""
    kind, path, other, number = change
    with contextlib.suppress(OSError, ValueError, shutil.Error):
        KINDS[kind](root / path, root / other, number)


def grow(root: Path) -> None:
    """Make a tree with a Maildir and something of each kind in it."""
    for place in PLACES[1:]:
        (root / place).mkdir(parents=True)
    filled = ("box", "box/cur", "box/new", "plain", "migrated_unencrypted_backup")
    for number, (place, name) in enumerate(itertools.product(filled, NAMES[:3])):
        (root / place / name).write_bytes(b"%d" % number * 20)
    (root / "plain/link").symlink_to("index")


EVENTS = {"open", "os.listdir", "os.scandir", "os.link", "os.mkdir", "os.chown", "os.utime"}


class Meddler:
    """Makes changes amid whatever opens, lists, links or makes files.

    Each comes at its count of such events.
    """

    def __init__(self) -> None:
        self.root: Optional[Path] = None
        self.plan: dict[int, Change] = {}
        self.count = 0
        sys.addaudithook(self.on_event)

    def on_event(self, event: str, _arguments: object) -> None:
        """Take an audit event of Python's."""
        if self.root and event in EVENTS:
            self.count += 1
            if self.count in self.plan:
                root, self.root = self.root, None
                apply(root, self.plan[self.count])
                self.root = root

    @contextlib.contextmanager
    def at_work(self, root: Path, plan: dict[int, Change]) -> Iterator[None]:
        """Meddle while the block runs."""
        self.root, self.plan, self.count = root, plan, 0
        try:
            yield
        finally:
            self.root = None


MEDDLER = Meddler()


def statuses(root: Path) -> dict[str, Status]:
    """Return of each entry what nothing but its owner may change; times in whole nanoseconds."""
    found: dict[str, Status] = {}
    for path in [root, *root.rglob("*")]:
        status = path.lstat()
        found[str(path.relative_to(root))] = (
            status.st_ino, status.st_mode, status.st_uid, status.st_gid, status.st_size,
            status.st_mtime_ns)
    return found


def times_of(root: Path) -> dict[str, int]:
    """Return the mtime of each entry that is to be in a backup."""
    return {path: status[5] for path, status in statuses(root).items()
            if path.split("/")[0] != "backup" and not stat.S_ISSOCK(status[1])}


def assert_equal(mirror: utils.Mirror) -> None:
    """Check that a mirror is what a backup of the tree must hold, and count_entries agrees.

    mtimes are compared to the nanosecond; that of a file written just now may be a second earlier
    in a copy, never in a link.
    """
    assert tree_of(mirror.target, "") == tree_of(mirror.source)
    times, copied = times_of(mirror.source), times_of(mirror.target)
    for path, mtime in times.items():
        name = os.fsencode(path)
        if copied[path] == mtime - 10**9 and mtime > (time.time() - 3600) * 1e9 and (
                (mirror.target / path).is_file() and not (mirror.target / path).is_symlink()):
            assert not (mirror.target / path).samefile(mirror.source / path), name
            copied[path] = mtime
    assert times == copied and mirror.unread == {}
    assert utils.count_entries(mirror.target) == len(times)
    assert utils.count_entries(mirror.source, [mirror.source / "backup"]) == len(times)


@contextlib.contextmanager
def mirrored(root: Path, place: Path, spare_bytes: int = 0) -> Iterator[utils.Mirror]:
    """Make the first pass, and keep the mirror while the block runs."""
    place.mkdir(mode=0o700)
    place = Path(os.path.relpath(place))  # as in a run, which nobody can rename away
    with utils.mirror_of(root, place, frozenset({"backup"}), may_link, spare_bytes) as mirror:
        yield mirror
        (place / "tree").rename(place / "kept")  # the tests look at it afterwards, too
    (place / "kept").rename(place / "tree")


@pytest.fixture(scope="module", params=["ext4", "xfs", "btrfs"])
def volume(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A disk with a file system of each kind."""
    image, place = (tmp_path_factory.mktemp(request.param) / name for name in ("image", "mounted"))
    place.mkdir()
    commands: list[list[str | Path]] = [
        ["truncate", "-s", "600M", image], [f"mkfs.{request.param}", "-q", image],
        ["mount", "-o", "loop", image, place]]
    for command in commands:
        subprocess.run(command, check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=strategies.lists(CHANGES, max_size=12),
       during=strategies.dictionaries(strategies.integers(1, 150), CHANGES, max_size=6),
       between=strategies.lists(CHANGES, max_size=12), later=strategies.lists(CHANGES, max_size=4),
       short_pass=strategies.sampled_from([0, 1]), same_times=strategies.booleans())
def test_mirror_equals_the_tree(
    volume: Path, before: list[Change], during: dict[int, Change], between: list[Change],
    later: list[Change],
    short_pass: int, same_times: bool
) -> None:
    """Random changes before, amid and after the first pass: the second makes the mirror equal.

    So does the third again, and nothing of the tree is touched. short_pass: in seconds; no first
    pass is shorter than 0, so that it is repeated. same_times: whether all mtimes are one, as after
    a restore.
    """
    place = Path(tempfile.mkdtemp(dir=volume))
    root = place / "tree"
    grow(root)
    for change in before:
        apply(root, change)
    if same_times:
        for path in root.rglob("*"):
            os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    time.sleep(0.03)
    with pytest.MonkeyPatch.context() as patch:
        # On a busy disk it takes seconds; each store above is by a new mapping.
        patch.setattr(utils, "sync", lambda *paths: None)
        patch.setattr(utils, "SETTLED_SECONDS", 0.02)
        patch.setattr(utils, "SHORT_PASS_SECONDS", short_pass)
        stack = contextlib.ExitStack()
        with MEDDLER.at_work(root, during):
            mirror = stack.enter_context(mirrored(root, place / "copy"))
    with stack:
        for changes in (between, later):
            for change in changes:
                apply(root, change)
            found = statuses(root)
            utils.update_mirror(mirror)
            assert_equal(mirror)
            assert statuses(root) == found
    shutil.rmtree(place)


def test_swapped_mailboxes(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two users, or one user's folders, change names; files alike are not taken for each other's.

    They are of one size and mtime.
    """
    place = Path(tempfile.mkdtemp(dir=volume))
    root = place / "tree"
    for user in ("alice", "bob"):
        for folder in ("one", "two"):
            for name in ("cur", "new", "tmp"):
                (root / user / folder / name).mkdir(parents=True)
            for name in ("index", "cur/message"):
                (root / user / folder / name).write_text(f"{user} {folder}"[-7:])
    for path in root.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    time.sleep(0.1)
    monkeypatch.setattr(utils, "SETTLED_SECONDS", 0.05)
    with mirrored(root, place / "copy") as mirror:
        for one, other in (("alice", "bob"), ("alice/one", "alice/two")):
            swap(root / one, root / other, 0)
            for path in (root, root / "alice", root / "bob"):
                os.utime(path, (1_600_000_000, 1_600_000_000))
            utils.update_mirror(mirror)
            assert_equal(mirror)


def test_what_is_left_out(tmp_path: Path) -> None:
    """It is at no depth in the mirror, and a Maildir without its tmp is one still: of links."""
    root = tmp_path / "tree"
    grow(root)
    message = f"box/cur/{NAMES[0]}"
    excluded = {"box/tmp", message, "box/cur/deep", "plain/deep", "plain/index", "no/such"}
    with utils.mirror_of(root, tmp_path / "copy", excluded, may_link, 0) as mirror:
        for again in (False, True):
            left = [path for path in excluded if os.path.lexists(mirror.target / path)]
            assert left == [] and not again or (mirror.target / "plain/new").exists()
            assert (mirror.target / "box/cur" / NAMES[1]).samefile(root / "box/cur" / NAMES[1])
            (root / message).write_text("again")
            (root / "plain/deep/file").touch()
            (root / "plain/new").touch()
            utils.update_mirror(mirror)


def test_messages_are_links_and_nothing_else_is(tmp_path: Path) -> None:
    """Files in cur, new and the layout of old are links; others are copies without holes."""
    root = tmp_path / "tree"
    grow(root)
    sparse(root / "plain/sparse", root, 3)
    with mirrored(root, tmp_path / "copy") as mirror:
        pass
    copy = mirror.target
    linked = [path.relative_to(root) for path in root.rglob("*")
              if path.is_file() and not path.is_symlink()
              and (copy / path.relative_to(root)).samefile(path)]
    assert {str(path.parent) for path in linked} == {
        "box/cur", "box/new", "migrated_unencrypted_backup"}
    assert len(linked) == 9
    blocks = (root / "plain/sparse").stat().st_blocks
    assert (copy / "plain/sparse").stat().st_blocks <= blocks <= 16


@pytest.mark.parametrize("place", ["plain", "box/cur"])
def test_pass_is_interrupted_within_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """However many entries are put into it, or deleted, when mail stops, and however fast."""
    root = tmp_path / "tree"
    grow(root)
    files = [root / place / str(number) for number in range(10_000)]
    before = signal.signal(signal.SIGALRM, lambda *_: utils._on_signal(signal.SIGTERM, None))

    def update_and_be_interrupted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(utils._Signals, "came", None)
            patch.setattr(utils._Signals, "raised", False)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(utils.Interrupted):
                utils.update_mirror(mirror)

    try:
        with mirrored(root, tmp_path / "copy") as mirror:
            for file in files:
                file.touch()
            update_and_be_interrupted()
            utils.update_mirror(mirror)
            for file in files:
                file.unlink()
            update_and_be_interrupted()
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("always_long", [False, True])
def test_long_first_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always_long: bool
) -> None:
    """What changed while a first pass took long is caught up with before the second.

    That goes on as long as it takes less and less time.
    """
    root, place = tmp_path / "tree", tmp_path / "copy"
    grow(root)
    place.mkdir(mode=0o700)
    begun: list[None] = []

    def begin_pass(*_paths: Path) -> None:
        begun.append(None)
        append(root / "plain/index", root, 0)

    def take_long(path: str, siblings: Set[str]) -> bool:
        if path == "box" and (always_long or len(begun) == 1):
            time.sleep(0.3)
        return may_link(path, siblings)

    monkeypatch.setattr(utils, "sync", begin_pass)
    monkeypatch.setattr(utils, "SHORT_PASS_SECONDS", 0.2)
    with utils.mirror_of(root, place, frozenset({"backup"}), take_long, 0) as mirror:
        assert len(begun) == 2
        assert_equal(mirror)


@pytest.mark.parametrize("exchanged", [False, True])
def test_directory_that_goes_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """What is away during a pass, or stands for another meanwhile, is mirrored anew when back.

    It is so though nothing in it has changed.
    """
    root = tmp_path / "tree"
    grow(root)
    for name in ("cur", "new", "tmp"):
        (tmp_path / "other" / name).mkdir(parents=True)
    time.sleep(0.05)
    monkeypatch.setattr(utils, "SETTLED_SECONDS", 0.02)
    with mirrored(root, tmp_path / "copy") as mirror:
        # it would not be listed
        note = utils._note_of((root / "box/new").stat(), True)
        assert (mirror.target / "box/new").stat().st_atime_ns == note
        (root / "box").rename(tmp_path / "away")
        if exchanged:
            (tmp_path / "other/new/message").touch()
            (tmp_path / "other").rename(root / "box")
        utils.update_mirror(mirror)
        assert_equal(mirror)
        if exchanged:
            (root / "box").rename(tmp_path / "other")
        (tmp_path / "away").rename(root / "box")
        utils.update_mirror(mirror)
        assert_equal(mirror)


def test_journal_that_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beside it, or below, is not copied once more for that, while mail is down."""
    def copy_file(_mirror: utils.Mirror, name: str, *_descriptors: int) -> None:
        raise AssertionError(f"{name} was copied")

    root = tmp_path / "tree"
    grow(root)
    for name in ("plain/deep/index", "box/cur/deep/index"):
        (root / name).touch()
    for path in root.rglob("*"):
        os.utime(path, (0, 0), follow_symlinks=False)
    time.sleep(0.05)
    monkeypatch.setattr(utils, "SETTLED_SECONDS", 0.02)
    with mirrored(root, tmp_path / "copy") as mirror:
        monkeypatch.setattr(utils, "_copy_file", copy_file)
        (root / "plain/journal").touch()
        (root / "plain/journal").unlink()
        assert len(list(mirror.target.rglob("*"))) > 10  # as du does, or a virus scanner
        utils.update_mirror(mirror)
        assert_equal(mirror)


def test_directory_that_is_no_maildir_any_more(tmp_path: Path) -> None:
    """Its files may be rewritten in place from now on: their links become copies."""
    root = tmp_path / "tree"
    grow(root)
    with mirrored(root, tmp_path / "copy") as mirror:
        assert (mirror.target / "box/new" / NAMES[0]).samefile(root / "box/new" / NAMES[0])
        time.sleep(0.05)
        mirror.settled_ns = time.time_ns()  # as after a pass that took long
        (root / "box/tmp").rmdir()
        utils.update_mirror(mirror)
        assert_equal(mirror)
        assert not (mirror.target / "box/new" / NAMES[0]).samefile(root / "box/new" / NAMES[0])


def test_store_through_mmap_after_the_first_pass(tmp_path: Path) -> None:
    """A store to a page that was dirty before the first pass is seen by the second.

    Time stamps told of it only before.
    """
    root = tmp_path / "tree"
    grow(root)
    with (root / "plain/index").open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as page:
        page[0] = 1
        time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utils, "SETTLED_SECONDS", 0.05)
            with mirrored(root, tmp_path / "copy") as mirror:
                page[0] = 2
                utils.update_mirror(mirror)
        assert (mirror.target / "plain/index").read_bytes()[0] == 2
        assert_equal(mirror)


@contextlib.contextmanager
def disk(
    store: Store, *mkfs: str, size: str = "64M", place: Optional[Path] = None
) -> Iterator[Path]:
    """Mount a new file system of a file, by default beside the tree, while the block runs."""
    image, place = store.scratch / "disk", place or store.scratch / "mounted"
    place.mkdir(exist_ok=True)
    store.run("truncate", "-s", size, image)
    store.run(*mkfs, image)
    store.run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        store.run("umount", place)
        image.unlink()


def damage_inodes(store: Store, place: Path, numbers: list[int]) -> None:
    """Have the disk at a place tell nothing of some inodes, by their numbers.

    Another namespace may have it mounted still, so a copy takes its place. It must have no journal,
    which would mend them, and checksums.
    """
    damaged = store.scratch / "damaged-disk"
    store.run("sync", "--file-system", place)
    store.run("umount", place)
    store.run("cp", store.scratch / "disk", damaged)
    for number in numbers:
        store.run("debugfs", "-w", "-R", f"set_inode_field <{number}> checksum 0x1234", damaged)
    store.run("mount", "-o", "loop", damaged, place)


def test_time_stamps_of_a_second(store: Store) -> None:
    """Where all changes of a second bear one time stamp, what is rewritten then counts as changed.

    So it is on ext4 with small inodes.
    """
    with disk(store, "mkfs.ext4", "-q", "-I", "128") as place:
        missed = []
        for attempt in range(3):
            root = place / f"tree{attempt}"
            grow(root)
            with mirrored(root, place / f"copy{attempt}") as mirror:
                before = (root / "plain/index").stat()
                rewrite_unseen(root / "plain/index", root, 7)
                rename_unseen(root / "box/cur" / NAMES[0], root / "box/cur/renamed", 0)
                missed.append((root / "plain/index").stat().st_ctime_ns == before.st_ctime_ns)
                utils.update_mirror(mirror)
            assert_equal(mirror)
        assert any(missed), "the time stamps are finer than a second: the test proves nothing"


def test_damaged_entries(store: Store) -> None:
    """What the disk cannot tell anything of is named, be it a message; the rest is there."""
    bad = ["plain/index", f"box/cur/{NAMES[0]}", "plain/deep", "box/new"]
    with disk(store, "mkfs.ext4", "-q", "-O", "metadata_csum,^has_journal") as place:
        root = place / "tree"
        grow(root)
        damage_inodes(store, place, [(root / path).stat().st_ino for path in bad])
        with mirrored(root, place / "copy") as mirror:
            for _ in range(2):
                assert mirror.unread == dict.fromkeys(bad, "Bad message")
                there = {str(path.relative_to(mirror.target)) for path in mirror.target.rglob("*")}
                assert {"box/cur", "box/tmp", "plain/link", f"box/cur/{NAMES[1]}"} <= there
                assert there.isdisjoint(bad)
                utils.update_mirror(mirror)


@pytest.mark.parametrize("mkfs", [("mkfs.xfs", "-q"), ("mkfs.btrfs", "-q")])
def test_clone(store: Store, mkfs: tuple[str, ...]) -> None:
    """Where the file system can share blocks a copy takes no room, and asks for none."""
    with disk(store, *mkfs, size="512M") as place:
        root = place / "tree"
        grow(root)
        (root / "plain/big").write_bytes(os.urandom(1_000_000) * 260)  # two of these do not fit
        os.sync()
        with mirrored(root, place / "copy", 150_000_000) as mirror:
            os.sync()
            assert tree_of(mirror.target, "") == tree_of(root)
            (root / "plain/big").write_bytes(b"changed")
            utils.update_mirror(mirror)
        assert_equal(mirror)


@pytest.mark.parametrize("mkfs", [("mkfs.ext4", "-q"), ("mkfs.xfs", "-q"), ("mkfs.btrfs", "-q")])
def test_entries_that_change_between_the_passes(
    store: Store, monkeypatch: pytest.MonkeyPatch, mkfs: tuple[str, ...]
) -> None:
    """What is made, renamed or removed at the top or below is in the copy as it is in the tree."""
    with disk(store, *mkfs, size="512M") as place:
        root = place / "tree"
        grow(root)
        for directory in (root, root / "plain", root / "box/cur"):
            for name in ("stays", "old", "goes"):
                (directory / name).write_text(name)
        monkeypatch.setattr(utils, "SETTLED_SECONDS", 0.2)
        time.sleep(0.4)
        with mirrored(root, place / "copy") as mirror:
            names = {"first": ("old", "older", "goes"), "second": ("older", "oldest", "stays")}
            for changes in names:
                for directory in (root, root / "plain", root / "box/cur"):
                    (directory / f"made {changes}").write_text(changes)
                    old, new, gone = names[changes]
                    (directory / old).rename(directory / new)
                    (directory / gone).unlink()
                utils.update_mirror(mirror)
                assert_equal(mirror)


def test_no_room(store: Store) -> None:
    """Where room is short nothing is copied; where the disk fills all the same it is said."""
    with disk(store, "mkfs.ext4", "-q", "-m", "0") as place:
        root = place / "tree"
        grow(root)
        (root / "plain/big").write_bytes(os.urandom(20_000_000))
        free = shutil.disk_usage(place).free
        spare = free - 19_000_000
        with pytest.raises(utils.Failure, match="No space left"):
            with mirrored(root, place / "copy", spare):
                raise AssertionError("there is no room for it")
        assert shutil.disk_usage(place).free >= spare
        with mirrored(root, place / "second") as mirror:
            (root / "plain/big2").write_bytes(os.urandom(shutil.disk_usage(place).free - 5_000_000))
            with pytest.raises(utils.Failure, match="No space left"):
                utils.update_mirror(mirror)


@pytest.mark.parametrize("free", [40, 400])
def test_few_inodes(store: Store, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Mail needs the last ones more than a copy does, be it of many files in one directory."""
    def copy_file(*arguments: Any) -> os.stat_result:
        status = real_copy_file(*arguments)
        assert os.statvfs(place).f_favail >= 1024 // 20 - 1
        return status

    real_copy_file = utils._copy_file
    monkeypatch.setattr(utils, "_copy_file", copy_file)
    with disk(store, "mkfs.ext4", "-q", "-N", "1024") as place:
        root = place / "tree"
        grow(root)
        for number in range(os.statvfs(place).f_favail - free):
            (root / f"plain/{number}").touch()
        with pytest.raises(utils.Failure, match="few inodes"):
            with mirrored(root, place / "copy", 1):
                raise AssertionError("there are too few for it")


def test_file_that_is_shortened_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is copied as far as it goes, and not taken for one that is gone."""
    root = tmp_path / "tree"
    grow(root)
    seek = os.lseek

    def shorten(descriptor: int, position: int, how: int) -> int:
        if how == os.SEEK_HOLE:
            os.truncate(f"/proc/self/fd/{descriptor}", 0)
        return seek(descriptor, position, how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lseek", shorten)
        with mirrored(root, tmp_path / "copy") as mirror:
            assert tree_of(mirror.target, "").keys() == tree_of(root).keys()
            assert mirror.unread == {}


def test_another_file_system_inside(store: Store) -> None:
    """A mount inside the tree is never followed: neither pass makes a mirror then."""
    root = store.scratch / "tree"
    grow(root)
    inside = root / "plain/deep"
    refused = pytest.raises(utils.Failure, match="not on the same file system")
    with disk(store, "mkfs.ext4", "-q", place=inside):
        with refused, mirrored(root, store.scratch / "copy"):
            raise AssertionError("there can be no mirror")
    with mirrored(root, store.scratch / "second") as mirror:
        with disk(store, "mkfs.ext4", "-q", place=inside), refused:
            utils.update_mirror(mirror)


def test_files_that_cannot_be_linked_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that refuses links is copied; a file that cannot be read is told of.

    In neither pass it is a reason to stop.
    """
    root = tmp_path / "tree"
    grow(root)

    def refuse(*_arguments: object, **_options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with mirrored(root, tmp_path / "copy") as mirror:
            utils.update_mirror(mirror)
        assert_equal(mirror)
    real = utils._copy_data

    def fail(source: int, target: int, size: int) -> None:
        if os.readlink(f"/proc/self/fd/{source}").endswith("plain/index"):
            raise OSError(5, "Input/output error")
        real(source, target, size)

    monkeypatch.setattr(utils, "_copy_data", fail)
    with mirrored(root, tmp_path / "second") as mirror:
        assert mirror.unread == {"plain/index": "Input/output error"}
        utils.update_mirror(mirror)
    assert mirror.unread == {"plain/index": "Input/output error"}
    assert tree_of(root).keys() - tree_of(mirror.target, "").keys() == {"plain/index"}


def test_place_that_others_can_reach(tmp_path: Path) -> None:
    """The mirror goes only into a directory that root alone can reach, and by no link."""
    root, place, link = tmp_path / "tree", tmp_path / "place", tmp_path / "link"
    grow(root)
    place.mkdir(mode=0o755)
    link.symlink_to(place)
    with pytest.raises(utils.Failure), utils.mirror_of(root, link, frozenset(), may_link, 0):
        raise AssertionError("there can be no mirror")
    assert list(place.iterdir()) == []
    with utils.mirror_of(root, place, frozenset(), may_link, 0):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_mirror_that_is_moved_while_it_is_made(tmp_path: Path) -> None:
    """What fails then leaves nothing of it in the tree, where no other run would look for it."""
    (tmp_path / "root/mail").mkdir(parents=True)
    (tmp_path / "root/file").touch()
    place, other = tmp_path / "root/copy", tmp_path / "root/other"

    def move(path: str, siblings: Set[str]) -> bool:
        place.rename(other)
        raise utils.Failure("it fails")

    with (pytest.raises(utils.Failure, match="it fails"),
          utils.mirror_of(tmp_path / "root", place, frozenset({"copy"}), move, 0)):
        pass
    other.rmdir()
    (place / "tree/precious").mkdir(parents=True)
    with (pytest.raises(FileExistsError),
          utils.mirror_of(tmp_path / "root", place, frozenset({"copy"}), may_link, 0)):
        pass
    assert (place / "tree/precious").exists()


def test_mirror_that_was_moved(tmp_path: Path) -> None:
    """Between the passes a link to elsewhere takes the mirror's place: nothing is changed there."""
    root, place, elsewhere = tmp_path / "tree", tmp_path / "place", tmp_path / "elsewhere"
    grow(root)
    shutil.copytree(root / "plain", elsewhere / "tree/plain", symlinks=True)
    before = tree_of(elsewhere)
    with mirrored(root, place) as mirror:
        place.rename(tmp_path / "moved")
        place.symlink_to(elsewhere)
        (root / "plain/index").unlink()
        (root / "plain/new").touch()
        utils.update_mirror(mirror)
        assert tree_of(tmp_path / "moved/tree", "") == tree_of(root)
    assert tree_of(elsewhere) == before


def test_link_to_a_name_of_any_length(tmp_path: Path) -> None:
    """A symbolic link is replaced although no file could have the name that it leads to."""
    root = tmp_path / "tree"
    grow(root)
    (root / "plain/long").symlink_to("a" * 300)
    with mirrored(root, tmp_path / "place") as mirror:
        utils.update_mirror(mirror)
    assert tree_of(mirror.target, "") == tree_of(root)


def make_deep(root: Path, depth: int) -> None:
    """Make that many directories inside each other, with a file in the last."""
    root.mkdir()
    descriptor = os.open(root, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=descriptor)
        below = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)


def depth_of(root: Path) -> int:
    """Return how many directories and files are inside each other."""
    command = f"find {shlex.quote(str(root))} -mindepth 1 | wc -l"
    return int(subprocess.check_output(command, shell=True, text=True))


def test_deep_tree(tmp_path: Path) -> None:
    """No tree is too deep; what duplicity could not open is left out and told of."""
    root = tmp_path / "tree"
    make_deep(root, 2500)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE), sys.getrecursionlimit()
    utils.allow_any_depth()
    try:
        with mirrored(root, tmp_path / "copy") as mirror:
            utils.update_mirror(mirror)
            (path, why), = mirror.unread.items()
            whole = len(os.fsencode(mirror.target / path))
            assert utils.LONGEST_PATH < whole <= utils.LONGEST_PATH + 2 and "4000 bytes" in why
            assert depth_of(mirror.target) == path.count("/")
        utils.remove(tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits[0])
        sys.setrecursionlimit(limits[1])
        subprocess.run(["rm", "-r", root], check=True)


def test_night_of_a_deep_tree(keyed: Store) -> None:
    """A tree 900 deep, which any user of a web disk can make, is copied like any other."""
    make_deep(keyed.root / "deep", 900)
    keyed.backup()
    assert keyed.last_run()["source"] == "copy"
    assert not (keyed.backups / "snapshot").exists()
    assert depth_of(keyed.restore() / "deep") == 901
    subprocess.run(["rm", "-r", keyed.root / "deep", keyed.scratch / "restored"], check=True)
