"""Counts the instants of a run, and strikes at one of them.

An instant is a change of the file system by a Python process of the run, or its start of
a program. Python imports this at its start where PYTHONPATH names the directory: in
backup.py, in its keeper and in duplicity alike. It reads from its environment:
FAULT_DIRECTORY, where it keeps its count; FAULT_PREFIXES, the paths whose changes count,
separated by colons; FAULT_AT, the number of the instant, 0 for none; FAULT_KIND:
`script` kills with SIGKILL the script and all its children but the keeper, `keeper` the
keeper as well, and the number of a signal is sent to the script alone. An audit event
comes before what it announces is done: the state after the last change of one instant is
the state before the next.
"""

import fcntl
import os
import signal
import sys
from pathlib import Path

DIRECTORY = os.environ.get("FAULT_DIRECTORY", "")
PREFIXES = tuple(os.environ.get("FAULT_PREFIXES", "").split(":"))
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link",
           "os.symlink", "os.truncate", "os.utime"}
STARTS = {"subprocess.Popen", "os.posix_spawn", "os.fork"}


def matters(event: str, arguments: tuple[object, ...]) -> bool:
    """Tell whether an audit event announces a change below a prefix, or the start of a program."""
    if event in STARTS:
        return True
    if event == "open":
        flags = arguments[2]
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event not in CHANGES:
        return False
    subject = arguments[0]
    if isinstance(subject, int):  # a descriptor: of a file that was opened for it
        return True
    if not isinstance(subject, (str, bytes)):
        return False
    path = os.fsdecode(subject)
    if not path.startswith("/"):
        # Relative to an open directory, which is an event's last argument, but for "open".
        if event == "open":
            return True
        directory = arguments[-1]
        is_open = isinstance(directory, int) and directory >= 0
        place = os.readlink(f"/proc/self/fd/{directory}") if is_open else os.getcwd()
        path = os.path.join(place, path)
    return path.startswith(PREFIXES)


def descendants(process: int, but: int) -> list[int]:
    """Return a process and all that descend from it, but for one and its descendants."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                status = Path("/proc", name, "stat").read_text()
                parents[int(name)] = int(status.rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found = [process]
    for parent in found:
        found += [child for child, its_parent in parents.items()
                  if its_parent == parent and child != but]
    return found


def strike(kind: str) -> None:
    """Do what FAULT_KIND says."""
    script = int(Path(DIRECTORY, "script").read_text())
    keeper_file = Path(DIRECTORY, "keeper")
    keeper = int(keeper_file.read_text()) if keeper_file.exists() else 0
    if kind not in ("script", "keeper"):
        os.kill(script, int(kind))
        return
    victims = descendants(script, keeper if kind == "script" else 0)
    for process in sorted(victims, key=lambda process: process == os.getpid()):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def count(event: str, arguments: tuple[object, ...]) -> None:
    """Count an instant, in all processes together, and strike at the one that was asked for."""
    if not busy and matters(event, arguments):
        busy.append(True)
        try:
            path = Path(DIRECTORY, "count")
            with open(path, "a+", encoding="utf-8", errors="backslashreplace") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                stream.seek(0)
                number = sum(1 for _ in stream) + 1
                print(os.path.basename(sys.orig_argv[1]), event, ascii(arguments[:2]), file=stream)
            if number == int(os.environ["FAULT_AT"]):
                strike(os.environ["FAULT_KIND"])
        finally:
            busy.clear()


busy: list[bool] = []
if DIRECTORY:
    program = os.path.basename(sys.orig_argv[1]) if len(sys.orig_argv) > 1 else ""
    if program in ("backup.py", "utils.py"):
        name = "script" if program == "backup.py" else "keeper"
        Path(DIRECTORY, name).write_text(str(os.getpid()))
    if program in ("backup.py", "utils.py", "duplicity"):
        sys.addaudithook(count)
