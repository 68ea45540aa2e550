"""A mail server of the tests' own: real dovecot and postfix, on a machine that notices nothing.

They are on ports 143 and 25. `run_privately(scenario, directory)` starts this file again as the
first process of a private namespace, where processes, network, /etc, /run, /var/log and the
daemons' own directories are private, and there calls `scenario`, a function without arguments of a
test module. The directory is seen there as /var/mail, so that what a scenario leaves can be looked
at after the test. All the rest is for scenarios.
"""
from __future__ import annotations

import email
import email.message
import imaplib
import importlib
import os
import secrets
import shutil
import smtplib
import stat
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest

from conftest import CopiedTime

BACKUP_PROGRAM = Path(__file__).resolve().parent.parent / "backup.py"
# Readable by dovecot's users, which pytest's own temporary directories are not.
SHARED_DIRECTORY = Path("/var/mail")
STORAGE_ROOT = SHARED_DIRECTORY / "user-data"
STORAGE_USER = "data-of-tests"  # a user that no machine has
BACKUP_DIRECTORY = STORAGE_ROOT / "backup"
KEY_FILE = BACKUP_DIRECTORY / "secret_key.txt"
SETTINGS_FILE = Path("/etc/mailinabox.conf")
SERVICES = ("dovecot", "postfix")
SMTP_PORT = 25
IMAP_PORT = 143
LMTP_PORT = 10026
ADDRESS = "alice@example.com"
PASSWORD = "secret"
PROGRAMS = ("dovecot", "postfix", "cron", "duplicity", "gpg", "service")
SCENARIO_SECONDS = 600
WAIT_SECONDS = 30
POLL_SECONDS = 0.002
UNSHARE = ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc",
           "--propagation", "private")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/run/home",  # gpg and duplicity keep files in HOME: these must not get into root's
}

DOVECOT_CONFIGURATION = """\
protocols = imap lmtp
listen = 127.0.0.1
log_path = /var/log/dovecot.log
ssl = no
disable_plaintext_auth = no
mail_location = maildir:{storage_root}/mail/mailboxes/%d/%n
passdb {{
  driver = static
  args = password={password}
}}
userdb {{
  driver = static
  args = uid={user} gid={user} home={storage_root}/mail/homes/%d/%n
}}
service lmtp {{
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {lmtp_port}
  }}
}}
"""

POSTFIX_CONFIGURATION = f"""\
compatibility_level = 3.6
maillog_file = /var/log/postfix.log
myhostname = mail.example.com
mydestination =
alias_maps =
inet_interfaces = loopback-only
inet_protocols = ipv4
smtp_dns_support_level = disabled
smtp_host_lookup = native
smtpd_relay_restrictions = reject_unauth_destination
virtual_mailbox_domains = example.com
virtual_transport = lmtp:[127.0.0.1]:{LMTP_PORT}
"""


class Mail(NamedTuple):
    """A message as IMAP shows it."""
    flags: frozenset[bytes]
    content: bytes


# Outside: what pytest calls.

def run_privately(scenario: Callable[[], None], directory: Path) -> str:
    """Call `scenario` in a private namespace, with `directory` as /var/mail.

    Returns what it printed, and raises AssertionError if it failed.
    """
    require_namespaces()
    directory.chmod(0o755)
    log = directory / "log"
    # The log is a file because daemons that sysvinit starts inherit it: the reader of a pipe would
    # wait for them.
    with log.open("wb") as output:
        command = [*UNSHARE, sys.executable, __file__,
                   scenario.__code__.co_filename, scenario.__name__, str(directory)]
        try:
            outcome = str(subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=ENVIRONMENT,
                timeout=SCENARIO_SECONDS).returncode)
        except subprocess.TimeoutExpired:
            outcome = f"nothing within {SCENARIO_SECONDS} s"
    text = log.read_text(errors="replace")
    assert outcome == "0", f"{scenario.__name__} ended with {outcome}:\n{text}"
    return text


