"""What backup.py needs of the operating system. Nothing in here knows what a backup is.

Settings file, safe files and directories, the mirror of a tree, the lock, signals, the
one gateway through which programs run, and services that come back whatever happens. Run
as a program this file is the keeper: the small process that stops services and starts
them again.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import resource
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import TextIO

SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAIL_LINES = 25
LONGEST_LINE_BYTES = 100_000  # duplicity writes up to six characters for a byte of a path
SERVICE_SECONDS = 120
WATCH_SECONDS = 0.5
ENDING_SECONDS = 10
BACKGROUND_SECONDS = 5
SETTLED_SECONDS = 2
SHORT_PASS_SECONDS = 1
OPEN_FILES = 8192
NESTED_CALLS = 10_000
LONGEST_PATH = 4000  # in bytes; the kernel opens none of more than 4095
SPARE_INODES = 10_000
CLOCK_TICK_SECONDS = 0.02  # the clocks of file systems are up to 10 ms behind
BLOCK_BYTES = 1 << 20
LARGEST_FILE_BYTES = 1_000_000
FICLONE = 0x40049409  # of linux/fs.h
START_ATTEMPTS = 3
TIMED_OUT = 124
NOT_EXECUTABLE = 126
DAMAGED = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EREMOTEIO, errno.EILSEQ)
# Of what is damaged, or refused even to root; EAGAIN comes for a file that is under a lease,
# EINVAL where a file system cannot copy.
UNREADABLE = (*DAMAGED, errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EINVAL)
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Of systemd's units, see org.freedesktop.systemd1(5): states in which they run, and who
# stops with one.
RUNNING_STATES = ("active", "reloading", "activating")
STOPPED_WITH = ("ConsistsOf", "RequiredBy", "RequisiteOf", "BoundBy", "PropagatesStopTo")
UNIT_PROPERTIES = ("Id", "ActiveState", "LoadState", "Transient", "Type", "Job", "TriggeredBy",
                   "After", *STOPPED_WITH)

log = logging.getLogger(__name__)

TakeLine = Callable[[str], None]
Watch = Callable[[int], None]


class Failure(Exception):
    """One sentence for the admin: what failed, on which path, what to do.

    message: the sentence, without a final full stop.
    exit_code: what the program exits with when nothing handles the failure.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LostWrites(Failure):
    """A disk could not take what was written, of which only sync tells (seen: a full thin pool)."""


class Interrupted(BaseException):
    """A signal asks the program to end.

    It is no Exception, so that what only goes on after failures does not swallow it.

    number: the signal's number. exit_code: 128 and that.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


# Text and settings


def printable(text: str) -> str:
    r"""Return text with all that a terminal or a mail could mistake as an escape, such as \xNN."""
    def escape(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return character.encode("unicode_escape").decode()
    return "".join(map(escape, text))


def path_in(error: OSError) -> str:
    """Return the absolute path that an error of the operating system is about, escaped.

    It is empty if the error tells none: of a descriptor it does not.
    """
    if not isinstance(error.filename, str):
        return ""
    with suppress(FileNotFoundError):  # of a working directory that is gone
        return printable(os.path.abspath(error.filename))
    return printable(error.filename)


@contextmanager
def whole_path_told(directory: int | None) -> Iterator[None]:
    """Make an OSError about an entry of a directory that is open name its whole path.

    directory: its descriptor, None for a path.
    """
    try:
        yield
    except OSError as error:
        if directory is not None and isinstance(error.filename, str):
            with suppress(OSError):
                error.filename = os.path.join(os.readlink(path_of(directory)), error.filename)
        raise


def load_environment(path: Path) -> dict[str, str]:
    """Read a settings file of KEY=VALUE lines.

    Blank lines and lines that begin with # are passed over.
    path: the file. Returns the values by key, white space around both removed. Raises
    Failure (exit code 2) if the file cannot be read, or if a line is not of that form or
    gives a key a second, different value.
    """
    try:
        lines = os.fsdecode(content_of(path)).split("\n")
    except OSError as error:
        raise Failure(f"cannot read the settings file {path}: {error.strerror}; name another with "
                      "--config", 2) from error
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or "\0" in value:
            raise Failure(f"line {number} of the settings file {path} is not of the form "
                          "KEY=VALUE; correct it", 2)
        if settings.setdefault(key, value) != value:
            raise Failure(f"line {number} of the settings file {path} gives {key} a second value; "
                          "remove one of them", 2)
    return settings


# Files and directories


def check_owned_directory(path: Path, status: os.stat_result | None = None) -> None:
    """Check that path is a directory, not a symbolic link, that only root can write to.

    status: that of what was opened by this path. Raises Failure (exit code 2) if it is
    anything else, FileNotFoundError if it is missing.
    """
    status = status or path.lstat()
    path = path.absolute()
    if not stat.S_ISDIR(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a directory"
        raise Failure(f"{path} is {kind}; put a directory owned by root in its place", 2)
    name = shlex.quote(str(path))
    if status.st_uid != os.geteuid():
        raise Failure(f"{path} is not owned by root; check who made it, then run: "
                      f"chown root {name}", 2)
    if status.st_mode & 0o022:
        raise Failure(f"{path} can be written to by others than root; check what is in "
                      f"it, then run: chmod go-w {name}", 2)


@contextmanager
def owned_directory(path: Path) -> Iterator[int]:
    """Keep a directory of root's open while the block runs, so that no renaming leads elsewhere.

    Yields its descriptor. Raises Failure, see check_owned_directory, or OSError.
    """
    check_owned_directory(path)  # which says what else it is; what is opened may be something else
    with opened(path) as directory:
        check_owned_directory(path, os.fstat(directory))
        yield directory


def work_inside(path: Path) -> None:
    """Make a directory of root's the working directory. Raises as owned_directory does."""
    with owned_directory(path) as directory:
        os.fchdir(directory)


def path_of(directory: int) -> Path:
    """Return a path that leads to a directory that is open, whatever its name is by now.

    directory: its descriptor. Any program of root's can use it.
    """
    return Path(f"/proc/{os.getpid()}/fd/{directory}")


def remove_abandoned(directory: Path, pattern: str) -> None:
    """Remove what own_directory made for processes that were killed: nobody holds its lock."""
    for path in directory.glob(pattern):
        with (suppress(FileNotFoundError, NotADirectoryError, BlockingIOError),
              opened(path) as locked):
            fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)


