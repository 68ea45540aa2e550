"""What backup.py needs of the operating system. Nothing in here knows what a backup is.

Settings file, safe files and directories, the lock, signals, the one gateway through which programs run, and services that come
back whatever happens. Run as a program this file is the keeper: the small process that stops services and starts them again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pwd
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any, Optional

SYSTEM_DIRECTORIES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAIL_LINES = 25
LONGEST_LINE_BYTES = 10_000
SERVICE_SECONDS = 120
ENDING_SECONDS = 10
LOCK_SECONDS = 10
START_ATTEMPTS = 3
TIMED_OUT = 124
NOT_EXECUTABLE = 126
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


TakeLine = Callable[[str], None]


class Failure(Exception):
    """One sentence for the admin: what failed, on which path, what to do.

    message: the sentence, without a final full stop.
    exit_code: what the program exits with when nothing handles the failure.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(BaseException):
    """A signal asks the program to end; not an Exception, so that nothing that only goes on after failures swallows it.

    number: the signal's number. exit_code: 128 and that.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


# Text and settings


def printable(text: str) -> str:
    r"""Return text with everything that a terminal or a mail could mistake written as an escape: a byte that is not UTF-8 as \xNN."""
    def escape(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()
    return "".join(map(escape, text))


def load_environment(path: Path) -> dict[str, str]:
    """Read a settings file of KEY=VALUE lines; blank lines and lines that begin with # are passed over.

    path: the file. Returns the values by key, white space around both removed. Raises Failure (exit code 2) if the file cannot be
    read, or if a line is not of that form or gives a key a second, different value.
    """
    try:
        lines = os.fsdecode(path.read_bytes()).splitlines()
    except OSError as error:
        raise Failure(f"cannot read the settings file {path}: {error.strerror}; name another with --config", 2) from error
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or "\0" in value:
            raise Failure(f"line {number} of the settings file {path} is not of the form KEY=VALUE; correct it", 2)
        if settings.setdefault(key, value) != value:
            raise Failure(f"line {number} of the settings file {path} gives {key} a second value; remove one of them", 2)
    return settings


def system_path(path: str) -> str:
    """Return a PATH with the standard system directories appended: cron's PATH lacks /usr/sbin."""
    return f"{path}:{SYSTEM_DIRECTORIES}" if path else SYSTEM_DIRECTORIES


# Files and directories


def check_owned_directory(path: Path) -> os.stat_result:
    """Check that path is a directory, not a symbolic link, that only root can write to.

    Returns its status. Raises Failure (exit code 2) if it is anything else, FileNotFoundError if it is missing.
    """
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a directory"
        raise Failure(f"{path} is {kind}; put a directory owned by root in its place", 2)
    if status.st_uid != os.geteuid():
        raise Failure(f"{path} is not owned by root; check who made it, then run: chown root {path}", 2)
    if status.st_mode & 0o022:
        raise Failure(f"{path} can be written to by others than root; check what is in it, then run: chmod go-w {path}", 2)
    return status


def make_owned_directory(path: Path, mode: int, group: int) -> None:
    """Make a directory of root's with this mode and group (a group id), or give an existing one of root's both.

    Raises Failure (exit code 2) if something else stands there.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = check_owned_directory(path)
    if status.st_gid != group:
        os.chown(path, -1, group)
    if stat.S_IMODE(status.st_mode) != mode:
        path.chmod(mode)


def sync_directory(path: Path) -> None:
    """Force a directory's entries (what was made, renamed or removed in it) to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Force a file and its name to the disk; of a symbolic link only the name."""
    if not path.is_symlink():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_directory(path.parent)


def write_atomically(path: Path, content: str, mode: int = 0o600, group: int = -1) -> None:
    """Write a file so that at any instant the old or the new content is there, whole; a symbolic link at path is replaced.

    content: the new text. mode: its permissions. group: its group id, -1 for the caller's.
    """
    temporary = path.with_name(f".{path.name}.new")  # always the same, so that a killed run leaves one at most
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchown(stream.fileno(), -1, group)
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def regular_files(directory: Path) -> dict[str, int]:
    """Return the sizes in bytes of the regular files in a directory by name; none if it is missing. Links are not followed."""
    sizes: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    return sizes


def tree_size(path: Path) -> int:
    """Return the bytes that a file or a tree takes on the disk, 0 if it is missing."""
    total = path.lstat().st_blocks * 512 if os.path.lexists(path) else 0
    for directory, names, files in os.walk(path):
        for name in names + files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total


def count_entries(root: Path, excluded: Path) -> int:
    """Return how many entries a tree has, itself included: files of every kind but sockets, less the excluded path and all below it."""
    count = 1
    pending = [os.fspath(root)]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                try:
                    if entry.path == os.fspath(excluded) or stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                        continue
                except OSError:  # gone, or unreadable: duplicity tells of that
                    continue
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
    return count


