"""A machine of the tests' own with systemd as process 1: a Debian in namespaces.

It has dovecot, postfix and cron as a real one.

What a Debian release needs is installed once, into a directory that is kept for the next run of the
tests; each machine is an overlay on that, and all that it writes is gone when it ends. The program
under test is in /opt/backup there, the mail store in /home/user-data.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from private_mail_server import IMAP_PORT, SMTP_PORT, listening_ports, wait_until

PROJECT = Path(__file__).resolve().parent.parent
SYSTEMS = Path("/var/cache/backup-tests")
PACKAGES = ("systemd", "systemd-sysv", "dbus", "cron", "libpam-systemd", "procps", "iproute2",
            "duplicity", "gpg", "gpg-agent", "python3-dateutil", "dovecot-imapd", "dovecot-lmtpd",
            "postfix")
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STORAGE_ROOT = "/home/user-data"
BACKUP = "/opt/backup/backup.py"
MAIL_PORTS = {IMAP_PORT, SMTP_PORT}
CONTROL_GROUPS = Path("/sys/fs/cgroup")

# Of each release the units that run for dovecot and for postfix, of which the last is the daemon's.
UNITS = {"bookworm": ("dovecot.service", "postfix.service postfix@-.service"),
         "trixie": ("dovecot.service", "postfix.service")}

DOVECOT = {
    "bookworm": """\
disable_plaintext_auth = no
mail_location = maildir:/home/user-data/mail/mailboxes/%d/%n
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=user-data gid=user-data home=/home/user-data/mail/homes/%d/%n
}
""",
    "trixie": """\
dovecot_config_version = 2.4.0
dovecot_storage_version = 2.4.0
auth_allow_cleartext = yes
mail_driver = maildir
mail_path = /home/user-data/mail/mailboxes/%{user | domain}/%{user | username}
passdb static {
  password = secret
}
userdb static {
  fields {
    uid = user-data
    gid = user-data
    home = /home/user-data/mail/homes/%{user | domain}/%{user | username}
  }
}
"""}

POSTFIX = """\
compatibility_level = 3.6
myhostname = mail.example.com
mydestination =
alias_maps =
inet_interfaces = loopback-only
inet_protocols = ipv4
"""

# The first process of the namespaces: it makes the directory a machine's root, then is systemd.
BOOT = """\
set -eu
cd "$1"
mount --make-rprivate /
mkdir root
mount -t overlay -o "lowerdir=$2,upperdir=$1/changes,workdir=$1/work" machine root
cd root
mkdir -p opt/backup home old
mount --bind "$3" opt/backup
mount --bind "$1/home" home
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
if [ "$4" = legacy ]; then
    mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
    mkdir sys/fs/cgroup/unified sys/fs/cgroup/memory sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
    mount -t cgroup -o memory memory sys/fs/cgroup/memory
    mount -t cgroup -o none,name=systemd systemd sys/fs/cgroup/systemd
else
    mount -t cgroup2 cgroup2 sys/fs/cgroup
fi
mount -t tmpfs -o mode=755 dev dev
for device in null zero full random urandom tty; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
mknod dev/loop-control c 10 237
for number in $(seq 0 63); do mknod dev/loop$number b 7 "$number"; done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
ip link set lo up
pivot_root . old
umount --lazy old
exec env -i container=tests SYSTEMD_PROC_CMDLINE=SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1 "$5" \\
    /lib/systemd/systemd --unit=multi-user.target
"""


def mirror_of_debian() -> str:
    """Return the address from which this machine's apt has its packages of Debian 12."""
    mirrors = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages",
         "Origin: Debian", "Codename: bookworm"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert mirrors, "apt has no source of Debian 12 here"
    return mirrors[0]