@contextmanager
def own_directory(path: Path) -> Iterator[Path]:
    """Make a directory of this process's own, and remove it after the block.

    It is locked meanwhile, so that others see that it is in use. path: nothing is there
    yet; a relative one must lead there after the block, too. Yields it. Raises OSError.
    """
    with ExitStack() as stack:
        while not path.exists():  # somebody may have taken it for abandoned before it was locked
            path.mkdir(mode=0o700)
            with suppress(FileNotFoundError):
                fcntl.flock(stack.enter_context(opened(path)), fcntl.LOCK_EX)
        try:
            yield path
        finally:
            with suppress(OSError):  # the next backup removes what is left
                remove(path)


def mounts(table: str = "/proc/self/mounts") -> dict[Path, str]:
    """Return the options of file systems by where they are mounted.

    table: a file that lists them, see fstab(5) and proc(5), which may be missing.
    """
    text = ""
    with suppress(FileNotFoundError):  # as in a container
        text = os.fsdecode(Path(table).read_bytes())
    word = r"[^ \t\n]"  # a name may hold whatever else is white space
    found = re.findall(rf"^[ \t]*(?!#){word}+[ \t]+(/{word}*)(?:[ \t]+{word}+[ \t]+({word}+))?",
                       text, re.MULTILINE)
    return {Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), name)): options
            for name, options in found}


def make_owned_directory(path: Path, mode: int, group: int) -> None:
    """Make a directory of root's with this mode and group (its id), or give an existing one both.

    It has no ACL then. Raises Failure (exit code 2) if something else stands there.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    with owned_directory(path) as directory:
        for acl in ("access", "default"):  # what is inherited may let others write to all in it
            with suppress(OSError):  # as where there is none
                os.removexattr(directory, f"system.posix_acl_{acl}")
        os.fchown(directory, -1, group)
        os.fchmod(directory, mode)


def content_of(path: Path) -> bytes:
    """Return what a regular file holds, at most 1 MB of it. Raises OSError.

    A pipe or a device is not waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
        return stream.read(LARGEST_FILE_BYTES)


def sync(*paths: Path) -> None:
    """Have what was written to the file systems of these paths reach their disks, see sync(1).

    Others are not waited for: one of them may hang. Raises LostWrites.
    """
    command = ["sync", "--file-system", *map(str, paths)]
    answer = shell(command, {"PATH": SYSTEM_DIRECTORIES}, directory=".")
    if answer.exit_code:
        raise LostWrites(f"what was written to {paths[0].resolve()} did not reach its disk; see "
                         f"to that: sync ended with {answer}")


def sync_directory(path: Path) -> None:
    """Force a directory's entries (what was made, renamed or removed in it) to the disk."""
    with opened(path) as descriptor:
        os.fsync(descriptor)


def write_atomically(path: Path, content: str, mode: int = 0o600, group: int = -1) -> None:
    """Write a file so that at any instant the old or the new content is there, whole.

    On a full disk what it holds is written over. A symbolic link at path is replaced.
    content: the new text. mode: its permissions. group: its group id, -1 for the caller's.
    """
    temporary = path.with_name(f".{path.name}.new")  # so that a killed run leaves one at most
    try:
        with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
            os.fchown(descriptor, -1, group)
            os.fchmod(descriptor, mode)
            with open(descriptor, "w", encoding="utf-8", closefd=False) as stream:
                stream.write(content)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if not full or not path.exists() or len(content) > path.stat().st_blocks * 512:
            raise
        with path.open("r+", encoding="utf-8") as stream:
            stream.write(content)
            stream.truncate()
    sync_directory(path.parent)


def regular_files(directory: Path) -> dict[str, int]:
    """Return the sizes in bytes of the regular files in a directory by name.

    There are none if it is missing. Links are not followed. One whose inode is damaged has a byte,
    lest it pass for one that is lost, or for an empty one.
    """
    sizes: dict[str, int] = {}
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            try:
                if entry.is_file(follow_symlinks=False):
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in DAMAGED:
                    raise
                sizes[entry.name] = 1
    return sizes


def walk_entries(root: Path, excluded: Collection[Path] = ()) -> Iterator["os.DirEntry[str]"]:
    """Yield the entries of a tree: files of every kind but sockets.

    What is excluded is left out, and all below it, and so is what is gone or cannot be read.
    Raises Failure where the server of a file system is gone.
    """
    left_out = {os.fspath(path) for path in excluded}
    pending = [os.fspath(root)]
    while pending:
        raise_if_interrupted()
        with _unreadable_passed_over(), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with _unreadable_passed_over():
                    if entry.path in left_out or not entry.is_file(follow_symlinks=False) and (
                            stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)):
                        continue
                    yield entry
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)


@contextmanager
def _unreadable_passed_over() -> Iterator[None]:
    """Pass over what is gone or cannot be read, of which duplicity tells, see walk_entries."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ENODEV):  # to duplicity 0.8.22 that is "gone"
            raise Failure(f"{path_in(error)}: {error.strerror}; see to its server") from error


def count_entries(root: Path, excluded: Collection[Path] = ()) -> int:
    """Return how many entries a tree has, itself included; see walk_entries."""
    return 1 + sum(1 for _ in walk_entries(root, excluded))


def content_size(root: Path) -> int:
    """Return the bytes in the regular files of a tree, see walk_entries."""
    total = 0
    for entry in walk_entries(root):
        with suppress(OSError):
            if entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def remove(path: str | Path, directory: int | None = None) -> None:
    """Remove a file, or a directory with all that is in it, if it is there.

    directory: the descriptor of one that is open, to which path is relative.
    """
    with whole_path_told(directory):
        try:
            os.unlink(path, dir_fd=directory)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            with opened(path, parent=directory) as below:
                for child in os.listdir(below):
                    remove(child, below)
            os.rmdir(path, dir_fd=directory)


def sha1_of(path: Path) -> str:
    """Return the SHA-1 of a file in hexadecimal."""
    digest = hashlib.sha1()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            raise_if_interrupted()
    return digest.hexdigest()


# Mirroring a tree


MayLink = Callable[[str, Set[str]], bool]


@dataclass
class Mirror:
    """A copy of a tree, which mirror_of makes and update_mirror makes equal to it.

    source, target: the tree and the copy. live, copy: their descriptors, so that no
    renaming leads elsewhere. excluded: what is left out, each the relative path of a
    directory and a name in it. may_link: tells, of a directory's relative path and the
    names of all directories beside it, itself among them, whether the regular files in it
    are never rewritten in place: those become hard links, at no cost. spare_bytes: the room
    to leave when something is copied. own: the status of the working directory and of what
    holds the copy, which are left out under whatever name. settled_ns: what has an earlier
    ctime, in nanoseconds of the epoch, has not changed since the last pass. unread: why files
    could not be read, by relative path; target lacks them.
    """

    source: Path
    target: Path
    live: int
    copy: int
    excluded: frozenset[tuple[str, str]]
    may_link: MayLink
    spare_bytes: int
    own: tuple[os.stat_result, ...]
    settled_ns: int = 0
    unread: dict[str, str] = field(default_factory=dict)


def allow_any_depth() -> None:
    """Raise the limits on open files and on nested calls, so that no tree is too deep to be copied.

    A path has at most 4096 bytes, and so at most 2,048 directories; each takes two of
    both.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(OPEN_FILES, most)), most))
    sys.setrecursionlimit(NESTED_CALLS)


