"""What the tests share: a throwaway mail store, a stand-in for `service`, and checks of a backup.

The stand-in records its calls; duplicity and gpg are the real ones.
"""

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Optional, Union

import pytest
from _pytest.mark import ParameterSet
from _pytest.terminal import TerminalReporter

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import backup  # noqa: E402
import utils  # noqa: E402

PYTHON = "/usr/bin/python3"
SCRIPT = PROJECT / "backup.py"
USER = "nobody"

# Keeps its state in files beside itself. `NAME.fails-ACTION` makes that action fail (its first
# line says how often), `NAME.hangs-ACTION` makes it hang for ever, `NAME.waits-ACTION` has it wait
# until that file is gone, for half a minute at most.
SERVICE = """#!/bin/sh
cd "${0%/*}" || exit 9
echo "$1 $2" >> calls
if [ -e "$1.hangs-$2" ]; then sleep 1000; fi
left=1000
while [ -e "$1.waits-$2" ] && [ $((left -= 1)) -gt 0 ]; do sleep 0.02; done
if [ -e "$1.fails-$2" ]; then
    times=$(cat "$1.fails-$2")
    if [ "$times" -gt 0 ]; then
        echo $((times - 1)) > "$1.fails-$2"
        echo "$1 will not $2"
        exit 7
    fi
fi
case $2 in
status) [ -e "$1.running" ] && exit 0; exit 3;;
stop) rm -f "$1.running";;
start) touch "$1.running";;
esac
"""

# All that is started here inherits it; under nohup it would be ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SUMMARY: list[str] = []  # what tests have to tell although they passed

# They wait much, or one process must run them all.
LONGEST = ["test_nights.py", "test_reading.py", "test_mail_server.py", "test_cron.py",
           "test_death.py", "test_restore.py"]

Result = subprocess.CompletedProcess[str]
Entry = tuple[object, ...]


