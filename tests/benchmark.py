#!/usr/bin/python3
"""How long mail is down, how long a night takes and how much memory it needs.

It is run by hand, as root, and measures other ways to back up beside this script.

All of a table comes from one run, the contenders take turns, and what counts are the ratios:

- this script;
- the same without the nightly check of a seventh of the files and that of duplicity's notes;
- the order of 2015: stop mail, run duplicity on the tree, start mail;
- restic and borg between the stop and the start, where they are installed;
- the floor: stop and start with nothing between.

`service` is a stand-in that takes no time; at the end the real dovecot and postfix are watched from
their ports once.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import backup  # noqa: E402
import utils  # noqa: E402
from private_mail_server import (  # noqa: E402
    BACKUP_PROGRAM, IMAP_PORT, SETTINGS_FILE, SMTP_PORT, STORAGE_ROOT, STORAGE_USER, PortWatcher,
    create_key, run_privately, start_services)
from systemd_machine import UNITS, machine_of  # noqa: E402

PYTHON = "/usr/bin/python3"
KEY = "benchmark " * 5
MAILBOXES = 20
# Of the log-normal distribution of messages without an attachment.
MEDIAN_BYTES, SPREAD = 6_000, 1.2
ATTACHMENT_BYTES = 350_000
GROWTH = (1_000, 10_000, 100_000)
LARGE = 1_000_000

# Both note when they began and ended.
SERVICE = """#!/bin/bash
[ "$2" = status ] || echo "$EPOCHREALTIME" >> LOG
"""
DUPLICITY = """#!/bin/bash
begin=$EPOCHREALTIME
PROGRAM "$@"
code=$?
echo "$begin $EPOCHREALTIME" >> LOG
exit $code
"""
# Runs a program of Python's and writes down the most memory, in kilobytes, that it itself and none
# of its children has needed.
MEASURED = """
import re, runpy, sys
output, *sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = open("/proc/self/status").read()
    open(output, "w").write(re.search("VmHWM:\\s+(\\d+)", status)[1])
"""


@dataclass(frozen=True)
class Night:
    """One measured night, in seconds and megabytes. own: all of it less duplicity."""

    downtime: float
    total: float
    megabytes: float
    own: float


# The mail store


class Filler:
    """What messages are made of. chance: draws it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.noise = os.urandom(1 << 22)
        lengths = (chance.randint(2, 9) for _ in range(200_000))
        words = ("".join(chance.choices("etaoinshrdlu", k=length)) for length in lengths)
        self.words = " ".join(words).encode()

    def text(self, scale: float) -> bytes:
        """Return the text of a message. scale: of its size."""
        size = int(self.chance.lognormvariate(0, SPREAD) * MEDIAN_BYTES * scale)
        begin = self.chance.randrange(len(self.words))
        return self.words[begin:begin + size]

    def attachment(self, scale: float) -> bytes:
        """Return an attachment."""
        begin = self.chance.randrange(1 << 20)
        size = int(self.chance.uniform(0.5, 1.5) * ATTACHMENT_BYTES * scale)
        return self.noise[begin:begin + size]