@contextmanager
def mirror_of(
    source: Path, place: Path, excluded: Collection[str], may_link: MayLink, spare_bytes: int
) -> Iterator[Mirror]:
    """Make a mirror of a tree that may be changing, the first of two passes, and keep it open.

    It takes no sockets, and follows no links and no mounts. source, may_link: see Mirror.
    excluded: relative paths that are left out. place: the directory to make for it; the
    mirror is `tree` in that. Is it relative, then to a directory that nobody can rename.
    spare_bytes: the room to leave.
    Afterwards the mirror is removed, whatever the name of place is by then; an empty place
    is left to the caller. Raises Failure or OSError.
    """
    make_owned_directory(place, 0o700, 0)
    with owned_directory(place) as directory, opened(source) as live:
        os.mkdir("tree", 0o700, dir_fd=directory)
        try:
            with opened("tree", parent=directory) as copy:
                target = (path_of(directory) if place.is_absolute() else place) / "tree"
                left_out = frozenset(os.path.split(name) for name in excluded)
                mirror = Mirror(source, target, live, copy, left_out, may_link, spare_bytes,
                                (os.stat("."), os.fstat(directory)))
                _catch_up(mirror)
                mirror.spare_bytes = 0  # a second pass with little room is better than no backup
                yield mirror
        finally:
            with suppress(OSError):  # whoever removes place is told of that
                remove("tree", directory)


def _catch_up(mirror: Mirror) -> None:
    """Make a mirror equal to a tree that may be changing, repeatedly while that gets much shorter.

    So little is left for the pass that somebody waits for, however long the first one
    takes.

    Clocks of file systems tick coarsely, and a store through mmap to a page that is
    dirty already changes no time stamp; after a sync it does. So what changed later than
    two seconds before the sync counts as changed in the next pass.
    """
    seconds = math.inf
    while True:
        settled_ns = time.time_ns() - int(SETTLED_SECONDS * 1e9)
        sync(mirror.source)
        began, before = time.monotonic(), seconds
        update_mirror(mirror)
        mirror.settled_ns = settled_ns
        seconds = time.monotonic() - began
        if seconds < SHORT_PASS_SECONDS or seconds > before / 2:
            return


def update_mirror(mirror: Mirror) -> None:
    """Make a mirror equal to its tree: names, contents, modes, owners and times.

    Nothing is remembered from one pass to the next. What is unchanged is not read: its
    own ctime is settled (a rename changes the ctime of what is renamed on ext4, btrfs and,
    but for an exchange, XFS), every directory on the way to it below the top, which is held
    open, is the one that was copied there, and what stands in the copy has its kind and mode,
    size and mtime. In one thing the mirror differs, see _replace. Who moves directories ahead of it
    can hold it for ever. Raises Failure, or Interrupted.
    """
    mirror.unread.clear()
    try:
        # On btrfs a directory that stays open lists what it held when it was opened
        # (Linux 6.18).
        with opened(".", parent=mirror.live) as live, opened(".", parent=mirror.copy) as copy:
            _mirror_directory(mirror, "", False, True, live, copy)
    except OSError as error:
        # Of a descriptor it is a number.
        name = f"{printable(error.filename)}: " if isinstance(error.filename, str) else ""
        raise Failure(f"{mirror.source} could not be copied to {mirror.target}: {name}"
                      f"{error.strerror}") from error


@contextmanager
def opened(
    name: str | Path, flags: int = os.O_RDONLY | os.O_DIRECTORY,
    parent: int | None = None,
) -> Iterator[int]:
    """Keep a file open while the block runs; a symbolic link is refused.

    parent: the descriptor of the directory that holds it.
    """
    with whole_path_told(parent):
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _mirror_directory(
    mirror: Mirror, path: str, linked: bool, settled: bool, live: int, copy: int
) -> None:
    """Make one directory and all below it equal.

    path: relative. linked: whether its files may be links. settled: whether it and every
    directory on the way to it are those of the last pass. live, copy: descriptors.
    """
    raise_if_interrupted()
    status = os.fstat(live)
    _check_inodes(mirror, copy)
    if status.st_dev != os.fstat(copy).st_dev:
        raise Failure(f"{mirror.source / path} and {mirror.target} are not on the same file system")
    with os.scandir(copy) as entries:
        present = {entry.name: entry.inode() for entry in entries}
    excluded = {name for parent, name in mirror.excluded if parent == path}
    others: list[str] = []
    try:
        others = _link_files(live, copy, present) if linked else os.listdir(live)
    except OSError as error:
        if not path:
            raise
        _pass_over(mirror, path, error)
        linked = False  # it is no directory that holds nothing but links
    found = {}
    for name in others:
        raise_if_interrupted()
        if name not in excluded:
            try:
                found[name] = os.stat(name, dir_fd=live, follow_symlinks=False)
            except OSError as error:
                _pass_over(mirror, os.path.join(path, name), error)
    # A Maildir of which one directory is left out is a Maildir still.
    directories = excluded.union(
        name for name, entry in found.items() if stat.S_ISDIR(entry.st_mode))
    longest_name = LONGEST_PATH - 1 - len(os.fsencode(mirror.target / path))
    for name, entry in found.items():
        raise_if_interrupted()
        below = os.path.join(path, name)
        if stat.S_ISSOCK(entry.st_mode):
            continue
        if len(os.fsencode(name)) > longest_name:
            mirror.unread[below] = f"its path has more than {LONGEST_PATH} bytes"
            continue
        is_there = present.pop(name, None) is not None
        unchanged = _copy_of_unchanged(mirror, name, entry, copy) if settled and is_there else None
        if name in directories:
            may_link = mirror.may_link(below, directories)
            # One that has not changed and that holds nothing but links is not listed.
            if not (may_link and unchanged and unchanged.st_atime_ns == _note_of(entry, True)):
                _mirror_child(mirror, below, may_link, settled, live, copy)
        elif not unchanged:
            _replace(mirror, below, linked, entry, live, copy)
    for name in excluded.union(present):  # one that is excluded may have become a link
        raise_if_interrupted()
        remove(name, copy)
    set_metadata(".", status, copy)
    note = _note_of(status, linked, linked and bool(others))
    os.utime(copy, ns=(note, status.st_mtime_ns))