class CopiedTime(int):
    """The mtime of a file in whole seconds: in a backup it may be a second earlier.

    That is so when the file was written in the very second in which it was copied.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int) and abs(self - other) <= 1

    def __hash__(self) -> int:
        return 0


def tree_of(root: Path, without: str = "backup") -> dict[str, Entry]:
    """Return all that a backup keeps of a tree, by relative path.

    That is kind, mode, owner, whole-second mtime, and content or link target.
    """
    found: dict[str, Entry] = {}
    for directory, directories, files in os.walk(os.fsencode(root)):
        if directory == os.fsencode(root) and without.encode() in directories:
            directories.remove(without.encode())
        itself = [b""] if directory == os.fsencode(root) else []
        for name in [*itself, *directories, *files]:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISSOCK(status.st_mode):
                continue
            # duplicity keeps mtimes in whole seconds; a symbolic link's mode and mtime are not
            # kept. The mtime of the root changes when backup/ is made in it.
            time = None if stat.S_ISLNK(status.st_mode) or not name else int(status.st_mtime)
            if time is not None and stat.S_ISREG(status.st_mode):
                time = CopiedTime(time)
            found[os.path.relpath(os.fsdecode(path), root)] = (
                stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode),
                status.st_uid, status.st_gid, time, content)
    return found


def pass_the_second_of(encrypted: Path) -> None:
    """Wait until what duplicity makes is dated after all that is in a directory.

    It dates sets in whole seconds. backup.py waits by itself, where there is a complete set. A set
    of the future is not waited for.
    """
    names = os.listdir(encrypted) if encrypted.exists() else []
    stamps = [stamp for name in names for stamp in re.findall(r"[0-9]{8}T[0-9]{6}Z", name)]
    if stamps:
        newest = datetime.strptime(max(stamps), "%Y%m%dT%H%M%S%z").timestamp()
        time.sleep(min(max(0.0, newest + 1 - time.time()), 1))


@dataclass
class Store:
    """A throwaway STORAGE_ROOT with its settings file and its stand-in for `service`."""

    root: Path
    settings: Path
    bin: Path
    scratch: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def backups(self) -> Path:
        """STORAGE_ROOT/backup."""
        return self.root / "backup"

    @property
    def encrypted(self) -> Path:
        """STORAGE_ROOT/backup/encrypted."""
        return self.backups / "encrypted"

    @property
    def stopped_list(self) -> Path:
        """The file in /run that lists the services that are to come back."""
        import backup
        return backup.work_of({"STORAGE_ROOT": str(self.root)}).stopped

    def command(self, *arguments: str) -> list[str]:
        """Return the command line that runs backup.py with the settings file."""
        return [PYTHON, str(SCRIPT), "--config", str(self.settings), *arguments]

    def program_for_others(self) -> Path:
        """Return the path of a copy of the program that every user can read.

        A clone in root's home is root's alone.
        """
        directory = self.scratch / "program-for-others"
        if not directory.exists():
            directory.mkdir()
            directory.chmod(0o755)
            for path in (SCRIPT, PROJECT / "utils.py"):
                shutil.copyfile(path, directory / path.name)
                (directory / path.name).chmod(0o755)
        return directory / SCRIPT.name

    def command_for_others(self, *arguments: str) -> list[str]:
        """Return the command line for another user than root."""
        return [PYTHON, str(self.program_for_others()), *self.command(*arguments)[2:]]

    def run(
        self, *command: Union[str, Path], exit_code: Optional[int] = 0,
        environment: Mapping[str, str] = {}
    ) -> Result:
        """Run any command in the store's environment and check its exit code (None: any)."""
        result = subprocess.run(
            [str(part) for part in command], env={**self.environment, **environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="surrogateescape")
        assert exit_code is None or result.returncode == exit_code, (
            f"{shlex.join(map(str, command))}: exit code {result.returncode}\n"
            f"{result.stdout}\n{result.stderr}")
        return result

    def backup(
        self, *arguments: str, exit_code: Optional[int] = 0, environment: Mapping[str, str] = {}
    ) -> Result:
        """Run backup.py and check its exit code (None: any); there never is a traceback."""
        result = self.run(*self.command(*arguments), exit_code=exit_code, environment=environment)
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def last_run(self) -> dict[str, Any]:
        """Return what last-run.json holds."""
        content = json.loads((self.backups / "last-run.json").read_text())
        assert isinstance(content, dict)
        return content

    def put_key(self) -> None:
        """Make backup/ and a key, so that the next run has nothing to tell."""
        self.backups.mkdir(mode=0o750, exist_ok=True)
        os.chown(self.backups, 0, pwd.getpwnam(USER).pw_gid)
        key = self.backups / "secret_key.txt"
        key.write_text("correct horse battery staple correct horse battery staple\n")
        key.chmod(0o600)

    def restore(self, name: str = "restored", *options: str) -> Path:
        """Restore into a fresh directory, and return that.

        Nothing is used but duplicity and the first line of the key.
        """
        target = self.scratch / name
        passphrase = (self.backups / "secret_key.txt").read_text().splitlines()[0].strip()
        environment = {"GNUPGHOME": str(self.gnupg())}
        self.run("duplicity", "restore", "--archive-dir", self.scratch / f"{name}-archive",
                 *options, self.encrypted.as_uri(), target,
                 environment={**environment, "PASSPHRASE": passphrase})
        self.run("gpgconf", "--kill", "all", environment=environment)
        return target

    def gnupg(self) -> Path:
        """Return a home for the store's own use of gpg.

        Its path is short: gpg-agent's socket needs that.
        """
        home = Path("/run", f"test-gnupg-{zlib.crc32(os.fsencode(self.root)):08x}")
        home.mkdir(mode=0o700, exist_ok=True)
        return home

    def assert_restores(self, name: str = "restored") -> None:
        """Check that a restore equals the tree, in every thing that a backup keeps."""
        assert tree_of(self.restore(name)) == tree_of(self.root)

    def clean(self) -> None:
        """End the agents that tests or killed runs have left, and remove what they made in /run."""
        import backup
        self.root.mkdir(exist_ok=True)  # a test may have moved it
        name = backup.work_of({"STORAGE_ROOT": str(self.root)}).gnupg.name.rpartition("-")[0]
        for home in [self.gnupg(), *Path("/run").glob(f"{name}-*")]:
            if home.exists():
                self.run("gpgconf", "--kill", "all", environment={"GNUPGHOME": str(home)})
                utils.remove(home)
        self.stopped_list.unlink(missing_ok=True)

    def manifests(self) -> list[str]:
        """Return the names of the complete sets' manifests, oldest first."""
        names = [path.name for path in self.encrypted.glob("*.manifest.gpg")]
        return sorted(names, key=lambda name: name.split(".manifest")[0][-16:])

    def changed_program(self, old: str, new: str) -> Path:
        """Return the path of a copy of the program in which something is another."""
        directory = self.scratch / "program"
        directory.mkdir()
        texts = {path: path.read_text() for path in (SCRIPT, PROJECT / "utils.py")}
        assert sum(text.count(old) for text in texts.values()) == 1
        for path, text in texts.items():
            (directory / path.name).write_text(text.replace(old, new))
        return directory / SCRIPT.name

    # The stand-in for `service`

    def calls(self, *actions: str) -> list[str]:
        """Return the calls of `service` so far, such as "postfix stop".

        All of them, or those of these actions.
        """
        path = self.bin / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not actions or line.split()[1] in actions]

    def forget_calls(self) -> None:
        """Begin anew with no calls."""
        (self.bin / "calls").unlink(missing_ok=True)

    def running(self) -> list[str]:
        """Return the services that run."""
        return sorted(path.stem for path in self.bin.glob("*.running"))

    def stand_in(self, program: str, script: str) -> None:
        """Put a script of our own before a program on PATH.

        "REAL" in it is the real program's path.
        """
        real = utils.find_program(program, backup.program_environment())
        path = self.bin / program
        path.write_bytes(os.fsencode(script.replace("REAL", real)))
        path.chmod(0o755)