def make_store(root: Path, messages: int, full_size: Optional[int], empty: bool = False) -> None:
    """Make a mail store. full_size: about how many bytes in all. empty: without content."""
    filler = Filler(random.Random(1))
    average = MEDIAN_BYTES * 2.054 + ATTACHMENT_BYTES / 8  # exp(1.2 ** 2 / 2) is 2.054
    scale = 1.0 if full_size is None else full_size / (average * messages)
    index = filler.noise[:0 if empty else messages // MAILBOXES * 40]
    for number in range(messages):
        mailbox = root / f"mail/mailboxes/example.com/user{number % MAILBOXES}"
        if number < MAILBOXES:
            for name in ("cur", "new", "tmp"):
                (mailbox / name).mkdir(parents=True)
            for name in ("dovecot.index", "dovecot.index.cache", "dovecot.index.log",
                         "dovecot-uidlist"):
                (mailbox / name).write_bytes(index)
        path = f"{mailbox}/cur/{1_700_000_000 + number}.M{number}P1.mail.example.com,S=1:2,S"
        with open(path, "wb") as stream:
            if not empty:
                stream.write(filler.text(scale))
                if number % 8 == 0:
                    stream.write(filler.attachment(scale))


def change_store(root: Path, number: int) -> None:
    """Do what a day does, in small: a new message, a changed flag, a rewritten index."""
    mailbox = root / "mail/mailboxes/example.com/user0"
    message = mailbox / f"new/{1_800_000_000 + number}.M1P1.mail.example.com"
    message.write_bytes(os.urandom(10_000))
    first = min((mailbox / "cur").iterdir())
    first.rename(f"{first}{'R' if number % 2 else 'F'}")
    (mailbox / "dovecot.index").write_bytes(os.urandom(5_000))


# Nights


class Bench:
    """A mail store, a place for backups beside it, and stand-ins for `service` and duplicity."""

    def __init__(self, place: Path, root: Path) -> None:
        self.place, self.root = place, root
        programs = place / "bin"
        programs.mkdir()
        (place / "gnupg").mkdir(mode=0o700)
        real = utils.find_program("duplicity", os.environ)
        for name, text in (("service", SERVICE), ("duplicity", DUPLICITY.replace("PROGRAM", real))):
            (programs / name).write_text(text.replace("LOG", str(place / f"{name}.log")))
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(place), "GNUPGHOME": str(place / "gnupg"),
            "PASSPHRASE": KEY, "RESTIC_PASSWORD": KEY, "BORG_PASSPHRASE": KEY}

    def run(self, *command: object) -> float:
        """Run a command. Returns the megabytes that the largest of its processes needed."""
        words = [str(word) for word in command]
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                words, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                output.seek(0)
                told = output.read().decode(errors="replace")
                raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{told}")
        return float(usage.ru_maxrss) / 1024

    def stop_and_start(self, *command: object) -> float:
        """Stop mail, run a command, if any, and start mail; return the megabytes it needed."""
        for name in ("dovecot", "postfix"):
            self.run("service", name, "stop")
        megabytes = self.run(*command) if command else 0.0
        for name in ("dovecot", "postfix"):
            self.run("service", name, "start")
        return megabytes

    def measure(self, night: Callable[[], float]) -> Night:
        """Measure a night, a function that returns megabytes."""
        for path in self.place.glob("*.log"):
            path.unlink()
        os.sync()
        begin = time.monotonic()
        megabytes = night()
        total = time.monotonic() - begin
        service = [float(line) for line in (self.place / "service.log").read_text().splitlines()]
        log = self.place / "duplicity.log"
        calls = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        duplicity = sum(float(end) - float(begin) for begin, end in calls)
        return Night(service[-1] - service[0], total, megabytes, total - duplicity)


Contender = Callable[[bool], float]