def _note_of(status: os.stat_result, linked: bool, mixed: bool = False) -> int:
    """Return what a directory of the mirror has as access time, in nanoseconds of the epoch.

    It tells which directory it is a copy of, and no backup keeps it. It is in the years 2029
    to 2038: who lists a directory changes one of the past (see mount(8), relatime), and
    whole seconds of 31 bits are what every file system can store. linked: whether its files
    may be links. mixed: whether it holds something else, too.
    """
    kind = f"{status.st_ino} {linked} {mixed}"
    return (7 * 2**28 + zlib.crc32(kind.encode()) % 2**28) * 1_000_000_000


def _check_inodes(mirror: Mirror, copy: int) -> None:
    """Raise Failure if a copy of one entry more could take what mail needs."""
    if mirror.spare_bytes:
        room = os.statvfs(copy)
        if 0 <= room.f_favail < min(room.f_files // 20, SPARE_INODES):  # -1 if it has no limit
            raise Failure(f"the file system of {mirror.source} has few inodes left")


def _copy_of_unchanged(
    mirror: Mirror, name: str, status: os.stat_result, copy: int
) -> os.stat_result | None:
    """Return the status of an entry's copy if the entry is what it was in the last pass.

    That the directories on the way to it are is for the caller to tell. status: that of
    the entry. copy: the descriptor of the directory in which its copy is.
    """
    if status.st_ctime_ns >= mirror.settled_ns:
        return None
    then = os.stat(name, dir_fd=copy, follow_symlinks=False)
    alike = (then.st_mode, then.st_mtime_ns) == (status.st_mode, status.st_mtime_ns) and (
        stat.S_ISDIR(status.st_mode) or then.st_size == status.st_size)
    return then if alike else None


def _link_files(live: int, copy: int, present: dict[str, int]) -> list[str]:
    """Link the regular files of one directory into another.

    present: the inode numbers there by name; those of links that are right already are
    taken out. Returns the names of all other entries, and of files that are something
    else there or refuse to be linked.
    """
    others = []
    with os.scandir(live) as entries:
        for entry in entries:
            raise_if_interrupted()
            name = entry.name
            if not entry.is_file(follow_symlinks=False):
                others.append(name)
            elif present.get(name) == entry.inode():  # a link keeps its number from another file
                del present[name]
            elif name in present or not _link(name, live, copy):
                others.append(name)
    return others


def _link(name: str, live: int, copy: int) -> bool:
    """Link a file of one directory into another.

    Returns False if it is gone or cannot be linked, as one that is immutable or damaged.
    """
    try:
        os.link(name, name, src_dir_fd=live, dst_dir_fd=copy, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EEXIST, errno.EMLINK, *UNREADABLE):
            raise
        return False
    return True


def _mirror_child(
    mirror: Mirror, path: str, linked: bool, settled: bool, live: int, copy: int
) -> None:
    """Make a directory equal, see _mirror_directory. settled, live, copy: of what holds it."""
    name = os.path.basename(path)
    with ExitStack() as stack:
        try:
            below = stack.enter_context(opened(name, parent=live))
        except OSError as error:
            _pass_over(mirror, path, error)
            return
        status = os.fstat(below)
        if any(os.path.samestat(status, own) for own in mirror.own):
            return
        with suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(name, dir_fd=copy)  # what was no directory before
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=copy)
        target = stack.enter_context(opened(name, parent=copy))
        settled = settled and os.fstat(target).st_atime_ns in (
            _note_of(status, linked), _note_of(status, linked, mixed=True))
        _mirror_directory(mirror, path, linked, settled, below, target)


def _replace(
    mirror: Mirror, path: str, linked: bool, status: os.stat_result, live: int, copy: int
) -> None:
    """Put in place of what is at path, if anything, a link to the entry of the tree, or a copy.

    It is never written to what is there: that may be a link to the user's own file. A copy
    of what was written to in the very second in which it is copied gets an mtime one second
    earlier.
    """
    name = os.path.basename(path)
    remove(name, copy)
    if linked and stat.S_ISREG(status.st_mode) and _link(name, live, copy):
        return
    _check_inodes(mirror, copy)
    began = int(time.time() - CLOCK_TICK_SECONDS)
    try:
        if stat.S_ISREG(status.st_mode):
            status = _copy_file(mirror, name, live, copy)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(name, dir_fd=live), name, dir_fd=copy)
        else:
            os.mknod(name, status.st_mode, status.st_rdev, dir_fd=copy)
    except OSError as error:
        _pass_over(mirror, path, error)
        remove(name, copy)
        return
    set_metadata(name, status, copy)
    # Who compares whole seconds would take what is written later in this one for unchanged.
    if stat.S_ISREG(status.st_mode) and began <= status.st_mtime <= time.time():
        times = (status.st_atime_ns, status.st_mtime_ns - 1_000_000_000)
        os.utime(name, ns=times, dir_fd=copy)


def _copy_file(mirror: Mirror, name: str, live: int, copy: int) -> os.stat_result:
    """Copy a regular file of one directory to another, holes left out; clone it where that works.

    Returns its status from before it was read. Raises OSError, of which
    FileNotFoundError tells that it is no regular file any more.
    """
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with (opened(name, os.O_RDONLY | os.O_NONBLOCK, live) as source,
          opened(name, new, copy) as target):
        status = os.fstat(source)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        try:
            fcntl.ioctl(target, FICLONE, source)  # see ioctl_ficlone(2)
        except OSError:  # should it not be for want of clones the same befalls a copy
            room = max(0, shutil.disk_usage(target).free - mirror.spare_bytes)
            if mirror.spare_bytes and room < status.st_blocks * 512:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name) from None
            _copy_data(source, target, status.st_size)
    return status