def debootstrap(release: str, directory: Path) -> None:
    """Make a Debian with nothing but what every Debian has."""
    log = subprocess.run(
        ["debootstrap", "--variant=minbase", release, str(directory), mirror_of_debian()],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert log.returncode == 0, log.stdout


def run_in(system: Path, *command: str, standard_input: str = "") -> None:
    """Run a command as root of another system that is not running, with hardly an environment."""
    words = ["chroot", str(system), "env", "-i", PATH, "HOME=/root",
             "DEBIAN_FRONTEND=noninteractive"]
    subprocess.run([*words, *command], input=standard_input, text=True, check=True)


def kept_system(name: str, make: Callable[[Path], None]) -> Path:
    """Return the directory of a system that is kept. make: fills a new one if it is missing."""
    system, half = SYSTEMS / name, SYSTEMS / f"{name}.half"
    SYSTEMS.mkdir(parents=True, exist_ok=True)
    with (SYSTEMS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not system.exists():
            shutil.rmtree(half, ignore_errors=True)
            make(half)
            half.rename(system)
    return system


def installed_system(release: str) -> Path:
    """Return the directory of a Debian with mail services and what a backup needs.

    It is made if it is missing.
    """
    def install(system: Path) -> None:
        debootstrap(release, system)
        no_service = system / "usr/sbin/policy-rc.d"
        no_service.write_text("#!/bin/sh\nexit 101\n")
        no_service.chmod(0o755)
        run_in(system, "debconf-set-selections",
               standard_input="postfix postfix/main_mailer_type select No configuration\n")
        run_in(system, "apt-get", "update")
        run_in(system, "apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
        run_in(system, "apt-get", "clean")
        no_service.unlink()

    return kept_system(release, install)


def system_for_tests(release: str) -> Path:
    """Return the directory of the same with all that the tests need; made if it is missing."""
    installed_system(release)

    def install(system: Path) -> None:
        subprocess.run(["cp", "-aT", SYSTEMS / release, system], check=True)
        subprocess.run(["cp", "-r", PROJECT, system / "clone"], check=True)
        run_in(system, "/clone/tests/run", "--version")
        shutil.rmtree(system / "clone")

    return kept_system(f"{release}-tests", install)


class Machine:
    """A running machine.

    release: of Debian. first: the process id here of its systemd. home: what is /home there.
    """

    def __init__(self, release: str, first: int, home: Path) -> None:
        self.release, self.first, self.home = release, first, home
        self.postfix = UNITS[release][1].split()[-1]

    def command(self, *command: str) -> list[str]:
        """Return the command that runs a command in the machine."""
        enter = ["nsenter", "--target", str(self.first), "--mount", "--pid", "--net", "--uts",
                 "--ipc", "--cgroup", "--root", "--wd"]
        return [*enter, "env", "-i", PATH, "HOME=/root", "LC_ALL=C.UTF-8", *command]

    def run(self, *command: str, exit_code: int | None = 0) -> str:
        """Run a command in the machine, check its exit code (None: any), return what it printed."""
        result = subprocess.run(self.command(*command), stdin=subprocess.DEVNULL, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert exit_code is None or result.returncode == exit_code, (
            f"{command}: exit code {result.returncode}\n{result.stdout}")
        return result.stdout

    def shell(self, script: str) -> str:
        """Run lines of bash in the machine, to the first that fails; return what they printed."""
        return self.run("bash", "-euc", script)

    def succeeds(self, script: str) -> bool:
        """Return whether a line of shell succeeds in the machine."""
        result = subprocess.run(self.command("sh", "-c", script), stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return result.returncode == 0

    def back_up(self, *arguments: str, exit_code: int = 0) -> str:
        """Run the program as a unit of its own, see run. Returns what it printed."""
        return self.run("systemd-run", "--quiet", "--wait", "--pipe", "--collect",
                        BACKUP, *arguments, exit_code=exit_code)

    def state(self, unit: str) -> str:
        """Return the state of a unit, such as active."""
        return self.run("systemctl", "is-active", unit, exit_code=None).strip()

    def states(self) -> dict[str, str]:
        """Return the states of all units that are not inactive, by name."""
        listed = self.run("systemctl", "list-units", "--plain", "--no-legend", "--no-pager")
        return {row[0]: row[2] for row in map(str.split, listed.splitlines())}

    def ports(self) -> set[int]:
        """Return the ports that take connections."""
        return listening_ports(self.first)

    def greetings(self) -> list[str]:
        """Return how dovecot and postfix greet a client."""
        return [self.shell(f"exec 3<>/dev/tcp/127.0.0.1/{port}; head -n 1 <&3 | head -c 4")
                for port in (IMAP_PORT, SMTP_PORT)]

    def drop_in(self, unit: str, name: str, text: str) -> None:
        """Add settings to a unit."""
        directory = f"/etc/systemd/system/{unit}.d"
        self.shell(f"mkdir -p '{directory}'; "
                   f"printf '%b' '[Service]\\n{text}\\n' > '{directory}/{name}.conf'; "
                   "systemctl daemon-reload")

    def remove_drop_in(self, unit: str, name: str) -> None:
        """Take them back."""
        self.shell(f"rm '/etc/systemd/system/{unit}.d/{name}.conf'; systemctl daemon-reload")

    def is_over(self) -> bool:
        """Return whether the machine has been shut down."""
        return not Path(f"/proc/{self.first}").exists()

    def wait_for_ports(self, seconds: float) -> None:
        """Wait until both mail services take connections."""
        wait_until(lambda: self.ports() >= MAIL_PORTS, "both ports are open", seconds)


def groups_of_this_process() -> Iterator[Path]:
    """Yield the control group that this process is in, of each hierarchy that systemd uses."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        for _, place, kind, options, *_ in mounts:
            if kind == ("cgroup" if controllers else "cgroup2") and (
                    set(controllers.split(",")) <= set(options.split(",")) or not controllers):
                if controllers not in ("cpuset", "freezer"):
                    yield Path(place + group.rstrip("/"))
                break


@contextlib.contextmanager
def control_groups(name: str) -> Iterator[Callable[[], None]]:
    """Keep a control group of this name in each hierarchy while the block runs.

    Then all below is removed.

    Yields a function that has the process that calls it enter them.
    """
    groups = [group / name for group in groups_of_this_process()]
    for group in groups:
        group.mkdir()

    def enter() -> None:
        for group in groups:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        for group in groups:
            for directory, _, _ in os.walk(group, topdown=False):
                wait_until(lambda: is_removed(Path(directory)), f"{directory} is empty")


def is_removed(group: Path) -> bool:
    """Remove a control group, and return whether it is gone.

    It is busy for a moment when its last process has ended.
    """
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


@contextlib.contextmanager
def machine_of(
    release: str, place: Path, program: Path = PROJECT, legacy: bool = False,
    system: Path | None = None
) -> Iterator[Machine]:
    """Boot a machine with mail running, and end it after the block.

    release: of Debian. place: an empty directory. program: what is in /opt/backup. legacy: whether
    its control groups are of version 1, of which systemd controls the memory where version 2
    cannot. system: what it is made of, by default installed_system's.
    """
    system = system or installed_system(release)
    for name in ("changes", "work", "home"):
        (place / name).mkdir()
    set_up(release, place)
    with control_groups(f"{place.name}-{os.getpid()}") as enter, (place / "log").open("wb") as log:
        unshare = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork",
             "--kill-child", "sh", "-c", BOOT, "boot", str(place), str(system), str(program),
             "legacy" if legacy else "", PATH],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=enter,
            start_new_session=True)
        try:
            children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
            wait_until(lambda: bool(children.read_text()) or unshare.poll() is not None,
                       "the machine boots")
            machine = Machine(release, int(children.read_text()), place / "home")
            wait_until(lambda: machine.run("systemctl", "is-system-running", exit_code=None).strip()
                       in ("running", "degraded"), f"the machine has booted, see {log.name}", 60)
            machine.wait_for_ports(20)
            yield machine
        finally:
            with contextlib.suppress(ProcessLookupError):
                # systemd dies with unshare, all others with systemd
                os.killpg(unshare.pid, signal.SIGKILL)
            unshare.wait()


def set_up(release: str, place: Path) -> None:
    """Write the settings of a machine that has not been booted yet, and a small mail store."""
    etc = place / "changes" / "etc"
    for directory in (etc / "dovecot", etc / "postfix"):
        directory.mkdir(parents=True)
    system = SYSTEMS / release / "etc"
    for name, line in (("passwd", "user-data:x:900:900::/home/user-data:/usr/sbin/nologin"),
                       ("group", "user-data:x:900:")):
        (etc / name).write_text((system / name).read_text() + line + "\n")
    (etc / "dovecot/dovecot.conf").write_text(
        DOVECOT[release] + "protocols = imap\nlisten = 127.0.0.1\nssl = no\n")
    (etc / "postfix/main.cf").write_text(POSTFIX)
    (etc / "mailinabox.conf").write_text(f"STORAGE_ROOT={STORAGE_ROOT}\nSTORAGE_USER=user-data\n")
    mailbox = place / "home/user-data/mail/mailboxes/example.com/alice"
    for name in ("cur", "new", "tmp"):
        (mailbox / name).mkdir(parents=True)
    for number in range(20):
        message = mailbox / "cur" / f"17000{number}.M1P1.host:2,S"
        message.write_text(f"Subject: {number}\n\n" + "text\n" * 500)
    shutil.chown(place / "home/user-data", 900, 900)
    for path in (place / "home/user-data").rglob("*"):
        shutil.chown(path, 900, 900)
    key = place / "home/user-data/backup/secret_key.txt"
    key.parent.mkdir(mode=0o750)
    key.write_text("correct horse battery staple correct horse battery staple\n")
    key.chmod(0o600)