def move_file(source: Path, target: Path) -> None:
    """Rename a file, or where target is on another file system: copy it, sync, then delete it; at any instant one of the two is whole.

    target: nothing stands there yet.
    """
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    copy = target.with_name(f".{target.name}.copy")
    copy.unlink(missing_ok=True)
    shutil.copy2(source, copy, follow_symlinks=False)
    sync_file(copy)
    os.rename(copy, target)
    sync_directory(target.parent)
    source.unlink()


def remove_tree(path: Path) -> None:
    """Remove a directory and all that is in it; what somebody else removes meanwhile, as an agent its sockets, is fine."""
    def pass_over(_function: object, _path: object, info: Any) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]
    shutil.rmtree(path, onerror=pass_over)


def remove(path: Path) -> None:
    """Remove a file, or a directory with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha1_of(path: Path) -> str:
    """Return the SHA-1 of a file in hexadecimal."""
    digest = hashlib.sha1()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Return the bytes free for everybody, not only for root, on the file system of path."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def total_bytes(path: Path) -> int:
    """Return the size in bytes of the file system of path."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


# The lock


@contextlib.contextmanager
def exclusive_process(path: Path) -> Iterator[int]:
    """Hold the lock file while the block runs; the kernel releases it when its last holder dies, so it is never stale.

    path: the lock file, made if it is missing, never deleted, never followed if it is a symbolic link. Yields its descriptor, for
    a child process to hold on to. Raises Failure: exit code 4 if another process has it, 2 if path is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise Failure(f"the lock {path} is not a regular file; remove it", 2) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Failure(f"the lock {path} is not a regular file; remove it", 2)
        if not _lock_soon(descriptor, fcntl.LOCK_EX, 0.1):  # is_locked may hold it for an instant
            holder = printable(os.fsdecode(os.read(descriptor, 200))) or "which has only just begun"
            raise Failure(f"another run ({holder}) holds the lock {path}; wait for it to end", 4)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}, since {datetime.now().astimezone().isoformat(' ', 'seconds')}".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _lock_soon(descriptor: int, kind: int, seconds: float) -> bool:
    """Lock a file, trying for some seconds if others have it. kind: fcntl.LOCK_EX or LOCK_SH. Returns whether it did."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)


@contextlib.contextmanager
def directory_locked(path: Path, exclusive: bool) -> Iterator[bool]:
    """Hold a lock on a directory while the block runs: exclusive, if it can be had at once, or shared, if it can within ten seconds.

    Yields whether it is held.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield _lock_soon(descriptor, fcntl.LOCK_EX, 0) if exclusive else _lock_soon(descriptor, fcntl.LOCK_SH, LOCK_SECONDS)
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Tell whether a process holds the lock file exclusively."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


# Signals


class _Signals:
    """Which signal has come, and whether it has to wait: a handler has nowhere but module state to keep them."""

    came: Optional[int] = None
    raised = False
    deferrals = 0


def _on_signal(number: int, _frame: Optional[FrameType]) -> None:
    _Signals.came = _Signals.came or number
    _raise_signal()


def _raise_signal() -> None:
    """Raise the first signal that came, once, and not while signals are deferred: ending in good order is never itself interrupted."""
    if _Signals.came and not _Signals.raised and not _Signals.deferrals:
        _Signals.raised = True
        raise Interrupted(_Signals.came)


def end_on_signals() -> None:
    """Make SIGTERM, SIGINT and SIGHUP raise Interrupted; a SIGHUP that was ignored at the start, as under nohup, stays ignored."""
    for number in ENDING_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Let a signal that comes while the block runs raise Interrupted only after it."""
    _Signals.deferrals += 1
    try:
        yield
    finally:
        _Signals.deferrals -= 1
        _raise_signal()


# Programs