def _copy_data(source: int, target: int, size: int) -> None:
    """Copy what a file holds, its holes left out. size: in bytes."""
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            begin = os.lseek(source, end, os.SEEK_DATA)
            end = os.lseek(source, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole is left, or somebody has just shortened it
        os.lseek(target, begin, os.SEEK_SET)
        while begin < end and (
                sent := os.sendfile(target, source, begin, min(end - begin, BLOCK_BYTES))):
            begin += sent
            raise_if_interrupted()


def _pass_over(mirror: Mirror, path: str, error: OSError) -> None:
    """Note why an entry could not be read, and nothing if it is gone or became something else.

    path: relative. Raises every other error.
    """
    if error.errno in UNREADABLE:
        mirror.unread[path] = error.strerror
    elif error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
        raise error


def set_metadata(name: str, status: os.stat_result, directory: int) -> None:
    """Give an entry of a directory, by its descriptor, the owner, mode and times of another."""
    os.chown(name, status.st_uid, status.st_gid, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=directory)
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)


# The lock


@contextmanager
def exclusive_process(path: Path) -> Iterator[int]:
    """Hold the lock file while the block runs.

    The kernel releases it when its last holder dies, so it is never stale. path: the
    lock file, made if it is missing, never deleted. Yields its descriptor, for a child
    process to hold on to. Raises Failure (exit code 4) if another process has it.
    """
    with opened(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = printable(os.fsdecode(os.read(descriptor, 200)))
            raise Failure(f"another run ({holder or 'which has only just begun'}) holds "
                          f"the lock {path.absolute()}; wait for it to end", 4) from error
        os.ftruncate(descriptor, 0)
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        with suppress(OSError):  # a full disk is told of later
            os.write(descriptor, f"process {os.getpid()}, since {since}".encode())
        yield descriptor


# Signals


class _Signals:
    """Which signal has come, and whether it was told of; a handler can keep that nowhere else."""

    came: int | None = None
    raised = False


def _on_signal(number: int, _frame: FrameType | None) -> None:
    _Signals.came = _Signals.came or number


def reset_signals() -> None:
    """Take back what a parent may have left: an ignored SIGCHLD, blocked signals.

    The one makes the exit code of every program 0, with the other nothing ends this one.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


@contextmanager
def ended_in_good_order() -> Iterator[None]:
    """Have SIGTERM, SIGINT and SIGHUP end the block only at calls of raise_if_interrupted.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    before = {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    for number in ENDING_SIGNALS:
        if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def raise_if_interrupted() -> None:
    """Raise Interrupted, once, if a signal has come.

    All that takes long asks this every now and then. A handler that raises would do so
    between any two instructions, and so in the middle of putting things in order.
    """
    if _Signals.came and not _Signals.raised:
        _Signals.raised = True
        raise Interrupted(_Signals.came)


@contextmanager
def not_suspended() -> Iterator[None]:
    """Have Ctrl-Z not suspend this process in the block."""
    # Blocked, for one that is being started would be suspended before it is a program of its own,
    # and this one wait for it. Not SIG_IGN, which daemons would inherit.
    before = signal.signal(signal.SIGTSTP, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTSTP])
        signal.signal(signal.SIGTSTP, before)


def pause(seconds: float) -> None:
    """Sleep. Raises Interrupted."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        raise_if_interrupted()
        time.sleep(min(left, WATCH_SECONDS))


# Programs


def open_closed_streams() -> None:
    """Open /dev/null in place of standard streams that are closed.

    A pipe or a lock would take their numbers, and programs use them.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # It gets the lowest free number, which is this one.
            setattr(sys, name, open(os.devnull, "r+"))
            os.set_inheritable(descriptor, True)


def give_up_if_broken(stream: TextIO) -> None:
    """Let go of what standard output or error refuse, as when nobody reads them.

    Were it left for Python to write, that would exit with 120.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def low_priority() -> Iterator[None]:
    """Let programs that are started in the block, and this one, give way to all others.

    That goes for the disk, too: see ionice(1) on processes without a class of their own.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, 19)
    try:
        yield
    finally:
        with suppress(PermissionError):  # as in some containers
            os.setpriority(os.PRIO_PROCESS, 0, before)


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    exit_code: negative if by a signal, as in subprocess. last_lines: the end of what it
    printed, escaped.
    """

    exit_code: int
    last_lines: tuple[str, ...]

    def __str__(self) -> str:
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return "\n".join([how, *(f"    {line}" for line in self.last_lines)])


def bytes_read_by(process: int) -> int:
    """Return how many bytes a process has read, from files and pipes, 0 if that is not told.

    That is rchar in proc(5), which comes first there.
    """
    with suppress(OSError):
        return int(Path(f"/proc/{process}/io").read_text().split()[1])
    return 0


def state_of(session: int) -> bytes:
    """Return what the kernel tells of a session's processes: as long as one works it changes.

    session: the process id of its leader. See proc(5).
    """
    states = b""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it may just have ended
            if os.getsid(int(name)) == session:
                states += Path(f"/proc/{name}/stat").read_bytes()
    return states


def find_program(name: str, environment: Mapping[str, str]) -> str:
    """Return the path of a program on the PATH of environment.

    Raises Failure (exit code 2) if it is not there.
    """
    found = shutil.which(name, path=environment["PATH"])
    if not found:
        raise Failure(f"{name} is not installed; install it", 2)
    return found


def shell(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    secret: str = "",
    standard_input: str = "",
    directory: str = "/",
    umask: int = -1,
    starts_daemons: bool = False,
    interruptible: bool = True,
    timeout_seconds: float = math.inf,
    on_line: TakeLine = lambda line: None,
    on_log: TakeLine | None = None,
    watch: Watch = lambda process: None,
) -> Finished:
    """Run a program and wait for it: the one gateway for all of them.

    No shell reads the command.

    command: program and arguments; in "--log-fd=LOG" and "--status-fd=LOG" the word LOG becomes
    the number of a descriptor whose lines go to on_log. environment: all of the program's
    environment. secret: hidden in whatever the program prints. standard_input: a few lines for
    it to read. directory: where it runs. umask: -1 for the caller's. starts_daemons: they would
    hold an output pipe open for ever, so a file takes the output, whose lines come at the
    end. interruptible: whether a signal to this process ends it, and raises Interrupted.
    timeout_seconds: then it is ended, with exit code 124. on_line, on_log: called for each
    line as it comes, escaped. watch: called twice a second with its process id; what it
    raises ends the program. Returns how it ended, with exit code 126 if it could not be
    executed. The program and its process group have ended when an exception leaves.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def take_line(line: str) -> None:
        line = line.replace(secret, "[secret]") if secret else line
        tail.append(line)
        on_line(line)

    def check(process: int) -> None:
        if interruptible:
            raise_if_interrupted()
        watch(process)

    with ExitStack() as stack:
        output = stack.enter_context((_file_to if starts_daemons else _pipe_to)(take_line))
        log = [stack.enter_context(_pipe_to(on_log))] if on_log else []
        arguments = [part.replace("LOG", str(*log)) if part in ("--log-fd=LOG", "--status-fd=LOG")
                     else part for part in command]
        if interruptible:
            raise_if_interrupted()
        try:
            process = subprocess.Popen(
                arguments, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=directory,
                stdin=subprocess.PIPE if standard_input else subprocess.DEVNULL,
                pass_fds=log, start_new_session=True, umask=umask)
        except OSError as error:
            return Finished(NOT_EXECUTABLE, (f"{printable(command[0])}: {error.strerror}",))
        stack.callback(_end_group, process)
        if process.stdin:
            with suppress(BrokenPipeError), process.stdin as stream:
                stream.write(standard_input.encode("utf-8", "surrogateescape"))
        in_time = _wait(process, timeout_seconds, check)
        if interruptible:
            raise_if_interrupted()  # it is no failure what the signal did to the program
    if not in_time:
        tail.append(f"no answer within {timeout_seconds:.0f} seconds")
    return Finished(process.returncode if in_time else TIMED_OUT, tuple(tail))