def contenders_of(bench: Bench) -> dict[str, Contender]:
    """Return the ways to back up that can be had here, by name.

    They are functions of whether the night is a full one.
    """
    place, root = bench.place, bench.root

    def this_script(full: bool, program: Path = BACKUP_PROGRAM) -> float:
        if full:
            shutil.rmtree(root / "backup", ignore_errors=True)
        bench.run(PYTHON, "-c", MEASURED, place / "memory", program, "--storage-root", root)
        return int((place / "memory").read_text()) / 1024

    def without_checks(full: bool) -> float:
        program, own, others = place / "program", place / "without-checks", place / "others"
        if not program.exists():
            shutil.copytree(BACKUP_PROGRAM.parent, program, ignore=lambda *_: ["tests", ".git"])
            text = BACKUP_PROGRAM.read_text()
            for check in (r"attempt\(check_a_share", r"remarks \+= remove_damaged_notes"):
                text, calls = re.subn(rf"\n +record\.{check}.*", "", text)
                assert calls == 1
            (program / BACKUP_PROGRAM.name).write_text(text)
        (root / "backup").rename(others)
        if own.exists():
            own.rename(root / "backup")
        megabytes = this_script(full, program / BACKUP_PROGRAM.name)
        (root / "backup").rename(own)
        others.rename(root / "backup")
        return megabytes

    def order_of_2015(full: bool) -> float:
        if full:
            shutil.rmtree(place / "2015", ignore_errors=True)
        return bench.stop_and_start(
            "duplicity", "full" if full else "incremental", "--archive-dir", place / "2015/cache",
            "--exclude", root / "backup", "--volsize", "250",
            "--gpg-options=--cipher-algo=AES256", "--allow-source-mismatch",
            root, (place / "2015/encrypted").as_uri())

    def restic(full: bool) -> float:
        repository = place / "restic"
        if full:
            shutil.rmtree(repository, ignore_errors=True)
            bench.run("restic", "init", "--repo", repository)
        return bench.stop_and_start(
            "restic", "backup", "--repo", repository, "--exclude", root / "backup", root)

    def borg(full: bool) -> float:
        repository = place / "borg"
        if full:
            shutil.rmtree(repository, ignore_errors=True)
            bench.run("borg", "init", "--encryption", "repokey", repository)
        archive = f"{repository}::{time.monotonic_ns()}"
        return bench.stop_and_start("borg", "create", "--exclude", root / "backup", archive, root)

    ways: dict[str, Contender] = {
        "this script": this_script, "without the checks": without_checks,
        "order of 2015": order_of_2015, "restic": restic, "borg": borg,
        "floor": lambda full: bench.stop_and_start()}
    return {name: way for name, way in ways.items()
            if name not in ("restic", "borg") or shutil.which(name)}


def compare(bench: Bench, rounds: int) -> None:
    """Print the table of nights, and the ratios of the downtimes less the floor's."""
    contenders = contenders_of(bench)
    measured: dict[tuple[str, bool], list[Night]] = {}
    changes = 0
    for _ in range(rounds):
        for full in (True, False, False):
            changes += 1
            change_store(bench.root, changes)
            for name, contender in contenders.items():
                night = bench.measure(lambda: contender(full))
                measured.setdefault((name, full), []).append(night)
    print_row("night", "downtime, s", "in all, s", "of it not duplicity, s", "memory, MB")
    print_row(*["---"] * 5)
    for full, kind in ((True, "full"), (False, "incremental")):
        for name in contenders:
            nights = measured[name, full]
            scripts = ("this script", "without the checks")
            own = tell([night.own for night in nights]) if name in scripts else ""
            print_row(f"{kind}, {name}", tell([night.downtime for night in nights]),
                      tell([night.total for night in nights]), own, most_memory(nights))

    def above_floor(name: str, full: bool) -> float:
        floor = statistics.median(night.downtime for night in measured["floor", full])
        downtime = statistics.median(night.downtime for night in measured[name, full])
        return max(0.0005, downtime - floor)

    for full, kind in ((True, "full"), (False, "incremental")):
        for name in contenders:
            if name not in ("this script", "floor"):
                ratio = above_floor(name, full) / above_floor("this script", full)
                print(f"downtime less the floor, {kind}: 1/{ratio:.0f} of that of {name}")


def print_row(*cells: str) -> None:
    """Print a row of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def most_memory(nights: Sequence[Night]) -> str:
    """Return the most memory that some nights needed, in megabytes."""
    return f"{max(night.megabytes for night in nights):.0f}"


def tell(seconds: Sequence[float]) -> str:
    """Return the median and the spread of some times."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


# The copy, and how it grows