def write_messages(root: Path) -> None:
    """Fill a STORAGE_ROOT with one of everything that a backup must keep."""
    mailbox = root / "mail" / "mailboxes" / "example.com" / "alice"
    for directory in ("cur", "new", "tmp", ".Sent/cur", ".Sent/new", ".Sent/tmp"):
        (mailbox / directory).mkdir(parents=True)
    for number in range(5):
        message = mailbox / "cur" / f"17000{number}.M1P1.host,S=20:2,S"
        message.write_text(f"Subject: message {number}\n\n" + "text\n" * 50 * number)
    (mailbox / "new" / "170010.M1P1.host").write_text("Subject: new\n")
    (mailbox / "dovecot.index").write_bytes(bytes(range(256)) * 20)
    (mailbox / "empty").touch()
    os.symlink("cur", mailbox / "link")
    os.symlink("/nowhere", mailbox / "dangling")
    os.mkfifo(mailbox / "fifo", 0o640)
    Path(os.fsdecode(os.fsencode(mailbox) + b"/cur/17001\xff\n.odd:2,")).write_text("odd\n")
    (root / "ssl").mkdir(mode=0o700)
    (root / "ssl" / "private.pem").write_text("secret")
    (root / "ssl" / "private.pem").chmod(0o600)
    user = pwd.getpwnam(USER)
    for directory_name, directories, files in os.walk(root / "mail"):
        for name in directories + files:
            path_name = os.path.join(directory_name, name)
            os.chown(path_name, user.pw_uid, user.pw_gid, follow_symlinks=False)
    for path in root.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)


def pytest_sessionstart() -> None:
    """Refuse to run where the program would stop this machine's own mail."""
    if os.path.isdir("/run/systemd/system"):
        pytest.exit("systemd is not hidden from the tests; run them with tests/run", returncode=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: so all processes of tests/run end at about the same time."""
    items.sort(key=lambda item: [*LONGEST, item.path.name].index(item.path.name))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Give what tests had to tell to the process that prints it, if this is a worker of it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["summary"] = SUMMARY


def pytest_testnodedown(node: Any) -> None:
    """Take it from a worker that has ended."""
    SUMMARY.extend(getattr(node, "workeroutput", {}).get("summary", []))


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Print what tests had to tell at the end of the run."""
    for line in SUMMARY:
        terminalreporter.write_line(line)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A small mail store with a settings file, no backup yet, and dovecot and postfix running.

    Both are stand-ins.
    """
    made = make_store(tmp_path)
    yield made
    made.clean()


def make_store(tmp_path: Path) -> Store:
    """Make such a store in an empty directory."""
    root, programs = tmp_path / "user-data", tmp_path / "bin"
    root.mkdir()
    programs.mkdir()
    for directory in (tmp_path, *tmp_path.parents):  # the hooks run as another user
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & 0o055 != 0o055:
            directory.chmod(mode | 0o055)
    write_messages(root)
    os.chown(root, pwd.getpwnam(USER).pw_uid, pwd.getpwnam(USER).pw_gid)
    (programs / "service").write_text(SERVICE)
    (programs / "service").chmod(0o755)
    for name in ("dovecot", "postfix"):
        (programs / f"{name}.running").touch()
    settings = tmp_path / "mailinabox.conf"
    settings.write_text(f"STORAGE_ROOT={root}\nSTORAGE_USER={USER}\n")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {
        **inherited, "PATH": f"{programs}:{os.environ['PATH']}", "TZ": "UTC", "LC_ALL": "C.UTF-8"}
    return Store(root, settings, programs, tmp_path, environment)


@pytest.fixture
def keyed(store: Store) -> Store:
    """The same with a key, so that a good run prints nothing."""
    store.put_key()
    return store


def copy_backups(made: Store, store: Store) -> None:
    """Put into a store the backup/ of another with an equal tree, as if its own."""
    if store.backups.exists():
        shutil.rmtree(store.backups)
    subprocess.run(["cp", "-a", made.backups, store.backups], check=True)


def long(*values: object) -> ParameterSet:
    """Return a set of parameters of a test that only .ci/run tries."""
    return pytest.param(*values, marks=pytest.mark.long)


OldNights = Callable[..., None]
FirstNight = Callable[..., None]


@pytest.fixture(scope="session")
def old_nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OldNights]:
    """What gives a keyed store nights by their ages, as faketime reads them, the oldest first.

    Each is made once and copied. An age of "" is that of a night which is made just then.
    """
    made: dict[tuple[str, ...], Store] = {}

    def give(store: Store, *ages: str) -> None:
        if ages not in made:
            made[ages] = make_store(tmp_path_factory.mktemp("old-nights"))
            made[ages].put_key()
            if ages[:-1]:
                give(made[ages], *ages[:-1])
            clock = ["faketime", ages[-1]] if ages[-1] else []
            assert made[ages].run(*clock, *made[ages].command()).stderr == ""
        copy_backups(made[ages], store)

    yield give
    for store in made.values():
        store.clean()


@pytest.fixture(scope="session")
def first_night(old_nights: OldNights) -> FirstNight:
    """What gives a keyed store its first night, or nights, where only what comes after matters.

    It does what `keyed.backup()` does, but with nights that are made once and copied.
    """
    return lambda store, nights=1: old_nights(store, *[""] * nights)