@contextmanager
def _pipe_to(take_line: TakeLine) -> Iterator[int]:
    """Yield the writing end of a pipe whose lines a thread passes on.

    All that came before the block ended has been passed on then.
    """
    reading, writing = os.pipe()
    reader = threading.Thread(target=_pass_on, args=(reading, take_line), daemon=True)
    reader.start()
    try:
        yield writing
    finally:
        os.close(writing)
        # A process left in the background may hold the pipe: its output is nobody's business.
        reader.join(BACKGROUND_SECONDS)


@contextmanager
def _file_to(take_line: TakeLine) -> Iterator[int]:
    """Yield a file in memory, for a full disk must not keep a service down.

    Its lines are passed on when the block ends.
    """
    output = os.memfd_create("output")
    try:
        yield output
    finally:
        os.lseek(output, 0, os.SEEK_SET)
        _pass_on(output, take_line)


def _pass_on(descriptor: int, take_line: TakeLine) -> None:
    """Read lines to the end, and close the descriptor."""
    with os.fdopen(descriptor, "rb") as stream:
        while line := stream.readline(LONGEST_LINE_BYTES):
            take_line(printable(os.fsdecode(line.rstrip(b"\r\n"))))
            while line and not line.endswith(b"\n"):  # its rest could pass for another line
                line = stream.readline(LONGEST_LINE_BYTES)


def _wait(process: "subprocess.Popen[bytes]", timeout_seconds: float, check: Watch) -> bool:
    """Wait for a program, and call check twice a second meanwhile.

    Returns whether it ended in time.
    """
    deadline = time.monotonic() + timeout_seconds
    descriptor = os.pidfd_open(process.pid)
    ended = select.poll()
    ended.register(descriptor, select.POLLIN)
    try:
        while not ended.poll(WATCH_SECONDS * 1000):
            if time.monotonic() >= deadline:
                return False
            check(process.pid)
    finally:
        os.close(descriptor)
    process.wait()
    return True


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a program that still runs, with its process group: SIGTERM, ten seconds later SIGKILL."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(process.pid, number)
                # A disk that does not answer may hold it for ever.
                _wait(process, ENDING_SECONDS, lambda process: None)


# Services that come back


@dataclass
class Downtime:
    """What became of the services.

    seconds: from the first stop until all are known to run again. not_started: why
    services could not be started again, by their line, see ServiceManager. awake: which
    ran again before that, as somebody else had started them; empty if none did. too_long:
    whether they were started although the block that they were stopped for had not ended.
    go_on: to be called while that goes on, see services_stopped.
    """

    seconds: float = 0.0
    not_started: dict[str, str] = field(default_factory=dict)
    awake: str = ""
    too_long: bool = False
    go_on: Callable[[], None] = lambda: None


@dataclass
class ServiceManager:
    """How services are controlled where systemd is not process 1: with `service`.

    What is stopped and started for a service is a line of text: here the service's name.
    environment: for the programs, with a PATH on which they are. unknown: services that
    the system does not know, of those that were asked for.
    """

    environment: Mapping[str, str]
    unknown: list[str] = field(default_factory=list)

    def command(self, action: str, line: str) -> list[str]:
        """Return the command that does this to a service: stop, start or status."""
        return ["service", line, action]

    def run(
        self, action: str, line: str, on_line: TakeLine = lambda line: None,
        interruptible: bool = False,
    ) -> Finished:
        """Do this to a service, which has 120 seconds to answer, see shell."""
        return shell(self.command(action, line), self.environment, on_line=on_line,
                     starts_daemons=True, interruptible=interruptible,
                     timeout_seconds=SERVICE_SECONDS)

    def failure(self, action: str, line: str) -> str:
        """Do this to a service. Returns why it failed, empty if it did not."""
        answer = self.run(action, line)
        command = shlex.join(self.command(action, line))
        return f"{command} ended with {answer}" if answer.exit_code else ""

    def running(self, names: Sequence[str]) -> list[str]:
        """Return the lines of those services that run.

        Raises Failure if one does not answer.
        """
        lines = []
        for name in names:
            answer = self.run("status", name, interruptible=True)
            if answer.exit_code in (TIMED_OUT, NOT_EXECUTABLE):
                raise Failure(f"it cannot be told whether {name} runs; mend it first: "
                              f"service {name} status ended with {answer}")
            if answer.exit_code == 0:
                lines.append(name)
            # Debian's says so and exits with 1; 4 is what the LSB has for it.
            elif answer.exit_code == 4 or "unrecognized service" in str(answer):
                self.unknown.append(name)
        return lines

    def stop(self, lines: Sequence[str]) -> str:
        """Stop services in this order.

        Returns why one could not be stopped, empty if all are.
        """
        failures = (self.failure("stop", line) for line in lines)
        return next(filter(None, failures), "") or self.awake(lines)

    def start(self, lines: Sequence[str]) -> dict[str, str]:
        """Start services in this order, every one even when another fails.

        A start is believed when the service runs after it: of a postfix with a broken
        main.cf it exits 0 (seen: 3.7.11). Returns why services do not run, by their
        line.
        """
        failed = {line: self.failure("start", line) for line in lines}
        return {line: why or down for line, why in failed.items()
                if (down := self.not_running(line))}

    def not_running(self, line: str) -> str:
        """Return how a service answers that does not run, empty if it does."""
        return self.failure("status", line)

    def awake(self, lines: Sequence[str]) -> str:
        """Return which of the services that were stopped run again, as far as that can be told."""
        return ""

    def outliving(self) -> list[str]:
        """Return what to put before a command so that it outlives this process: here nothing."""
        return []