def compare_first_pass(bench: Bench, messages: int, rounds: int) -> None:
    """Print how long the first pass takes beside `cp -al`, and the second."""
    passes: dict[str, list[float]] = {"first pass": [], "second pass": [], "cp -al": []}
    for _ in range(rounds):
        os.sync()
        copy = bench.place / "copy"
        copy.mkdir(mode=0o700)
        marks = [time.monotonic()]
        with utils.mirror_of(bench.root, copy, frozenset({"backup"}), backup.may_link, 0) as mirror:
            marks.append(time.monotonic())
            utils.update_mirror(mirror)
            marks.append(time.monotonic())
        shutil.rmtree(copy)
        os.sync()
        marks.append(time.monotonic())
        subprocess.run(["cp", "-al", bench.root, copy], check=True)
        marks.append(time.monotonic())
        shutil.rmtree(copy)
        for name, place in (("first pass", 0), ("second pass", 1), ("cp -al", 3)):
            passes[name].append(marks[place + 1] - marks[place])
    for name, seconds in passes.items():
        each = statistics.median(seconds) / messages * 1e6
        print(f"{name}: {tell(seconds)} s, {each:.1f} microseconds a message")


def show_growth(sizes: Sequence[int], directory: Path, nights: int) -> None:
    """Print how downtime, time that is not duplicity's and memory grow with the messages.

    Of that time it is told what the check of duplicity's notes takes. The messages have
    no content.
    """
    print()
    print_row("messages", "downtime, s", "not duplicity, s", "of it gzip --test, s",
              "memory of the script, MB")
    print_row(*["---"] * 5)
    downtimes = []
    for messages in sizes:
        with bench_of(directory, messages, None, empty=True) as bench:
            night = contenders_of(bench)["this script"]
            found = [bench.measure(lambda: night(number == 0)) for number in range(nights)]
            begin = time.monotonic()
            bench.run("gzip", "--test", *(bench.root / "backup/cache/backup").glob("*.sigtar.gz"))
            checked = time.monotonic() - begin
        downtimes.append(statistics.median(night.downtime for night in found))
        print_row(f"{messages:,}", tell([night.downtime for night in found]),
                  tell([night.own for night in found]), f"{checked:.3f}", most_memory(found))
    if len(sizes) > 2:
        print(f"growth of the downtime from {sizes[1]:,} to {sizes[2]:,} messages:"
              f" {downtimes[2] / downtimes[1]:.2f} times")