def open_closed_streams() -> None:
    """Open /dev/null in place of standard streams that are closed: a pipe or a lock would take their numbers, and programs use them."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number, which is this one
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r"))


@dataclass(frozen=True)
class Finished:
    """How a program ended. exit_code: negative if by a signal, as in subprocess. last_lines: the end of what it printed, escaped."""

    exit_code: int
    last_lines: tuple[str, ...]

    def __str__(self) -> str:
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return "\n".join([how, *(f"    {line}" for line in self.last_lines)])


def find_program(name: str, environment: Mapping[str, str]) -> str:
    """Return the path of a program on the PATH of environment. Raises Failure (exit code 2) if it is not there."""
    found = shutil.which(name, path=environment["PATH"])
    if not found:
        raise Failure(f"{name} is not installed: no such program in {environment['PATH']}; install it", 2)
    return found


def shell(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    secret: str = "",
    standard_input: str = "",
    user: Optional[pwd.struct_passwd] = None,
    umask: int = -1,
    starts_daemons: bool = False,
    timeout_seconds: float = math.inf,
    on_line: TakeLine = lambda line: None,
    on_log: Optional[TakeLine] = None,
    watch: Callable[[], None] = lambda: None,
) -> Finished:
    """Run a program and wait for it: the one gateway for all of them. No shell reads the command.

    command: program and arguments; in one that ends in "=LOG" that word becomes the number of a descriptor whose lines go to
    on_log. environment: all of the program's environment. secret: hidden in whatever the program prints. standard_input: a few
    lines for it to read. user: run as this user, with its groups. umask: -1 for the caller's. starts_daemons: they would hold an
    output pipe open for ever, so a file takes the output. timeout_seconds: then it is ended, with exit code 124. on_line, on_log:
    called for each line as it comes, escaped. watch: called every second; what it raises ends the program. Returns how it ended,
    with exit code 126 if it could not be executed. The program and its process group have ended when an exception leaves.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def take_line(line: str) -> None:
        line = line.replace(secret, "[secret]") if secret else line
        tail.append(line)
        on_line(line)

    identity: dict[str, Any] = {}
    if user:
        groups = os.getgrouplist(user.pw_name, user.pw_gid)
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": groups}
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(_file_to(take_line) if starts_daemons else _pipe_to(take_line))
        log = [stack.enter_context(_pipe_to(on_log))] if on_log else []
        arguments = [part.removesuffix("LOG") + str(*log) if part.endswith("=LOG") else part for part in command]
        try:
            with signals_deferred():
                process = subprocess.Popen(
                    arguments, env=environment, stdin=subprocess.PIPE if standard_input else subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, cwd="/", pass_fds=log, start_new_session=True, umask=umask, **identity)
                stack.callback(_end_group, process)
        except OSError as error:
            return Finished(NOT_EXECUTABLE, (f"{printable(command[0])}: {error.strerror}",))
        if process.stdin:
            with contextlib.suppress(BrokenPipeError), process.stdin as stream:
                stream.write(standard_input.encode("utf-8", "surrogateescape"))
        in_time = _wait(process, timeout_seconds, watch)
    if not in_time:
        tail.append(f"no answer within {timeout_seconds:.0f} seconds")
    return Finished(process.returncode if in_time else TIMED_OUT, tuple(tail))


@contextlib.contextmanager
def _pipe_to(take_line: TakeLine) -> Iterator[int]:
    """Yield the writing end of a pipe whose lines a thread passes on; all that came before the block ended has been passed on then."""
    reading, writing = os.pipe()

    def read_lines() -> None:
        with os.fdopen(reading, "rb") as stream:
            while line := stream.readline(LONGEST_LINE_BYTES):
                take_line(printable(os.fsdecode(line.rstrip(b"\r\n"))))

    reader = threading.Thread(target=read_lines, daemon=True)
    reader.start()
    try:
        yield writing
    finally:
        os.close(writing)
        reader.join(timeout=1)  # a process left in the background may hold the pipe: its output is nobody's business


@contextlib.contextmanager
def _file_to(take_line: TakeLine) -> Iterator[int]:
    """Yield a file in memory (a full disk must not keep a service down); its last lines are passed on when the block ends."""
    with os.fdopen(os.memfd_create("output"), "r+b") as stream:
        yield stream.fileno()
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_LINES * LONGEST_LINE_BYTES))
        for line in stream.read().splitlines()[-TAIL_LINES:]:
            take_line(printable(os.fsdecode(line)))


def _wait(process: "subprocess.Popen[bytes]", timeout_seconds: float, watch: Callable[[], None] = lambda: None) -> bool:
    """Wait for a program, watching it every second. Returns whether it ended in time."""
    deadline = time.monotonic() + timeout_seconds
    descriptor = os.pidfd_open(process.pid)
    try:
        while not select.select([descriptor], [], [], max(0.0, min(1.0, deadline - time.monotonic())))[0]:
            if time.monotonic() >= deadline:
                return False
            watch()
    finally:
        os.close(descriptor)
    process.wait()
    return True


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a program that still runs, and all of its process group: SIGTERM, at most ten seconds later SIGKILL."""
    if process.returncode is None:
        with signals_deferred(), contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            _wait(process, ENDING_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Services that come back


@dataclass
class Downtime:
    """What became of the services. seconds: from the first stop to the last start. not_started: what a service that could not be
    started again said last, by name.
    """

    seconds: float = 0.0
    not_started: dict[str, str] = field(default_factory=dict)


def control_service(name: str, action: str, environment: Mapping[str, str]) -> Finished:
    """Run `service NAME ACTION`, with 120 seconds to answer, and return how it ended: status answers 0 for a running service."""
    return shell(["service", name, action], environment, starts_daemons=True, timeout_seconds=SERVICE_SECONDS)


def running_services(names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return those of the services that run. Raises Failure if one of them does not answer."""
    answers = {name: control_service(name, "status", environment) for name in names}
    for name, answer in answers.items():
        if answer.exit_code in (TIMED_OUT, NOT_EXECUTABLE):
            raise Failure(f"it cannot be told whether {name} runs; mend it first: service {name} status ended with {answer}")
    return [name for name, answer in answers.items() if answer.exit_code == 0]