class Systemd(ServiceManager):
    """How services are controlled where systemd is process 1: a line is a service's units.

    `service` tells lies there: on Debian 12 postfix.service only stands for
    postfix@-.service, and can be stopped and started whatever becomes of that (seen:
    systemd 252, postfix 3.7.11).
    """

    def running(self, names: Sequence[str]) -> list[str]:
        """Return the lines of those services that run, see ServiceManager.

        A line has all running units that go down with the service, and before them the
        sockets and paths that would start it again, lest they do so between their stop and its
        own. Raises Failure also if a unit could not be started again.
        """
        lines = []
        for name in names:
            units = self.settled_units(f"{name.removesuffix('.service')}.service")
            if units and units[0]["LoadState"] == "not-found":  # itself comes first
                self.unknown.append(name)
            running = [unit for unit in units if unit["ActiveState"] in RUNNING_STATES]
            for unit in running:
                kind = "transient" if unit["Transient"] == "yes" else unit["LoadState"]
                if kind != "loaded":
                    raise Failure(f"{unit['Id']} runs and could not be started again, "
                                  f"for it is {kind}; mend that first")
            # A target is left to itself: to start it would start what was not running,
            # too.
            started = sorted((unit["Id"] for unit in running if not unit["Id"].endswith(".target")),
                             key=lambda unit: (unit.endswith(".service"), unit))
            if started:
                lines.append(" ".join(started))
        return lines

    def settled_units(self, name: str) -> list[defaultdict[str, str]]:
        """Return the units that go down with one, itself too, when none is just started or stopped.

        A job that is under way is left out, be it a oneshot or what a timer starts:
        neither is it waited for, nor begun anew. Raises Failure if it takes over 120
        seconds, or if this process would go down with them, or they wait for its end.
        """
        deadline = time.monotonic() + SERVICE_SECONDS
        while True:
            units: dict[str, defaultdict[str, str]] = {}
            wanted = {name}
            while wanted:
                found = self.show(wanted)
                units.update((unit["Id"], unit) for unit in found)
                # A name that was escaped, as of a template for a mail address, is quoted.
                stopped = " ".join(unit[key] for unit in found for key in STOPPED_WITH)
                triggers = " ".join(unit["TriggeredBy"] for unit in found)
                wakers = {unit for unit in shlex.split(triggers)
                          if unit.endswith((".socket", ".path"))}
                wanted = wakers.union(shlex.split(stopped)) - units.keys()
            groups = re.split("[/\n]", Path("/proc/self/cgroup").read_text())
            own = units.keys() & groups
            after = " ".join(unit["After"] for unit in units.values())
            if before := set(groups).intersection(shlex.split(after)):
                own |= {unit["Id"] for unit in self.show(before)
                        if unit["ActiveState"] != "active"}
            if own:
                raise Failure(f"{min(own)}, in which this runs, would go down with {name}, or "
                              "keep it from starting; take Requires=, BindsTo=, PartOf= and "
                              "Before= out of it")
            settled = [unit for unit in units.values()
                       if (unit["ActiveState"], unit["Type"]) != ("activating", "oneshot")
                       and (unit["Id"] == next(iter(units))  # its own, which may be an alias
                            or ".timer" not in unit["TriggeredBy"])]
            busy = [unit["Id"] for unit in settled
                    if unit["Job"] or unit["ActiveState"] == "deactivating"]
            if not busy:
                return settled
            if time.monotonic() > deadline:
                raise Failure(f"{busy[0]} is still being started or stopped; "
                              "wait for it, or mend it")
            pause(WATCH_SECONDS)

    def show(self, units: Collection[str]) -> list[defaultdict[str, str]]:
        """Return the properties of units, in their order, empty if not told. Raises Failure."""
        lines: list[str] = []
        line = " ".join(units)
        answer = self.run("show", line, lines.append, interruptible=True)
        blocks = [defaultdict(str, (line.partition("=")[::2] for line in block.splitlines()))
                  for block in "\n".join(lines).split("\n\n")]
        told = all({"Id", "ActiveState", "LoadState"} <= block.keys() for block in blocks)
        if answer.exit_code or not told:
            raise Failure("it cannot be told which services run; mend that first: "
                          f"systemctl show {line} ended with {answer}")
        return blocks

    def command(self, action: str, line: str) -> list[str]:
        """Return the command that does this to a service's units, or asks for their properties."""
        properties = [f"--property={','.join(UNIT_PROPERTIES)}"] if action == "show" else []
        return ["systemctl", action, *properties, "--", *line.split()]

    def awake(self, lines: Sequence[str]) -> str:
        """Return which of the units that were stopped are in another state than that."""
        return self.states_but(" ".join(lines), "inactive", "failed")

    def start(self, lines: Sequence[str]) -> dict[str, str]:
        """Start services in this order, see ServiceManager, past the limit on frequent starts."""
        self.run("reset-failed", " ".join(lines))
        return super().start(lines)

    def not_running(self, line: str) -> str:
        """Return which units of a service are not active, and what they are."""
        return self.states_but(line, "active")

    def states_but(self, line: str, *wanted: str) -> str:
        """Return which units are in none of the wanted states, and in which they are."""
        states: list[str] = []
        self.run("is-active", line, states.append)
        found = zip_longest(line.split(), states, fillvalue="unknown")
        return ", ".join(f"{unit} is {state}" for unit, state in found if state not in wanted)

    def outliving(self) -> list[str]:
        """Return what to put before a command so that it outlives the end of this control group.

        That is what `systemctl kill` and the out-of-memory killer end. Where no scope
        can be had it is nothing.
        """
        scope = ["systemd-run", "--scope", "--quiet", "--collect", "--property=TimeoutStopSec=10"]
        answer = shell([*scope, "true"], self.environment, timeout_seconds=SERVICE_SECONDS)
        if answer.exit_code:
            log.info("mail stays down if this run's control group is killed while it is: %s ended "
                     "with %s", shlex.join(scope), answer)
        return [] if answer.exit_code else scope