def require_namespaces() -> None:
    """Skip the test where there can be no private mail server.

    In continuous integration that fails: there it must be tested.
    """
    missing = [
        program for program in PROGRAMS if not shutil.which(program, path=ENVIRONMENT["PATH"])]
    if missing:
        reason = f'not installed: {", ".join(missing)}'
    else:
        probe = subprocess.run(
            [*UNSHARE, "true"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if probe.returncode == 0:
            return
        reason = f"no private namespaces here: {probe.stderr.strip()}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


# The first process of the namespace.

def main() -> None:
    """Make the machine private, run the scenario in a child and collect every process that ends.

    The first process must do that: without it `service dovecot stop` would wait for a dovecot that
    has ended, but is still a zombie.
    """
    test_module, scenario, directory = sys.argv[1:]
    make_private(Path(directory))
    child = os.fork()
    if child == 0:
        sys.exit(run_scenario(Path(test_module), scenario))
    ended = 0
    while ended != child:
        ended, status = os.wait()
    sys.exit(os.waitstatus_to_exitcode(status))


def run_scenario(test_module: Path, scenario: str) -> int:
    """Call the scenario and return the exit code.

    If it fails, print everything that may tell why, the error last.
    """
    sys.path.insert(1, str(BACKUP_PROGRAM.parent))  # some test modules import the program
    try:
        getattr(importlib.import_module(test_module.stem), scenario)()
    except Exception:
        for log in sorted(Path("/var/log").iterdir()):
            print(f"--- {log}", log.read_text(errors="replace"), sep="\n", flush=True)
        traceback.print_exc()
        return 1
    return 0


def make_private(directory: Path) -> None:
    """Give this namespace a network, /etc, /run and mail store of its own, and set mail up.

    The mail server is not started yet.
    """
    run("ip", "link", "set", "lo", "up")
    run("mount", "--bind", str(directory), str(SHARED_DIRECTORY))
    # /dev/shm: libfaketime leaves files there, named by process ids that mean others outside.
    mount_private_directories("/run", "/var/log", "/var/lib/dovecot", "/var/lib/postfix",
                              "/var/spool/postfix", "/dev/shm")
    for name in ("lock", "home", "etc-changes", "etc-work"):
        Path("/run", name).mkdir()
    layers = "lowerdir=/etc,upperdir=/run/etc-changes,workdir=/run/etc-work"
    run("mount", "-t", "overlay", "-o", layers, "private", "/etc")
    shutil.chown("/var/lib/postfix", "postfix", "postfix")
    run("useradd", "--system", "--user-group", "--no-create-home",
        "--shell", "/usr/sbin/nologin", STORAGE_USER)
    postfix_settings = Path("/etc/postfix/main.cf")
    postfix_settings.write_text(POSTFIX_CONFIGURATION)
    # Every postfix command sleeps while its settings are younger than two seconds.
    os.utime(postfix_settings, (0, 0))
    SETTINGS_FILE.write_text(f"STORAGE_ROOT={STORAGE_ROOT}\nSTORAGE_USER={STORAGE_USER}\n")
    configure_dovecot(STORAGE_ROOT)
    mailboxes = STORAGE_ROOT / "mail" / "mailboxes"
    mailboxes.mkdir(parents=True)
    for path in (STORAGE_ROOT, mailboxes.parent, mailboxes):
        shutil.chown(path, STORAGE_USER, STORAGE_USER)


def mount_private_directories(*directories: str) -> None:
    """Cover each directory, in this namespace only, with an empty one."""
    for directory in directories:
        run("mount", "-t", "tmpfs", "-o", "mode=755", "private", directory)


# Inside: what scenarios call.

def run(*command: str) -> None:
    """Run a command; its output goes to the scenario's log."""
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


def start_services() -> None:
    """Start dovecot and postfix and wait until both take connections."""
    for service in SERVICES:
        run("service", service, "start")
    wait_until(lambda: {IMAP_PORT, SMTP_PORT} <= listening_ports(), "both ports are open")


def configure_dovecot(storage_root: Path) -> None:
    """Have dovecot serve, from its next start on, the mail in `storage_root`."""
    Path("/etc/dovecot/dovecot.conf").write_text(DOVECOT_CONFIGURATION.format(
        storage_root=storage_root, user=STORAGE_USER, password=PASSWORD, lmtp_port=LMTP_PORT))


def serve_mail_of(storage_root: Path) -> None:
    """Restart dovecot with the mail in `storage_root`, such as a restored one."""
    configure_dovecot(storage_root)
    run("service", "dovecot", "restart")
    wait_until(lambda: IMAP_PORT in listening_ports(), "dovecot serves the other mail store")


def create_key() -> None:
    """Provide a key, so that the first run need not create one and say so."""
    BACKUP_DIRECTORY.mkdir(mode=0o750)
    KEY_FILE.touch(mode=0o600)
    KEY_FILE.write_text(secrets.token_urlsafe(48) + "\n")


def manifests() -> set[str]:
    """Return the names of the manifests in the backup: one for each complete set."""
    return {path.name for path in (BACKUP_DIRECTORY / "encrypted").glob("duplicity-*.manifest.gpg")}


def submit_message(subject: str) -> None:
    """Send Alice a message by SMTP; once this returns, postfix is answerable for it."""
    message = email.message.EmailMessage()
    message["From"] = "bob@example.org"
    message["To"] = ADDRESS
    message["Subject"] = subject
    message.set_content(f"The text of {subject}.\n" * 100)
    with smtplib.SMTP("127.0.0.1", SMTP_PORT, timeout=WAIT_SECONDS) as smtp:
        smtp.send_message(message)


def send_message(subject: str) -> None:
    """Send Alice a message by SMTP and wait until IMAP shows it."""
    submit_message(subject)
    wait_until(lambda: subject in subjects(imap_messages()), f"IMAP shows {subject}")


def open_inbox(readonly: bool) -> imaplib.IMAP4:
    """Log in as Alice on port 143 and open her inbox.

    Only an inbox that is not opened readonly moves its messages from new/ to cur/.
    """
    imap = imaplib.IMAP4("127.0.0.1", IMAP_PORT, timeout=WAIT_SECONDS)
    imap.login(ADDRESS, PASSWORD)
    imap.select(readonly=readonly)
    return imap


def imap_messages() -> list[Mail]:
    """Return what IMAP shows in Alice's inbox, oldest first, without changing anything in it."""
    with open_inbox(readonly=True) as imap:
        _, answer = imap.uid("FETCH", "1:*", "(FLAGS BODY.PEEK[])")
    return [Mail(frozenset(imaplib.ParseFlags(part[0])) - {br"\Recent"}, part[1])
            for part in answer if isinstance(part, tuple)]


def subjects(messages: list[Mail]) -> list[str]:
    """Return the subject of each message."""
    return [email.message_from_bytes(message.content)["Subject"] for message in messages]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Return as soon as `condition` holds; raise AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def listening_ports(process: int | str = "self") -> set[int]:
    """Return the TCP ports that take connections where a process runs, as the kernel tells.

    Really connecting would keep the daemons busy.
    """
    listening = "0A"
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local_address, _, state, *_ = line.split()
            if state == listening:
                ports.add(int(local_address.rpartition(":")[2], 16))
    return ports


class PortWatcher:
    """Watches both mail ports, every few milliseconds, for as long as the `with` block lasts.

    process: whose network they are in. `transitions` holds for each port the (monotonic time, open
    or not) at the start and at each change.
    """

    def __init__(self, process: int | str = "self") -> None:
        self.process = process
        self.transitions: dict[int, list[tuple[float, bool]]] = defaultdict(list)
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PortWatcher:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, exception: BaseException | None,
        trace: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._finished.wait(POLL_SECONDS):
            self._look()

    def _look(self) -> None:
        now, ports = time.monotonic(), listening_ports(self.process)
        for port in (SMTP_PORT, IMAP_PORT):
            seen = self.transitions[port]
            if not seen or seen[-1][1] != (port in ports):
                seen.append((now, port in ports))

    def states(self, port: int) -> list[bool]:
        """Return whether the port was open, at the start and after each change.

        [True, False, True] is one restart.
        """
        return [is_open for _, is_open in self.transitions[port]]

    def closed_seconds(self, port: int) -> float:
        """Return the time from when the port was first seen closed until it last opened."""
        changes = self.transitions[port][1:]
        opened = [at for at, is_open in changes if is_open]
        closed = [at for at, is_open in changes if not is_open]
        return max(opened) - min(closed)

    def has_been_down(self, port: int) -> bool:
        """Return whether the port was seen closed."""
        return False in self.states(port)


def running_commands(environment: str = "") -> list[str]:
    """Return the command lines of all processes here whose environment contains this text."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if environment.encode() in (process / "environ").read_bytes():
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append(line.decode(errors="replace"))
        except OSError:
            pass  # it has ended meanwhile
    return found


def describe_tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Return what a backup must keep of each file below `root`, backup/ left out.

    That is type and mode, owner, content, mtime. duplicity keeps whole seconds of the mtime, and
    none of a symbolic link.
    """
    tree: dict[str, tuple[object, ...]] = {}
    for path in [root, *root.rglob("*")]:
        name = path.relative_to(root)
        if name.parts[:1] == ("backup",):
            continue
        status = path.lstat()
        kept = (stat.filemode(status.st_mode), status.st_uid, status.st_gid)
        if path.is_symlink():
            tree[str(name)] = (*kept, os.readlink(path))
        else:
            content = path.read_bytes() if path.is_file() else None
            tree[str(name)] = (*kept, content, CopiedTime(status.st_mtime))
    return tree


if __name__ == "__main__":
    main()