@contextlib.contextmanager
def bench_of(
    directory: Path, messages: int, full_size: Optional[int], empty: bool = False
) -> Iterator[Bench]:
    """Keep a mail store with a place for backups while the block runs."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="benchmark-") as name:
        place, root = Path(name), Path(name, "user-data")
        # In a process of its own: what a program seems to need begins with what the process needed
        # that started it.
        maker = multiprocessing.get_context("fork").Process(
            target=make_store, args=(root, messages, full_size, empty))
        maker.start()
        maker.join()
        assert maker.exitcode == 0
        time.sleep(utils.SETTLED_SECONDS + 0.1)  # what has just been written counts as changed
        yield Bench(place, root)


# The real dovecot and postfix


def measure_real_services() -> None:
    """Watch the ports of dovecot and postfix during a bare restart and some nights.

    The nights are of this script and in the order of 2015.
    """
    make_store(STORAGE_ROOT, 5_000, 100_000_000)
    subprocess.run(["chown", "-R", f"{STORAGE_USER}:{STORAGE_USER}", STORAGE_ROOT], check=True)
    start_services()
    create_key()
    script = [PYTHON, str(BACKUP_PROGRAM), "--config", str(SETTINGS_FILE)]
    stop = "service dovecot stop; service postfix stop"
    start = "service dovecot start; service postfix start"
    old = f"duplicity full --exclude {STORAGE_ROOT}/backup {STORAGE_ROOT} file:///var/mail/2015"
    environment = {**os.environ, "PASSPHRASE": KEY}
    for name, command in (
        ("bare restart", ["sh", "-c", f"{stop}; {start}"]),
        ("this script, full", script),
        ("this script, incremental", script),
        ("order of 2015, full", ["sh", "-c", f"{stop}; {old}; {start}"]),
    ):
        time.sleep(3)
        with PortWatcher() as watcher:
            subprocess.run(command, env=environment, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, check=True)
            time.sleep(1)
        changes = [(at, is_open) for port in (SMTP_PORT, IMAP_PORT)
                   for at, is_open in watcher.transitions[port][1:]]
        closed = [at for at, is_open in changes if not is_open]
        opened = [at for at, is_open in changes if is_open]
        print(f"MEASURED | {name} | {max(opened) - min(closed):.1f} |")


# The same with systemd


def measure_systemd(release: str, directory: Path, rounds: int) -> None:
    """Print how long each port is closed by a night of this script.

    Beside it that is told of the bare stop and start of the same units.

    dovecot goes first in both, which is the best order. release: of Debian.
    """
    with tempfile.TemporaryDirectory(dir=directory) as name, \
            machine_of(release, Path(name)) as machine:
        root = machine.home / "user-data"
        make_store(root, 5_000, 100_000_000)
        machine.run("chown", "-R", "user-data:user-data", "/home/user-data/mail")
        units = [line.split() for line in UNITS[release]]
        bare = [f"systemctl {action} {' '.join(line)}"
                for action in ("stop", "start") for line in units]
        contenders: dict[str, Callable[[], object]] = {
            "bare units": lambda: machine.shell("; ".join(bare)), "this script": machine.back_up}
        machine.back_up()
        closed: dict[tuple[str, int], list[float]] = {}
        for _ in range(rounds):
            for contender, act in contenders.items():
                time.sleep(3)
                change_store(root, time.monotonic_ns())
                with PortWatcher(machine.first) as watcher:
                    act()
                    machine.wait_for_ports(20)
                    time.sleep(0.3)
                for port in (IMAP_PORT, SMTP_PORT):
                    seconds = watcher.closed_seconds(port)
                    closed.setdefault((contender, port), []).append(seconds)
        for contender in contenders:
            print_row(f"{release}, {contender}",
                      *[tell(closed[contender, port]) for port in (IMAP_PORT, SMTP_PORT)])


def main() -> None:
    """Measure and print all tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=20_000, metavar="N",
                        help="messages in the mail store (default: 20000)")
    parser.add_argument("--full-size", type=float, metavar="MB",
                        help="size of the mail store (default: as the messages make it)")
    parser.add_argument("--rounds", type=int, default=3,
                        help="how often to measure each (default: 3)")
    parser.add_argument("--large", action="store_true", help=f"also with {LARGE:,} messages")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"),
                        help="where to work (default: /var/tmp)")
    options = parser.parse_args()
    if os.path.isdir("/run/systemd/system"):
        raise SystemExit("systemd must be hidden, or this machine's own mail would be stopped: run "
                         "unshare --mount sh -c"
                         " 'mount -t tmpfs none /run/systemd && tests/benchmark.py'")
    version = utils.shell(["duplicity", "--version"], backup.program_environment()).last_lines[-1]
    system = f"{os.uname().sysname} {os.uname().release}"
    full_size = options.full_size and int(options.full_size * 1e6)
    print(f"{os.cpu_count()} cores, {system}, {version}, {options.messages:,} messages", end="")
    with bench_of(options.directory, options.messages, full_size) as bench:
        print(f", {utils.content_size(bench.root) / 1e6:.0f} MB\n", flush=True)
        compare(bench, options.rounds)
        compare_first_pass(bench, options.messages, 5)
    sizes = (*GROWTH, LARGE) if options.large else GROWTH
    show_growth(sizes, options.directory, 1 + options.rounds)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        print("\n| with real dovecot and postfix | ports closed, s |\n|---|---|")
        for line in run_privately(measure_real_services, Path(name)).splitlines():
            if line.startswith("MEASURED "):
                print(line.removeprefix("MEASURED "))
    print("\n| with systemd | port 143 closed, s | port 25 closed, s |\n|---|---|---|")
    for release in UNITS:
        measure_systemd(release, options.directory, 5)


if __name__ == "__main__":
    main()