def start_services(names: Sequence[str], list_path: Path, environment: Mapping[str, str]) -> Downtime:
    """Start services in this order, each up to three times, every one even when another fails.

    A start is believed when the service runs after it: of a postfix with a broken main.cf it exits 0 (seen: 3.7.11).
    list_path: the file that lists the services that are to come back: afterwards those that could not be started, else gone.
    Returns what each of those said last, and when, in seconds of the monotonic clock, the last start ended.
    """
    failed = dict.fromkeys(names, "")
    ended = 0.0
    for attempt in range(START_ATTEMPTS):
        if failed:
            time.sleep(min(attempt, 1))
            answers = {name: control_service(name, "start", environment) for name in failed}
            ended = time.monotonic()
            answers.update({name: control_service(name, "status", environment) for name in failed if not answers[name].exit_code})
            failed = {name: str(answer) for name, answer in answers.items() if answer.exit_code}
    if failed:
        with contextlib.suppress(OSError):  # where /run is full the list of before stays, and the exit code tells of them all the same
            write_atomically(list_path, "".join(f"{name}\n" for name in failed))
    else:
        list_path.unlink(missing_ok=True)
    return Downtime(ended, failed)


@contextlib.contextmanager
def services_stopped(
    names: Sequence[str], list_path: Path, environment: Mapping[str, str], lock: int, downtime: Downtime
) -> Iterator[None]:
    """Stop the services of names that run while the block runs, and start them again whatever happens, even to this process.

    A keeper (see keep_services) does both. names: in the order in which they start. list_path: where the keeper notes what it
    stops. environment: with a PATH on which `service` is. lock: a descriptor that the keeper holds until the services are back.
    downtime: filled in at the end. Raises Failure if a service cannot be stopped; all are started again then.
    """
    running = running_services(names, environment)
    if not running:
        yield
        return
    began = time.monotonic()
    keeper = None
    try:
        with signals_deferred():
            keeper = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), os.fspath(list_path), *running], env=environment, text=True, cwd="/",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[lock], start_new_session=True)
        failed = json.loads(_stream(keeper.stdout).readline() or '"the process that stops and starts services died"')
        if failed:
            raise Failure(f"mail was not stopped, and services are started again: {failed}")
        yield
    finally:
        with signals_deferred():
            if keeper:
                _stream(keeper.stdin).close()
                answer = json.loads(_stream(keeper.stdout).readline() or "null")
                keeper.wait()
                back = Downtime(**answer) if answer else start_services(running, list_path, environment)
                downtime.not_started, downtime.seconds = back.not_started, back.seconds - began


def _stream(stream: Optional[IO[str]]) -> IO[str]:
    """Return a pipe of a program that was started with one."""
    assert stream is not None
    return stream


def keep_services(names: Sequence[str], list_path: Path) -> int:
    """Stop services, say so, wait for the end of standard input, start them again: the life of the keeper.

    The kernel closes the other end of standard input even when its holder is killed, and a stop that is under way then still ends
    before the start begins. No signal but SIGKILL disturbs it. It answers with two lines of JSON: null, or why a service could not
    be stopped; then what could not be started, and the seconds of downtime. names: in the order in which they start. list_path:
    lists the services from before the first stop until after the last start. Returns its exit code: 0, 1 if nothing was stopped,
    5 if a service is down.
    """
    for number in (*ENDING_SIGNALS, signal.SIGPIPE):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the daemons that it starts would inherit
    environment = dict(os.environ)
    try:
        write_atomically(list_path, "".join(f"{name}\n" for name in names))
    except OSError as error:
        _tell(f"cannot write {list_path}: {error.strerror}")
        return 1
    failed = None
    for name in reversed(names):
        answer = control_service(name, "stop", environment)
        if answer.exit_code:
            failed = f"service {name} stop ended with {answer}"
            break
    _tell(failed)
    if not failed:
        sys.stdin.read()
    back = start_services(names, list_path, environment)
    _tell(asdict(back))
    return 5 if back.not_started else 0


def _tell(answer: object) -> None:
    """Print an answer of the keeper's; nobody may be there any more to read it."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(keep_services(sys.argv[2:], Path(sys.argv[1])))