def service_manager(environment: Mapping[str, str]) -> ServiceManager:
    """Return how services are controlled on this machine, see sd_booted(3)."""
    if not os.path.isdir("/run/systemd/system"):
        return ServiceManager(environment)
    # With SYSTEMD_LOG_LEVEL=debug, say, systemctl says more than what it is asked for.
    return Systemd({name: value for name, value in environment.items()
                    if not name.startswith("SYSTEMD_")})


def services_to_start(list_path: Path, stopped: Sequence[str] = ()) -> list[str]:
    """Return the lines of the services that are to come back.

    Those are the stopped ones, then what else is listed in the file, which may be
    missing.
    """
    listed: list[str] = []
    with suppress(FileNotFoundError):
        listed = os.fsdecode(content_of(list_path)).splitlines()
    return list(dict.fromkeys([*stopped, *listed]))


def start_services(
    manager: ServiceManager, lines: Sequence[str], list_path: Path, wary: bool = False
) -> dict[str, str]:
    """Start services in this order, each up to three times, every one even when another fails.

    lines: see ServiceManager. list_path: the file that lists the services that are to
    come back: afterwards those that could not be started, else gone. wary: whether a stop that
    was given up may be under way still: for ten seconds more what goes down is started, too.
    Returns why they could not, by line.
    """
    failed = dict.fromkeys(lines, "")
    for attempt in range(START_ATTEMPTS):
        if failed:
            time.sleep(min(attempt, 1))
            failed = manager.start(list(failed))
    for _ in range(ENDING_SECONDS if wary else 0):
        time.sleep(1)
        down = [line for line in lines if manager.not_running(line)]
        failed = manager.start(down) if down else {}
    with suppress(OSError):  # it is gone already; where /run is full it stays
        if failed:
            write_atomically(list_path, "\n".join(failed))
        else:
            list_path.unlink()
    return failed


@contextmanager
def services_stopped(
    manager: ServiceManager, lines: Sequence[str], list_path: Path, lock: int, downtime: Downtime,
    seconds: float
) -> Iterator[None]:
    """Stop services, and start them again after the block whatever happens.

    A keeper (see keep_services) does both, so that even the death of this process brings
    them back. lines: see ServiceManager, in the order in which they stop and start.
    list_path: where the keeper notes what it stops; what is listed there already is
    started too. lock: a descriptor that the keeper holds until the services are back.
    downtime: filled in at the end. seconds: how long they are stopped at most since they were, or
    since its go_on was called, for a disk that does not answer could hold this process for ever;
    then the block is interrupted, too. Raises Failure if it was, or if a service cannot be
    stopped; all are started again then.
    """
    if not lines:
        yield
        return
    keeper = subprocess.Popen(
        [*manager.outliving(), "ionice", "--ignore", "--class", "none", sys.executable,
         os.path.abspath(__file__), os.fspath(list_path), str(seconds), *lines],
        env=manager.environment, text=True, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        pass_fds=[lock], start_new_session=True)
    assert keeper.stdin and keeper.stdout
    standard_input = keeper.stdin

    def go_on() -> None:
        with suppress(BrokenPipeError, ValueError):  # it died, or it is over
            os.write(standard_input.fileno(), b"\n")

    downtime.go_on = go_on
    began, stopped = time.monotonic(), ""
    try:
        stopped = keeper.stdout.readline()
        failed = json.loads(stopped or '"the process that stops and starts services died"')
        raise_if_interrupted()
        if failed:
            raise Failure(f"mail could not be stopped; mend that: {failed}")
        yield
    finally:
        standard_input.close()
        answer = keeper.stdout.readline()
        keeper.wait()
        if answer:
            vars(downtime).update(json.loads(answer))
        else:  # it died
            listed = services_to_start(list_path, lines)
            downtime.not_started = start_services(manager, listed, list_path, not stopped)
            downtime.seconds = time.monotonic() - began
        if downtime.too_long:
            _Signals.raised = True  # the keeper's own
            raise Failure(f"mail was started again, for in {seconds} seconds nothing had come of "
                          "the backup; see which disk does not answer, or which large files are "
                          "written to, or directories moved, all the time")


def keep_services(list_path: Path, seconds: float, lines: Sequence[str]) -> int:
    """Stop services, wait for the end of standard input, start them again: the life of the keeper.

    The kernel closes the other end of standard input even when its holder is killed, and
    a stop that is under way then still ends before the start begins. No signal but
    SIGKILL disturbs it. It answers with two lines of JSON: why a service could not be
    stopped, empty if all are; then, when they are started again, a Downtime. list_path: lists the
    services from before the first stop until after the last start. seconds: how long it waits for
    anything to come on standard input; then it ends its parent with SIGTERM. lines: see
    ServiceManager, in the order in which they stop and start. Returns its exit code: 0, 5 if a
    service is down.
    """
    for number in (*ENDING_SIGNALS, signal.SIGPIPE):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which daemons would inherit
    with suppress(PermissionError):  # as in some containers
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # nor are they to inherit that of `nice backup.py`
    parent, manager = os.getppid(), service_manager(os.environ)
    listed = services_to_start(list_path, lines)  # what could not be started last night, too
    began, awake, too_long = time.monotonic(), "", False
    try:
        write_atomically(list_path, "\n".join(listed))
    except OSError as error:
        failed = f"cannot write {list_path}: {error.strerror}"
    else:
        failed = manager.stop(lines)
    _tell(failed)
    if not failed:
        while (ready := select.select([0], [], [], seconds)[0]) and os.read(0, BLOCK_BYTES):
            pass
        too_long = not ready
        if too_long:
            with suppress(ProcessLookupError):  # it may die just now
                os.kill(parent, signal.SIGTERM)
        awake = manager.awake(lines)
    not_started = start_services(manager, listed, list_path, bool(failed))
    _tell({"seconds": time.monotonic() - began, "not_started": not_started, "awake": awake,
           "too_long": too_long})
    return 5 if not_started else 0


def _tell(answer: object) -> None:
    """Print an answer of the keeper's; nobody may be there any more to read it."""
    with suppress(BrokenPipeError):
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    reset_signals()
    sys.exit(keep_services(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
