#!/usr/bin/python3
"""Nightly backup of a mail server's user data: duplicity, encrypted, with mail down for no longer than a restart takes.

The night: check all that can be checked, take the lock, mend what a run that died has left, migrate the layout of old, decide
between a full and an incremental backup, copy the tree while mail runs, stop mail, bring the copy up to date, start mail again,
have duplicity read the copy, believe the new set only when it is proved, prune, and tell the after-backup hook. `perform_backup` is
that list; all else in here is one of its steps, the status, or the command line. A mail server's admin needs nothing but duplicity
and the first line of secret_key.txt to restore.
"""

import argparse
import ast
import base64
import contextlib
import errno
import filecmp
import functools
import glob
import hashlib
import html
import io
import json
import logging
import math
import os
import pwd
import re
import secrets
import shlex
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Concatenate, NoReturn, Optional, ParamSpec, Union

from dateutil.parser import isoparse
from dateutil.relativedelta import relativedelta

import utils
from utils import Downtime, Failure, Finished, Interrupted, printable

VERSION = "1.0"
SETTINGS_FILE = Path("/etc/mailinabox.conf")
RUN_DIRECTORY = Path("/run")
MIGRATED = "migrated_unencrypted_backup"
KEEP_DAYS = "3"
SERVICES = "dovecot postfix"
FULL_DAYS = 31
OVERDUE_HOURS = 36
KEY_CHARACTERS = 43
KEY_ITERATIONS = 1_048_576  # 48 random bytes need no stretching, and the 65 million of gpg cost 0.3 s a file
VOLUME_MEGABYTES = 250
TEMPORARY_BYTES = 575_000_000  # duplicity 3.2.1 keeps up to 2.3 volumes in its temporary directory
RESERVE_BYTES = 1_000_000_000
SPARE_BYTES = 2_000_000_000
READER_PREFIX = "reader-"
SIGNATURE_SECONDS = 60
CLOCK_SECONDS = 60
GPGCONF_SECONDS = 20
OLDEST_DUPLICITY = (0, 8, 21)
DAY = 86400
AGE_SECONDS = {"s": 1, "m": 60, "h": 3600, "D": DAY, "d": DAY, "W": 7 * DAY, "w": 7 * DAY, "M": 30 * DAY,
               "Y": 365 * DAY, "y": 365 * DAY}

# Duplicity's file names, from its file_naming.py (0.8.22, 3.2.1): .jsonstat comes with 3.x, .part and .gz only in the archive directory.
STAMP = r"[12][0-9]{7}T[0-9]{6}Z"
SET_FILE = re.compile(rf"duplicity-(full|inc)\.(?:({STAMP})\.to\.)?({STAMP})\.(manifest|vol\d+\.difftar|jsonstat)\.gpg")
SIGNATURES = re.compile(rf"duplicity-(full|new)-signatures\.(?:({STAMP})\.to\.)?({STAMP})\.sigtar\.gpg")
ARCHIVE_FILE = re.compile(
    rf"duplicity-(?:full|inc|full-signatures|new-signatures)\.(?:{STAMP}\.to\.)?({STAMP})\."
    r"(?:manifest|vol\d+\.difftar|sigtar|jsonstat)(?:\.(?:gpg|gz|part))*")

# Of duplicity's exit codes, from its log.py (0.8.22 and 3.2.1), those that an admin can do something about.
DUPLICITY_EXIT_CODES = {
    2: "duplicity does not take these options; install version 0.8.21 or newer",
    5: "duplicity finds a damaged file in its archive directory; run the backup again",
    17: "duplicity finds no complete chain to add to; run the backup with --full",
    19: "the path is not in the backup; name one that is",
    21: "a backup file does not match its checksum; see which with --verify, take an older backup with --time, or your copy elsewhere",
    23: "duplicity was refused what it needs, or another duplicity uses the archive directory; end that one",
    30: "duplicity met an error of its own; see its last lines, then run the backup with --full",
    31: "gpg failed; see its last lines and check secret_key.txt and the installation of gpg",
    34: "duplicity's temporary directory has no room; make room on that disk",
    35: "duplicity's temporary directory has no room; make room on that disk",
    50: "duplicity could not write to or read from its target; check the disk and its room",
    53: "the disk is full; make room on it",
    utils.NOT_EXECUTABLE: "duplicity could not be executed; install it again",
}

# What a damaged archive directory leads to (seen: 0.8.22; 1 of 3.2.1); it holds nothing that is not in the target, too.
DAMAGED_ARCHIVE_CODES = (1, 5, 20, 30)

log = logging.getLogger("backup")
Draw = Callable[[int, Optional[int]], None]
Arguments = ParamSpec("Arguments")


# What a run knows


@dataclass(frozen=True)
class Paths:
    """Every path that is used, computed once; the comments are the design's."""

    root: Path
    backup: Path
    key: Path  # the passphrase is its first line
    encrypted: Path  # duplicity's target
    cache: Path  # duplicity's archive directory
    snapshots: tuple[Path, Path]  # where a copy of the tree may be: in backup/, or beside it if that is on another disk
    temporary: Path  # duplicity's temporary directory
    lock: Path
    last_run: Path
    plain: Path  # of the legacy layout
    legacy: Path  # openssl copies that have no plain original
    migrated: Path  # the plain files of the legacy layout, until a backup contains them
    gnupg: Path  # gpg's home for a run
    stopped: Path  # lists the services that are to come back


@dataclass(frozen=True)
class Night:
    """What a run knows from the start. settings: those of the file. environment: for the programs it runs. now: when it began."""

    settings: Mapping[str, str]
    paths: Paths
    user: pwd.struct_passwd
    keep_days: int
    services: tuple[str, ...]
    environment: Mapping[str, str]
    now: datetime
    verbose: bool = False


@dataclass
class Record:
    """How a run goes, as last-run.json tells it. attention: what an admin must look at although the backup was made."""

    kind: Optional[str] = None
    source: Optional[str] = None
    size: int = 0  # of the new set, in bytes
    duplicity_version: Optional[str] = None
    downtime: Downtime = field(default_factory=Downtime)
    unread: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what is worth knowing, no more

    def warn(self, message: str) -> None:
        """Say now, and remember, what an admin must look at."""
        if message not in self.attention:
            log.warning(message)
            self.attention.append(message)


def needs_attention_at_most(
    step: Callable[Concatenate[Night, Record, Arguments], None]
) -> Callable[Concatenate[Night, Record, Arguments], None]:
    """Make a step, of those that come when the backup was made, one whose failure needs attention and does not end the run."""
    @functools.wraps(step)
    def taken(night: Night, record: Record, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> None:
        try:
            step(night, record, *arguments, **named)
        except (Failure, OSError) as error:
            record.warn(str(failure_of(error)))
    return taken


SetKey = tuple[Optional[str], str]
DirectoryState = tuple[int, int, int]


@dataclass(frozen=True)
class BackupSet:
    """One full or incremental backup. stamp: its end, previous: that of the set it builds on; files: names in encrypted/; size in bytes."""

    stamp: str
    previous: Optional[str]
    complete: bool
    files: frozenset[str]
    size: int

    @property
    def full(self) -> bool:
        """Whether the set is a full backup."""
        return self.previous is None

    @property
    def manifest(self) -> str:
        """The name of a complete set's manifest."""
        return next(name for name in self.files if ".manifest." in name)

    @property
    def metadata(self) -> list[str]:
        """The names of all files but the volumes, the manifest, which is small, first."""
        return sorted((name for name in self.files if ".difftar." not in name), key=lambda name: (".manifest." not in name, name))

    @property
    def signed(self) -> bool:
        """Whether the set has its signatures, without which no increment can be made on it."""
        return any(".sigtar." in name for name in self.files)

    @property
    def date(self) -> datetime:
        """When the set was begun."""
        return stamp_date(self.stamp)


def paths_of(settings: Mapping[str, str]) -> Paths:
    """Compute all paths from STORAGE_ROOT. Raises Failure (exit code 2) if that is missing from the settings or not absolute."""
    name = settings.get("STORAGE_ROOT", "")
    if not name.startswith("/"):
        raise Failure(f"STORAGE_ROOT is {printable(name) or 'missing'}; give it the absolute path of the user data in the settings", 2)
    root = Path(os.path.realpath(name))  # duplicity would back up nothing but the link
    if root == Path("/"):
        raise Failure("STORAGE_ROOT is /, the whole system; give it the directory of the user data", 2)
    backup = root / "backup"
    # A short name that is this root's alone: gpg-agent's socket fails under a long path (seen: over about 70 characters).
    token = hashlib.sha256(os.fsencode(backup)).hexdigest()[:12]
    return Paths(
        root, backup, backup / "secret_key.txt", backup / "encrypted", backup / "cache",
        (backup / "snapshot", root / ".backup-snapshot"), backup / "tmp", backup / "lock", backup / "last-run.json",
        backup / "duplicity", backup / "legacy", root / MIGRATED,
        RUN_DIRECTORY / f"backup-gnupg-{token}", RUN_DIRECTORY / f"backup-stopped-{token}")


def keep_days_of(settings: Mapping[str, str]) -> int:
    """Return BACKUP_KEEP_DAYS. Raises Failure (exit code 2) if it is not a whole number from 1 to 9999."""
    days = settings.get("BACKUP_KEEP_DAYS", KEEP_DAYS)
    if not re.fullmatch(r"[0-9]{1,4}", days) or int(days) < 1:
        raise Failure(f"BACKUP_KEEP_DAYS is {printable(days) or 'empty'}; give it a number of days from 1 to 9999", 2)
    return int(days)


def night_of(settings: Mapping[str, str], verbose: bool = False, now: Optional[datetime] = None) -> Night:
    """Check the settings and put together what a run knows.

    settings: as load_environment returns them. verbose: whether to show what duplicity says. now: the time, with its zone; default:
    the clock's. Raises Failure (exit code 2) if a setting is missing or wrong.
    """
    paths = paths_of(settings)
    try:
        str(paths.root).encode()
    except UnicodeEncodeError as error:  # duplicity 0.8.22 would write to a directory of another name, and exit 0
        raise Failure(f"STORAGE_ROOT {printable(str(paths.root))} is not UTF-8, which duplicity needs; rename that directory", 2) from error
    if not paths.root.is_dir():
        raise Failure(f"STORAGE_ROOT {paths.root} is not a directory; correct STORAGE_ROOT in the settings", 2)
    if not settings.get("STORAGE_USER"):
        raise Failure(f"STORAGE_USER is missing, or nobody here owns {paths.root}; name the user who owns the user data in the settings", 2)
    try:
        user = pwd.getpwnam(settings["STORAGE_USER"])
    except (KeyError, ValueError) as error:
        raise Failure(f"there is no user {printable(settings['STORAGE_USER'])}; correct STORAGE_USER in the settings", 2) from error
    services = tuple(settings.get("BACKUP_SERVICES", SERVICES).split())
    if wrong := [name for name in services if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9@._-]*", name)]:
        raise Failure(f"{printable(wrong[0])} is not the name of a service; correct BACKUP_SERVICES in the settings", 2)
    return Night(settings, paths, user, keep_days_of(settings), services, program_environment(), now or datetime.now(timezone.utc), verbose)


def program_environment() -> dict[str, str]:
    """Return the environment for programs: the caller's, with the system directories on PATH and messages that are not translated."""
    return {**os.environ, "PATH": utils.system_path(os.environ.get("PATH", "")), "LC_ALL": "C.UTF-8", "LANGUAGE": "C"}


# The night


def perform_backup(night: Night, force_full: bool = False) -> int:
    """Make the nightly backup: the steps of the night, one line each.

    night: see night_of. force_full: make a full backup even if an incremental would do. Returns the exit code: 0, 3 if something
    needs attention, 5 if a service could not be started again. Raises Failure if no backup was made, Interrupted if a signal ended
    the run.
    """
    make_backup_directory(night)                                                                        # 1
    with utils.exclusive_process(night.paths.lock) as lock, last_run_recorded(night) as record:
        start_services_left_stopped(night, record)                                                      # of 3, but first of all
        record.duplicity_version = check_surroundings(night)
        with gpg_home(night):
            check_newest_set(night)                                                                     # 2
        recover_from_dead_run(night.paths)                                                              # 3
        make_directories(night)
        migrated = migrate_legacy_layout(night.paths)                                                   # 4
        sets = complete_sets(night.paths.encrypted)
        kind = "full" if reason_for_full(sets, night.now, force_full) else "incremental"                # 5
        run_hook(night, "before-backup", record)                                                        # 6
        with gpg_home(night), temporary_directory(night.paths):
            with copy_of_tree(night, record) as copy, failed_set_thrown_away(night.paths):              # 7
                with mail_stopped(night, record, lock):                                                 # 8
                    if copy:
                        finish_copy(copy)                                                               # 9
                    else:
                        make_set(night, record, kind)
                if copy:                                                                                # 10: mail is back
                    make_set(night, record, kind, copy)                                                 # 11
            delete_migrated_backups(night, record, migrated)
            with deletion_allowed(night.paths) as allowed:
                remove_old_sets(night, record, sets, allowed)                                           # 12
                clean_up(night, record, allowed)                                                        # 13
            grant_group_read(night, record)                                                             # 14
        write_last_run(night, record)                                                                   # 15
        run_hook(night, "after-backup", record)
    tell_what_was_made(night, record)
    return exit_code_of(record)


# Steps 1 and 2: what can be checked before anything is touched


def check_root() -> None:
    """Raise Failure (exit code 2) unless root runs this."""
    if os.geteuid() != 0:
        raise Failure("a backup must be made by root, who alone can read all mail and stop services; run it as root", 2)


def make_backup_directory(night: Night) -> None:
    """Make backup/ if it is missing, and let STORAGE_USER's group through, to the hooks and the encrypted files.

    Raises Failure (exit code 2) if it belongs to somebody else or others can write to it.
    """
    check_root()
    backup, group = night.paths.backup, night.user.pw_gid
    if not os.path.lexists(backup):
        utils.make_owned_directory(backup, 0o750, group)
    with utils.owned_directory(backup) as directory:
        status = os.fstat(directory)
        mode = stat.S_IMODE(status.st_mode)
        if status.st_gid != group and not mode & stat.S_IXOTH:
            os.fchown(directory, -1, group)
            status = os.fstat(directory)
        if status.st_gid == group and not mode & stat.S_IXGRP:
            os.fchmod(directory, mode | stat.S_IXGRP)


def check_in_place(paths: Paths) -> None:
    """Check that STORAGE_USER, who can rename all in STORAGE_ROOT, has put nothing of its own in place of backup/.

    Raises Failure or OSError.
    """
    utils.check_owned_directory(paths.backup)
    for directory in (paths.encrypted, paths.cache, paths.temporary, *paths.snapshots):
        with contextlib.suppress(FileNotFoundError):
            utils.check_owned_directory(directory)


def check_surroundings(night: Night) -> str:
    """Check the programs, the directories, the key and the room, without a change to any of them.

    Returns duplicity's version. Raises Failure: exit code 1 if there is no room, 2 for all else that is not as it must be.
    """
    paths = night.paths
    service_programs = [utils.service_manager(night.environment).program] if night.services else []
    for program in ("duplicity", "gpg", "gpgconf", "setpriv", "nice", "ionice", *service_programs):
        utils.find_program(program, night.environment)
    for directory in (paths.encrypted, paths.cache, paths.temporary, *paths.snapshots, paths.plain, paths.legacy, paths.migrated):
        with contextlib.suppress(FileNotFoundError):
            utils.check_owned_directory(directory)
    for place in paths.snapshots:
        check_copy(place, os.listdir(place) if place.exists() else [])
    if os.path.lexists(paths.key):
        read_passphrase(paths.key)
    elif any(name.startswith("duplicity-") for name in utils.regular_files(paths.encrypted)) or os.path.lexists(paths.plain):
        raise Failure(f"{paths.key} is missing although there are backups, which only that key opens; put it back from your copy", 2)
    version = duplicity_version(night)
    check_room(paths)
    return version


def check_room(paths: Paths) -> None:
    """Check that there is room for duplicity's temporary files, with what the run will delete first taken for free. Raises Failure."""
    disk = paths.backup if paths.backup.exists() else paths.root  # before the first run, if it is dry
    needed = TEMPORARY_BYTES + reserve_bytes(disk)
    free = utils.free_bytes(disk) + sum(utils.tree_size(path) for path in [paths.temporary, *dead_paths(paths)])
    free += sum(size for name, size in utils.regular_files(paths.encrypted).items() if name.endswith(".enc") and any(
        (directory / name.removesuffix(".enc")).is_file() for directory in (paths.plain, paths.migrated)))
    if free < needed:
        raise Failure(f"{paths.backup} has {human_size(free)} free and a backup needs {human_size(needed)} at least; make room there")


def read_passphrase(path: Path, lenient: bool = False) -> str:
    """Return the passphrase, the first line of the key file, stripped.

    lenient: only warn of a key that is open to others or short; a rescue is no time for manners. Raises Failure (exit code 2) if
    the file cannot be read, can be read by others, or holds no passphrase worth the name.
    """
    try:
        status = path.stat()
        first_line = path.read_bytes().partition(b"\n")[0].strip().decode()
    except UnicodeDecodeError as error:
        raise Failure(f"the first line of {path} is not text; put your copy of the key back", 2) from error
    except OSError as error:
        raise Failure(f"cannot read the key {path}: {error.strerror}; put your copy of the key back", 2) from error
    wrong = None
    if status.st_mode & 0o077:
        wrong = f"the key {path} is open to others than its owner; run: chmod 600 {shlex.quote(str(path))}"
    elif status.st_uid != os.geteuid():
        wrong = f"the key {path} is not owned by root; run: chown root {shlex.quote(str(path))}"
    elif len(first_line) < KEY_CHARACTERS or not first_line.isprintable():
        wrong = f"the first line of {path} is no passphrase of {KEY_CHARACTERS} characters or more; put your copy of the key back"
    if wrong and not (lenient and first_line and first_line.isprintable()):
        raise Failure(wrong, 2)
    if wrong:
        log.warning(wrong)
    return first_line


def duplicity_version(night: Night) -> str:
    """Return duplicity's version, such as 0.8.22. Raises Failure (exit code 2) if it does not run or is too old."""
    answer = utils.shell(["duplicity", "--version"], night.environment)
    match = re.match(r"duplicity (\S+)", answer.last_lines[-1] if answer.last_lines else "")
    if answer.exit_code or not match:
        raise Failure(f"duplicity does not run; install it again: duplicity --version ended with {answer}", 2)
    numbers = tuple(int(number) for number in re.findall(r"\d+", match[1])[:3])
    if numbers < OLDEST_DUPLICITY:
        raise Failure(f"duplicity {match[1]} is too old; install {'.'.join(map(str, OLDEST_DUPLICITY))} or newer", 2)
    return match[1]


def reserve_bytes(path: Path) -> int:
    """Return the room that a backup leaves to mail: 5 % of the file system of path or 1 GB, whichever is less."""
    return min(utils.total_bytes(path) // 20, RESERVE_BYTES)


def check_newest_set(night: Night) -> None:
    """Check that the key opens the newest set's manifest, and that the set is not dated in the future.

    duplicity 0.8.22 would add a set under another key, or an orphan before a set of the future, and exit 0. Raises Failure.
    """
    sets = complete_sets(night.paths.encrypted)
    if not sets:
        return
    utils.pause(max(0.0, check_clock(night, sets) + 1))  # an increment that is not dated after the newest set would be an orphan
    way_out = way_out_of(night.paths)
    manifest = night.paths.encrypted / sets[-1].manifest
    passphrase = read_passphrase(night.paths.key)
    answer = run_gpg(manifest, passphrase, gpg_environment(night))
    if is_wrong_key(answer):
        raise Failure(f"{wrong_key_of(night.paths)}, or {way_out}")
    if answer.exit_code:
        raise Failure(f"the newest backup's {manifest} is damaged; {way_out}, and check the disk: gpg ended with {answer}")


def check_clock(night: Night, sets: Sequence[BackupSet]) -> float:
    """Return how many seconds the newest of some sets is dated in the future. Raises Failure if that is more than a minute."""
    ahead = (sets[-1].date - night.now).total_seconds()
    if ahead > CLOCK_SECONDS:
        raise Failure(f"the newest backup is dated {sets[-1].date.isoformat()}, in the future: the clock is wrong, or was; "
                      f"mend the clock, or {way_out_of(night.paths)}")
    return ahead


def wrong_key_of(paths: Paths) -> str:
    """Return the sentence on a key that does not open the backups."""
    return f"the backups in {paths.encrypted} were made with another key than that in {paths.key}; put the old key back"


def way_out_of(paths: Paths) -> str:
    """Return what can always be done when no set can be added to those there are."""
    return f"move {paths.encrypted} and {paths.cache} aside to start anew"


def run_gpg(path: Path, passphrase: str, environment: Mapping[str, str], take_text: Optional[utils.TakeLine] = None) -> Finished:
    """Have gpg open a file and check its integrity. take_text: gets its text by lines, and gpg's status lines. Returns how it ended."""
    command = gpg_command(path, "-" if take_text else "/dev/null")
    return utils.shell(command, environment, secret=passphrase, standard_input=passphrase, on_line=take_text or log.debug)


def is_wrong_key(answer: Finished) -> bool:
    """Tell, of how gpg ended, whether the passphrase is another than that of the file (seen: gpg 2.2.40, 600 wrong ones of 600)."""
    return answer.exit_code != 0 and any("BAD_PASSPHRASE" in line for line in answer.last_lines)


def gpg_command(path: Path, output: str = "/dev/null") -> list[str]:
    """Return the command that opens a file with the passphrase on its standard input. output: where its text goes, - for a pipe."""
    return ["gpg", "--batch", "--no-tty", "--quiet", "--pinentry-mode", "loopback", "--passphrase-fd", "0", "--status-fd", "1",
            "--output", output, "--yes", "--decrypt", str(path)]


def gpg_environment(night: Night) -> dict[str, str]:
    """Return the environment for gpg: its home is this run's own, so that its agent can be ended with the run."""
    return {**night.environment, "GNUPGHOME": str(night.paths.gnupg)}


@contextlib.contextmanager
def gpg_home(night: Night) -> Iterator[None]:
    """Keep gpg's home for a run while the block runs, and leave neither it nor its agent behind; one of a killed run goes first."""
    remove_gpg_home(night)
    night.paths.gnupg.mkdir(mode=0o700)
    (night.paths.gnupg / "gpg-agent.conf").write_text(f"s2k-count {KEY_ITERATIONS}\n")
    try:
        yield
    finally:
        try:
            remove_gpg_home(night)
        except OSError as error:  # the next run will
            log.info("%s could not be removed: %s", night.paths.gnupg, failure_of(error))


@contextlib.contextmanager
def temporary_directory(paths: Paths) -> Iterator[None]:
    """Keep duplicity's temporary directory while the block runs."""
    utils.make_owned_directory(paths.temporary, 0o700, 0)
    try:
        yield
    finally:
        # What is left goes at the start of the next run.
        with contextlib.suppress(OSError, Failure), utils.owned_directory(paths.backup) as directory:
            utils.remove_at(paths.temporary.name, directory)


def remove_gpg_home(night: Night) -> None:
    """End the agent of gpg's home, if there is one, and remove the home."""
    if night.paths.gnupg.exists():
        answer = utils.shell(["gpgconf", "--kill", "all"], gpg_environment(night), interruptible=False, timeout_seconds=GPGCONF_SECONDS)
        if answer.exit_code:
            log.info("gpgconf --kill all ended with %s", answer)  # an agent whose home is gone ends by itself
        utils.remove(night.paths.gnupg)


# Step 3: what a run that died has left


def start_services_left_stopped(night: Night, record: Record) -> None:
    """Start the services that are still on the list of an earlier run's keeper, because it died or because they did not start."""
    if names := utils.services_to_start(night.paths.stopped):
        log.warning("starting %s, which an earlier run left stopped, see %s", " and ".join(names), night.paths.stopped)
        record.downtime.not_started = utils.start_services(names, night.paths.stopped, night.environment)


def recover_from_dead_run(paths: Paths) -> None:
    """Delete what a run that died had not finished.

    A set that was killed is never resumed: duplicity would believe parts of it that the tree does not bear out any more.
    """
    with utils.owned_directory(paths.backup) as directory:
        delete_dead_files(paths, directory, dead_files(directory))
    for place in paths.snapshots:
        remove_copy(paths, place)


def delete_dead_files(paths: Paths, directory: int, dead: Sequence[Path]) -> None:
    """Delete the files of a set that does not count, and temporary ones. directory: the descriptor of backup/; dead: relative to it."""
    if dead:
        log.info("deleting %d files of a backup that was not finished", len(dead))
    # What others read must wait for them; but without a manifest no reader that comes takes it for a set.
    read_by_others = {path for path in dead if path.parts[0] == "encrypted" and ".manifest." not in path.name}
    for path in set(dead) - read_by_others:
        utils.remove_below(directory, path)
    utils.remove_at(paths.temporary.name, directory)
    if read_by_others:
        with deletion_allowed(paths) as allowed:
            if not allowed:
                raise Failure(f"{paths.encrypted} holds a backup that was not finished, and a --verify, --list or --restore reads there; "
                              "wait for it to end", 4)
            for path in read_by_others:
                utils.remove_below(directory, path)


def dead_files(directory: int) -> list[Path]:
    """Return what belongs to a set that does not count: all that is dated after the newest that does, and duplicity's leavings.

    directory: the descriptor of backup/, for a path can be renamed meanwhile. The answer is relative to it.
    """
    sets = sets_in(directory)
    newest = sets[-1].stamp if sets else ""
    alive = {name.split(".sigtar")[0] for backup_set in sets for name in backup_set.files if ".sigtar" in name}
    return [path for path in duplicity_files(directory) if path.name.endswith(("-tempdir", ".part")) or (
        stamp_of(path) > newest and path.name.split(".sigtar")[0] not in alive)]


def sets_in(directory: int) -> list[BackupSet]:
    """Return the complete sets of a backup/ that is open, oldest first. directory: its descriptor."""
    with contextlib.suppress(FileNotFoundError), utils.opened("encrypted", parent=directory) as encrypted:
        return complete_sets(encrypted)
    return []


def stamp_of(path: Path) -> str:
    """Return the stamp of the set that a file of duplicity's belongs to, empty if it bears none."""
    match = ARCHIVE_FILE.fullmatch(path.name)
    return match[1] if match else ""


def dead_paths(paths: Paths) -> list[Path]:
    """Return the dead files of backup/, see there, by their whole paths; none if it is missing."""
    with contextlib.suppress(FileNotFoundError), utils.owned_directory(paths.backup) as directory:
        return [paths.backup / path for path in dead_files(directory)]
    return []


def duplicity_files(directory: int) -> list[Path]:
    """Return what duplicity has made in encrypted/ and cache/, relative to backup/. directory: the descriptor of backup/."""
    found = []
    with contextlib.suppress(FileNotFoundError), utils.opened("encrypted", parent=directory) as encrypted:
        found += [Path("encrypted", name) for name in utils.regular_files(encrypted)
                  if SET_FILE.fullmatch(name) or SIGNATURES.fullmatch(name)]
    with contextlib.suppress(FileNotFoundError):
        for place, directories, names, _ in os.fwalk("cache", dir_fd=directory):
            leavings = [name for name in directories if name.endswith("-tempdir")]
            found += [Path(place, name) for name in names + leavings]
            directories[:] = [name for name in directories if name not in leavings]
    return found


@contextlib.contextmanager
def failed_set_thrown_away(paths: Paths) -> Iterator[None]:
    """Delete at once the set that the block was making when it failed, even whole, so that a full disk does not stay full.

    That is what was not there before and is dated after the newest set, or as the new files of cache/: the clock may have been set back.
    """
    with utils.owned_directory(paths.backup) as directory:
        before, sets = set(duplicity_files(directory)), sets_in(directory)
        try:
            yield
        except BaseException:
            try:
                new = [path for path in duplicity_files(directory) if path not in before]
                stamps = {stamp_of(path) for path in new if path.parts[0] == "cache"}
                delete_dead_files(paths, directory, [
                    path for path in new if stamp_of(path) in stamps or not sets or stamp_of(path) > sets[-1].stamp])
            except (OSError, Failure) as error:
                log.error("the unfinished backup could not be deleted, the next run will: %s", failure_of(error))
            raise


def make_directories(night: Night) -> None:
    """Make the directories of a run, each with its mode and group."""
    utils.make_owned_directory(night.paths.encrypted, 0o750, night.user.pw_gid)
    utils.make_owned_directory(night.paths.cache, 0o700, 0)
    if not night.paths.key.exists():
        utils.write_atomically(night.paths.key, base64.b64encode(secrets.token_bytes(48)).decode() + "\n")
        log.warning("made a new key, %s: keep a copy of it elsewhere, for without it no backup can be opened", night.paths.key)


# Step 4: the layout of old


def migrate_legacy_layout(paths: Paths) -> Optional[DirectoryState]:
    """Move plain backups to where the next backup contains them, and remove their openssl copies.

    Each change leaves a state from which the next run goes on. Returns the state of the directory they are in then, if there is one.
    Raises Failure if there is no room to move them to another disk.
    """
    if os.path.lexists(paths.migrated):
        utils.make_owned_directory(paths.migrated, 0o700, 0)
        for half in paths.migrated.rglob(".*.copy"):  # of a killed run, see utils.move_file: the original is still there
            name, place = half.name[1:].removesuffix(".copy"), paths.plain / half.parent.relative_to(paths.migrated)
            if not half.is_dir() and any(os.path.lexists(place / original) for original in (name, re.sub(r"\.\d+$", "", name))):
                half.unlink()
    if os.path.lexists(paths.plain):
        utils.make_owned_directory(paths.plain, 0o700, 0)  # it is plain mail
        try:
            os.rename(paths.plain, paths.migrated)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST):
                raise
            if error.errno in (errno.EXDEV, errno.EBUSY) and (
                    utils.tree_size(paths.plain) + reserve_bytes(paths.root) > utils.free_bytes(paths.root)):
                raise Failure(f"{paths.root} has no room for the old backups in {paths.plain}; make room there") from error
            move_directory(paths.plain, paths.migrated)
        utils.sync_directory(paths.root)
        utils.sync_directory(paths.backup)
    orphans = [name for name in sorted(utils.regular_files(paths.encrypted)) if name.endswith(".enc")
               and not delete_copy(paths.encrypted / name, paths.migrated / name.removesuffix(".enc"))]
    if orphans:
        utils.make_owned_directory(paths.legacy, 0o700, 0)
        log.warning("old copies without a plain original of their size are moved to %s, %d in number; see there whether you need them",
                    paths.legacy, len(orphans))
        for name in orphans:
            move_aside(paths.encrypted / name, paths.legacy / name)
    return directory_state(paths.migrated.lstat()) if os.path.lexists(paths.migrated) else None


def directory_state(status: os.stat_result) -> DirectoryState:
    """Return what tells a directory from any other, and from itself after it was renamed."""
    return status.st_dev, status.st_ino, status.st_ctime_ns


def move_directory(source: Path, target: Path) -> None:
    """Move all that is in a directory into another, which may be on another file system and may hold some of it already.

    A file is gone from source only when it is in target on the disk; two different ones of one name are both kept.
    """
    target.mkdir(mode=0o700, exist_ok=True)
    utils.sync_directory(target.parent)
    for path in sorted(source.iterdir()):
        utils.raise_if_interrupted()
        goal = target / path.name
        if path.is_dir() and not path.is_symlink():
            taken = os.path.lexists(goal) and (goal.is_symlink() or not goal.is_dir())
            move_directory(path, goal.with_name(f"{path.name}.directory") if taken else goal)
        else:
            move_aside(path, goal)
    if not source.is_mount():
        source.rmdir()


def move_aside(path: Path, goal: Path) -> None:
    """Move a file to goal, or to the first of goal.1, goal.2 and so on at which nothing stands; where its equal stands that serves."""
    number, place = 0, goal
    while os.path.lexists(place):
        if all(stat.S_ISREG(file.lstat().st_mode) for file in (path, place)) and filecmp.cmp(path, place, shallow=False):
            utils.sync_file(place)
            path.unlink()
            return
        number += 1
        place = goal.with_name(f"{goal.name}.{number}")
    utils.move_file(path, place)


def delete_copy(copy: Path, original: Path) -> bool:
    """Delete an openssl copy if its plain original is there, of the size that the copy implies. Returns whether it did.

    `openssl enc -aes-256-cbc -a -salt` writes 16 bytes of salt and whole blocks of 16, in base64 with 64 characters a line.
    """
    try:
        status = original.lstat()
    except FileNotFoundError:
        return False
    characters = -(-(16 + 16 * (status.st_size // 16 + 1)) // 3) * 4
    if not stat.S_ISREG(status.st_mode) or copy.lstat().st_size != characters + -(-characters // 64):
        return False
    copy.unlink()
    return True


# Step 5: full or incremental


def read_sets(encrypted: Union[Path, int]) -> tuple[list[BackupSet], int]:
    """Read from the names in encrypted/ (its path or descriptor) what sets there are, oldest first, complete or not.

    A signature file that is dated up to 60 seconds off a complete set without one belongs to that set: some versions date them so.
    Returns the sets, and the bytes of the files that belong to none.
    """
    sizes = utils.regular_files(encrypted)
    members: dict[SetKey, set[str]] = {}
    signatures: dict[str, SetKey] = {}
    for name in sizes:
        if key := key_of(SIGNATURES.fullmatch(name)):
            signatures[name] = key
        elif key := key_of(SET_FILE.fullmatch(name)):
            members.setdefault(key, set()).add(name)
    complete = {key for key, names in members.items() if any(".manifest." in name for name in names)}
    for name, key in pair_signatures(signatures, complete).items():
        members[key].add(name)
    sets = [BackupSet(stamp, previous, (previous, stamp) in complete, frozenset(names), sum(sizes[name] for name in names))
            for (previous, stamp), names in members.items()]
    sets.sort(key=lambda backup_set: (backup_set.stamp, backup_set.previous or ""))
    return sets, sum(sizes.values()) - sum(backup_set.size for backup_set in sets if backup_set.complete)


def pair_signatures(signatures: Mapping[str, SetKey], complete: Set[SetKey]) -> dict[str, SetKey]:
    """Return to which complete set each signature file belongs, by its name, see read_sets; the nearest go first."""
    paired = {name: key for name, key in signatures.items() if key in complete}
    unsigned = complete - set(paired.values())
    off = sorted((abs(stamp_date(key[1]) - stamp_date(other[1])), name, other) for name, key in signatures.items() if name not in paired
                 for other in unsigned if (key[0] is None) == (other[0] is None))
    for distance, name, other in off:
        if distance <= timedelta(seconds=SIGNATURE_SECONDS) and name not in paired and other not in paired.values():
            paired[name] = other
    return paired


def key_of(match: Optional[re.Match[str]]) -> Optional[SetKey]:
    """Return what tells a set from others, of a matched file name: the stamps of the set it builds on, if any, and its own."""
    if not match or (match[1] == "full") != (match[2] is None):
        return None
    with contextlib.suppress(ValueError):  # a stray name may hold a month 13
        stamp_date(match[2] or match[3])
        stamp_date(match[3])
        return match[2], match[3]
    return None


def complete_sets(encrypted: Union[Path, int]) -> list[BackupSet]:
    """Return the sets whose manifest, which duplicity writes last, is in encrypted/ (its path or descriptor), oldest first."""
    return [backup_set for backup_set in read_sets(encrypted)[0] if backup_set.complete]


def stamp_date(stamp: str) -> datetime:
    """Return the time that a stamp in a file name such as 20261122T030000Z stands for."""
    return datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)


def chains_of(sets: Sequence[BackupSet]) -> list[list[BackupSet]]:
    """Group complete sets, oldest first, into chains: a full and the increments that lead back to it. Orphans are in none."""
    chains: list[list[BackupSet]] = []
    for backup_set in sets:
        if backup_set.full:
            chains.append([backup_set])
        else:
            for chain in chains:
                if chain[-1].stamp == backup_set.previous:
                    chain.append(backup_set)
                    break
    return chains


def reason_for_full(sets: Sequence[BackupSet], now: datetime, force_full: bool = False) -> Optional[str]:
    """Return why the next backup must be a full one, None if an incremental will do.

    sets: the complete ones, oldest first. force_full: it was asked for.
    """
    if force_full:
        return "it was asked for"
    if not sets:
        return "there is no complete backup yet"
    chain = next((chain for chain in chains_of(sets) if chain[-1] == sets[-1]), None)
    if chain is None:
        return "the newest set does not lead back to a full backup"
    if sum(backup_set.size for backup_set in chain[1:]) * 2 > chain[0].size:
        return "the increments add up to more than half of the full backup"
    if now - chain[0].date > timedelta(days=FULL_DAYS):
        return f"the full backup is over {FULL_DAYS} days old"
    if not all(backup_set.signed for backup_set in chain):
        return "signatures are missing, without which duplicity would exit 17 night after night"
    return None


def should_force_full(env: Mapping[str, str], now: Optional[datetime] = None) -> bool:
    """Tell whether the next backup of the STORAGE_ROOT in env must be a full one. now: default the clock's time."""
    return reason_for_full(complete_sets(paths_of(env).encrypted), now or datetime.now(timezone.utc)) is not None


# Steps 6 and 15: hooks


def run_hook(night: Night, name: str, record: Record) -> None:
    """Run an executable file of backup/ as STORAGE_USER, if it is there; what goes wrong with it needs attention, no more.

    It gets the settings of the file, and PATH, HOME and USER. Without a `#!` line /bin/sh runs it, as su did in the 2015 script.
    """
    hook = night.paths.backup / name
    if not os.path.lexists(hook):
        return
    log.info("running the hook %s", hook)
    try:
        if not hook.stat().st_mode & 0o111:
            record.warn(f"the hook {hook} is not executable and was not run; run: chmod +x {shlex.quote(str(hook))}")
            return
        with hook.open("rb") as stream:
            command = [str(hook)] if stream.read(4).startswith((b"#!", b"\x7fELF")) else ["/bin/sh", str(hook)]
    except OSError as error:
        record.warn(f"the hook could not be run: {failure_of(error)}")
        return
    environment = {**night.settings, "PATH": night.environment["PATH"], "HOME": night.user.pw_dir, "USER": night.user.pw_name}
    answer = utils.shell(command, environment, user=night.user, umask=0o022, on_line=log.info if night.verbose else log.debug)
    if answer.exit_code:
        record.warn(f"the hook {hook} failed; mend it: it ended with {answer}")


# Steps 7 to 10: the copy


@contextlib.contextmanager
def copy_of_tree(night: Night, record: Record) -> Iterator[Optional[utils.Mirror]]:
    """Keep a copy of STORAGE_ROOT, of which the first pass is made here while mail runs, for as long as the block runs.

    Yields None where it cannot be had: then duplicity has to read STORAGE_ROOT itself while mail is stopped.
    """
    paths, place = night.paths, snapshot_of(night.paths)
    spare = min(utils.total_bytes(place.parent) // 10, SPARE_BYTES)
    excluded = frozenset({paths.backup.name, paths.snapshots[1].name})
    copy = None
    log.info("copying %s while mail runs", paths.root)
    with contextlib.ExitStack() as stack:
        stack.callback(remove_copy_at_last, night, record, place)
        try:
            utils.make_owned_directory(place, 0o700, 0)
            copy = stack.enter_context(utils.mirror_of(paths.root, place, excluded, may_link, spare))
        except (utils.CannotMirror, OSError) as error:
            remove_copy(paths, place)  # its room is duplicity's
            record.remarks.append(f"mail was down while duplicity read {paths.root} itself, because it could not be copied: {error}")
            log.info(record.remarks[-1])
        yield copy


@needs_attention_at_most
def remove_copy_at_last(night: Night, record: Record, place: Path) -> None:
    """Remove the copy when it has served."""
    remove_copy(night.paths, place)


def remove_copy(paths: Paths, place: Path) -> None:
    """Remove a copy of the tree, of this run or of one that died, if it is there.

    place: one of the two places. Raises Failure if what stands there is no copy: STORAGE_USER can give directories of root's another
    name, this one too.
    """
    if not os.path.lexists(place):
        return
    beside = place.parent != paths.backup
    with utils.owned_directory(place) if beside else utils.owned_directory(paths.backup, place.name) as directory:
        check_copy(place, os.listdir(directory))
        try:
            utils.remove_at("tree", directory)
        except OSError as error:
            raise Failure(f"the copy {place} could not be removed, {failure_of(error)}; see lsattr -R there") from error
    place.rmdir()


def check_copy(place: Path, names: Sequence[str]) -> None:
    """Raise Failure (exit code 2) if these names, of what is in the place of the copy, are not those of a copy."""
    if foreign := sorted(set(names) - {"tree"}):
        raise Failure(f"{place} is not a copy of the tree, for it holds {printable(foreign[0])}; move it to where it belongs", 2)


def finish_copy(copy: utils.Mirror) -> None:
    """Make the copy equal to the tree, while mail is stopped. Raises Failure if that fails."""
    try:
        utils.update_mirror(copy)
    except utils.CannotMirror as error:
        raise Failure(f"no backup was made because the copy could not be finished: {error}; see to that, run the backup again") from error


@contextlib.contextmanager
def mail_stopped(night: Night, record: Record, lock: int) -> Iterator[None]:
    """Keep mail stopped while the block runs, see utils.services_stopped. lock: its descriptor."""
    log.info("stopping mail")
    with utils.services_stopped(night.services, night.paths.stopped, night.environment, lock, record.downtime):
        yield
    log.info("mail is back after %.1f seconds", record.downtime.seconds)
    if record.downtime.awake:
        record.warn(f"something started mail while it was to be down, {record.downtime.awake}: the backup may hold "
                    "half of what it wrote; see what did")


def snapshot_of(paths: Paths) -> Path:
    """Return the directory for the copy: it must be on the tree's own disk, for the links."""
    return paths.snapshots[0 if not paths.backup.exists() or utils.on_one_mount(paths.backup, paths.root) else 1]


def may_link(path: str, siblings: Set[str]) -> bool:
    """Tell of a directory of the tree whether its files are never rewritten in place: messages, and volumes of the legacy layout.

    path: relative to STORAGE_ROOT. siblings: the names of all directories beside it: Maildir's cur, new and tmp are side by side.
    """
    name = os.path.basename(path)
    return name in ("cur", "new") and {"cur", "new", "tmp"} <= siblings or path.split("/")[0] == MIGRATED


# Steps 11 to 14: duplicity


def duplicity_command(paths: Paths, archive: Path, action: str, *arguments: str) -> list[str]:
    """Return a duplicity command in the order that all versions take: action, options, then the rest, the target last.

    archive: the archive directory. The kernel kills it when this process dies, so that no orphan goes on writing.
    """
    return ["setpriv", "--pdeathsig", "KILL", "duplicity", action, "--archive-dir", str(archive), *arguments, paths.encrypted.as_uri()]


def set_command(night: Night, action: str, copy: Optional[Path] = None) -> list[str]:
    """Return the command that makes a set. action: full or incremental. copy: read it, with mail running, in place of STORAGE_ROOT."""
    excluded = [] if copy else exclusions(night.paths)
    command = duplicity_command(
        night.paths, night.paths.cache, action, *excluded, "--volsize", str(VOLUME_MEGABYTES), "--gpg-options=--cipher-algo=AES256",
        "--allow-source-mismatch", "--log-fd=LOG", str(copy or night.paths.root))
    # Where a container forbids it (-t) duplicity reads at the priority that it has.
    return [*command[:3], "nice", "-n", "19", "ionice", "-t", "-c", "3", *command[3:]] if copy else command


def exclusions(paths: Paths) -> list[str]:
    """Return duplicity's options to leave out of STORAGE_ROOT what is no user data; to duplicity the names are patterns."""
    return [part for path in (paths.backup, paths.snapshots[1]) for part in ("--exclude", glob.escape(str(path)))]


def remove_old_command(night: Night) -> list[str]:
    """Return the command that deletes the chains whose newest set is older than BACKUP_KEEP_DAYS."""
    return duplicity_command(night.paths, night.paths.cache, "remove-older-than", "--force", "--verbosity", "error", f"{night.keep_days}D")


def clean_up_command(night: Night) -> list[str]:
    """Return the command that deletes files of no complete set."""
    return duplicity_command(night.paths, night.paths.cache, "cleanup", "--force", "--verbosity", "error")


def run_duplicity(
    command: Sequence[str], environment: Mapping[str, str], verbose: bool = False, log_lines: Optional[list[str]] = None,
    watch: utils.Watch = lambda process: None,
) -> Finished:
    """Run a duplicity command with the passphrase, which nothing but duplicity and its gpg ever has, in its environment.

    verbose: show what it says. log_lines: takes the lines of the machine log of a command that has one. A record with a name that is
    not UTF-8 fails to be written there (0.8.22, 3.2.1); Python then prints it as an error of logging, from where it is put back as a
    WARNING. watch: see utils.shell. Returns how it ended.
    """
    lost_records: list[str] = []

    def take_line(line: str) -> None:
        (log.info if verbose else log.debug)(line)
        if line.startswith("Message: "):
            lost_records.extend(["WARNING 1", f". {line.removeprefix('Message: ')}"])

    (log.info if verbose else log.debug)("running %s", shlex.join(command))
    answer = utils.shell(command, environment, secret=environment["PASSPHRASE"], umask=0o077, watch=watch, on_line=take_line,
                         on_log=None if log_lines is None else log_lines.append)
    if log_lines is not None:
        log_lines.extend(lost_records)
    return answer


def run_nightly_duplicity(
    night: Night, command: Sequence[str], log_lines: Optional[list[str]] = None, watch: utils.Watch = lambda process: None
) -> Finished:
    """Run a duplicity command of the night, see run_duplicity. Raises Failure, and ends it, if backup/ is replaced."""
    def watch_place(process: int) -> None:
        check_in_place(night.paths)
        watch(process)

    check_in_place(night.paths)
    environment = {**gpg_environment(night), "PASSPHRASE": read_passphrase(night.paths.key), "TMPDIR": str(night.paths.temporary)}
    answer = run_duplicity(command, environment, night.verbose, log_lines, watch_place)
    check_in_place(night.paths)
    return answer


def explain(action: str, answer: Finished) -> str:
    """Return the sentence on how duplicity failed, and its last lines."""
    meaning = DUPLICITY_EXIT_CODES.get(answer.exit_code, "see its last lines")
    return f"duplicity {action} failed: {meaning}; it ended with {answer}"


def make_set(night: Night, record: Record, action: str, copy: Optional[utils.Mirror] = None) -> None:
    """Have duplicity make a set, and believe it only if duplicity says so, its manifest is there and no entry is missing.

    duplicity 0.8.22 exits 0 for a tree that vanishes while it reads. action: full or incremental. copy: what it reads in place of
    STORAGE_ROOT. Raises Failure.
    """
    root, tree = str(night.paths.root), copy.target if copy else night.paths.root
    record.kind, record.source = action, "copy" if copy else "direct"
    before = complete_sets(night.paths.encrypted)
    excluded = [] if copy else [night.paths.backup, night.paths.snapshots[1]]
    entries = utils.count_entries(tree, excluded)
    log_lines: list[str] = []
    log.info("duplicity makes the %s backup of %s", action, tree)
    with progress(night.verbose) as draw:
        since = before[-1].date.timestamp() if action == "incremental" else 0.0
        watch = watch_set(night, draw, utils.content_size(tree, excluded, since) if draw else 0)
        answer = run_nightly_duplicity(night, set_command(night, action, copy.target if copy else None), log_lines, watch)
    if answer.exit_code in DAMAGED_ARCHIVE_CODES:
        with contextlib.suppress(OSError), utils.owned_directory(night.paths.backup) as directory:
            utils.remove_at(night.paths.cache.name, directory)
            log.warning("deleted %s, which may be damaged and which the next run makes anew", night.paths.cache)
    if answer.exit_code:
        raise Failure(explain(action, answer))
    after = complete_sets(night.paths.encrypted)
    if after[:-1] != before or not any(chain[-1] == after[-1] and (len(chain) == 1) == (action == "full") for chain in chains_of(after)):
        raise Failure(f"duplicity ended well but no new {action} set is in {night.paths.encrypted}; run the backup with --full")
    reported, warnings = read_machine_log(log_lines)
    unexplained = math.inf if reported is None else abs(reported - entries) - len(warnings)
    # Nothing changes a copy. Others than mail may go on writing to the tree itself: then a hundredth of it may come or go meanwhile.
    if unexplained > 0 and (copy or unexplained > entries // 100 + abs(utils.count_entries(tree, excluded) - entries)):
        raise Failure(f"duplicity read {reported} of the {entries} files and directories of {tree}, and did not say why; "
                      "see that nothing but mail writes there, and run the backup again")
    record.size = after[-1].size
    record.unread = [printable(f"{os.path.join(root, path)}: {why}") for path, why in copy.unread.items()] if copy else []
    record.unread += [warning.replace(str(tree), root) for warning in warnings]
    if record.unread:
        record.warn(f"not all of {root} could be read; check the disk: {first_of(record.unread)}")


def watch_set(night: Night, draw: Optional[Draw], total: int) -> utils.Watch:
    """Return a watch on duplicity that ends it before it takes the last room, and draws how much of the tree it has read.

    total: how much there is to read, in bytes. What it reads besides is, of each finished volume, three times as much (seen: 0.8.22,
    3.2.1).
    """
    before = sum(utils.regular_files(night.paths.encrypted).values())
    reserve = reserve_bytes(night.paths.backup)

    def watch(process: int) -> None:
        if utils.free_bytes(night.paths.backup) < reserve:
            raise Failure(f"duplicity was ended before it took the last room of {night.paths.backup}; make room there")
        if draw:
            made = sum(utils.regular_files(night.paths.encrypted).values()) - before
            draw(utils.bytes_read_by(process) - 3 * made, total)

    return watch


def first_of(texts: Sequence[str]) -> str:
    """Return the first 20 of some texts, and how many more there are."""
    return "; ".join(texts[:20]) + (f"; and {len(texts) - 20} more" if len(texts) > 20 else "")


def read_machine_log(lines: Sequence[str]) -> tuple[Optional[int], list[str]]:
    """Read duplicity's machine log: records of `LEVEL code`, then lines that begin with a full stop.

    A file that could not be read is a WARNING with the general code 1, or 9 if its status could not be had, and exit code 0; the
    statistics count it as an error or not (all seen: 0.8.22, 3.2.1). Returns the number of source entries, and the warnings but
    those with codes 2 to 6, which are about files of other sets in the target (duplicity's log.py).
    """
    entries: Optional[int] = None
    warnings: list[str] = []
    level = ""
    for line in lines:
        text = line.removeprefix(".").strip()
        if line and not line.startswith("."):
            level = "" if re.match("WARNING [2-6]\\b", line) else line.split()[0]
        elif match := re.fullmatch(r"SourceFiles (\d+)", text):
            entries = int(match[1])
        elif level == "WARNING" and text and text not in warnings[-1:]:
            warnings.append(text)
    return entries, warnings


@needs_attention_at_most
def delete_migrated_backups(night: Night, record: Record, state: Optional[DirectoryState]) -> None:
    """Delete the plain backups of the legacy layout, now that a backup contains every file of theirs.

    state: of their directory from before the backup: one that was renamed meanwhile, even there and back, may not be in it.
    """
    migrated = night.paths.migrated
    if state is None:
        return
    if any(migrated.name in warning or warning.endswith(f" {night.paths.root}") for warning in record.unread):
        record.warn(f"{migrated} is kept because not all of it could be read; check the disk")
        return
    with utils.owned_directory(migrated) as directory:
        if directory_state(os.fstat(directory)) != state:
            record.warn(f"{migrated} is kept because it was changed during the backup; run the backup again")
            return
        names = sorted(os.listdir(directory), key=lambda name: name.startswith("duplicity-"))
        if names and not names[-1].startswith("duplicity-"):
            record.warn(f"{migrated} is kept because it holds no backups; move it to where it belongs, or away")
            return
        os.sync()
        try:
            for name in names:  # what tells that they are backups goes last, so that the run after one that is killed here goes on
                utils.remove_at(name, directory)
        except OSError as error:
            raise Failure(f"{migrated} could not be deleted, {failure_of(error)}; see lsattr -R there") from error
    migrated.rmdir()


def run_after_set(night: Night, record: Record, command: Sequence[str]) -> None:
    """Run a duplicity command after a set was made: its failure needs attention, no more."""
    answer = run_nightly_duplicity(night, command)
    if answer.exit_code:
        record.warn(explain(command[4], answer))


@contextlib.contextmanager
def deletion_allowed(paths: Paths) -> Iterator[bool]:
    """Keep commands that read away from encrypted/ while the block runs. Yields whether that can be had: not while one reads."""
    if not os.path.lexists(paths.encrypted):  # moved aside: nobody can read there
        yield True
        return
    with utils.directory_locked(paths.encrypted, exclusive=True) as allowed:
        yield allowed


@needs_attention_at_most
def clean_up(night: Night, record: Record, allowed: bool) -> None:
    """Have duplicity delete files of no complete set, and delete what readers that died have left. allowed: whether nobody reads."""
    if allowed:
        run_after_set(night, record, clean_up_command(night))
        with utils.owned_directory(night.paths.backup) as directory:
            for place in night.paths.backup.glob(READER_PREFIX + "????????"):  # as tempfile names them
                if stat.S_ISDIR(place.lstat().st_mode):
                    with utils.directory_locked(place, exclusive=True) as dead:
                        if dead:
                            utils.remove_at(place.name, directory)
        for home in RUN_DIRECTORY.glob(f"{night.paths.gnupg.name}-*"):
            with utils.directory_locked(home, exclusive=True) as dead:
                if dead:
                    utils.remove(home)


@needs_attention_at_most
def remove_old_sets(night: Night, record: Record, sets: Sequence[BackupSet], allowed: bool) -> None:
    """Delete the chains that are old enough, unless the clock may have jumped ahead: it would delete all of them.

    sets: the complete ones from before this run. allowed: whether nobody reads.
    """
    if not allowed:
        record.warn("no old backups were deleted because a --verify, --list or --restore reads them; the next run will delete them")
        return
    if sets and night.now - sets[-1].date > timedelta(days=FULL_DAYS):
        record.warn(f"no old backups were deleted because the newest was over {FULL_DAYS} days old: check the clock; "
                    "if it is right the next run will delete them")
        return
    log.info("deleting old backups")
    run_after_set(night, record, remove_old_command(night))


@needs_attention_at_most
def grant_group_read(night: Night, record: Record) -> None:
    """Give STORAGE_USER's group, and so the hooks, read access to the encrypted files."""
    with utils.owned_directory(night.paths.backup, night.paths.encrypted.name) as directory:
        for name in utils.regular_files(directory):
            with contextlib.suppress(FileNotFoundError), utils.opened(name, os.O_RDONLY | os.O_NONBLOCK, directory) as file:
                status = os.fstat(file)
                if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != (0, night.user.pw_gid, 0o640):
                    os.fchown(file, 0, night.user.pw_gid)
                    os.fchmod(file, 0o640)


# Step 15: how the run went


@contextlib.contextmanager
def last_run_recorded(night: Night) -> Iterator[Record]:
    """Write last-run.json when the block ends, however it ends, unless nothing was touched.

    A service that could not be started again is told of, and outranks every other exit code.
    """
    record = Record()
    try:
        yield record
        utils.raise_if_interrupted()
    except (Failure, OSError, Interrupted) as error:
        failure = failure_of(error) if isinstance(error, OSError) else error
        if failure.exit_code == 2 and record.duplicity_version is None and not record.downtime.not_started:  # step 1 was not over
            raise failure from error
        tell_of_services(record)
        code = 5 if record.downtime.not_started else 1 if failure.exit_code == 2 else failure.exit_code
        write_last_run(night, record, code, str(failure))
        failure.exit_code = code
        raise failure from error
    tell_of_services(record)
    write_last_run(night, record)


def tell_of_services(record: Record) -> None:
    """Say which services could not be started again, and why."""
    for name, why in record.downtime.not_started.items():
        log.error("%s could not be started again; mend it, the next run tries it, too: %s", name, why)


def exit_code_of(record: Record) -> int:
    """Return the exit code of a run that made a backup."""
    return 5 if record.downtime.not_started else 3 if record.attention else 0


def tell_what_was_made(night: Night, record: Record) -> None:
    """Say on a terminal, as the last line, what was made, how big it is and how long mail was down."""
    seconds = (datetime.now(timezone.utc) - night.now).total_seconds()
    log.info("made the %s backup, %s, in %.0f seconds; mail was down for %.1f seconds", record.kind,
             human_size(record.size), seconds, record.downtime.seconds)


@needs_attention_at_most
def write_last_run(night: Night, record: Record, exit_code: Optional[int] = None, message: str = "") -> None:
    """Write last-run.json. exit_code, message: of a run that failed; of one that made a backup the record tells them."""
    not_started = [f"{name} could not be started again" for name in record.downtime.not_started]
    messages = not_started + record.attention + record.remarks + [message]
    content = {
        "start": night.now.astimezone(timezone.utc).isoformat(timespec="seconds"),
        "end": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": record.kind,
        "source": record.source,
        "downtime_seconds": round(record.downtime.seconds, 3),
        "exit_code": exit_code_of(record) if exit_code is None else exit_code,
        "message": "; ".join(text.splitlines()[0] for text in messages if text),
        "duplicity_version": record.duplicity_version,
    }
    check_in_place(night.paths)
    utils.write_atomically(night.paths.last_run, json.dumps(content, indent=1) + "\n", 0o640, night.user.pw_gid)


def read_last_run(path: Path) -> Optional[dict[str, Any]]:
    """Return what last-run.json holds, None if there was no run yet; if it cannot be read, a failed run that says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {"exit_code": 1, "message": f"{path} does not hold a run; remove it"}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        return {"exit_code": 1, "message": f"cannot read {path}: {error}; remove it"}


# Status

NO_BACKUPS = "No backups have been made yet."


def backup_status(env: Mapping[str, str], now: Optional[datetime] = None) -> dict[str, Any]:
    """Tell what backups there are, how big they are, when each will be deleted and how the last run went; made for JSON.

    env: settings with STORAGE_ROOT. now: the time, with its zone; default the clock's. Only directory entries are read. Returns:
    directory, encpwfile, tz; backups, newest first, each with date (such as 20261122T030000Z), date_str (local ISO time),
    date_delta (its age), full, previous (the date it builds on), size in bytes, and deleted_in where it can be told;
    unmatched_file_size in bytes, of files that belong to no complete set; free_size in bytes, of the disk they are on; last_run, as
    in last-run.json, None if there was none. Raises Failure, OSError.
    """
    paths = paths_of(env)
    now = (now or datetime.now(timezone.utc)).astimezone()
    sets, unmatched = read_sets(paths.encrypted)
    sets = [backup_set for backup_set in sets if backup_set.complete]
    deleted_in = tell_deletions(sets, timedelta(days=keep_days_of(env)), now)
    return {
        "directory": str(paths.encrypted), "encpwfile": str(paths.key), "tz": now.tzname(),
        "backups": [{
            "date": backup_set.stamp, "date_str": backup_set.date.astimezone().isoformat(),
            "date_delta": span(backup_set.date, now), "full": backup_set.full, "previous": backup_set.previous,
            "size": backup_set.size, **({"deleted_in": deleted_in[backup_set]} if backup_set in deleted_in else {}),
        } for backup_set in reversed(sets)],
        "unmatched_file_size": unmatched, "free_size": utils.free_bytes(next(
            path for path in (paths.encrypted, *paths.encrypted.parents) if path.exists())), "last_run": read_last_run(paths.last_run)}


def span(begin: datetime, end: datetime) -> str:
    """Return the time between two in its two largest units, such as "3 hours, 5 minutes"; of one that is over, "0 minutes"."""
    delta = relativedelta(max(begin, end), begin)
    units = [(abs(getattr(delta, unit)), unit) for unit in ("years", "months", "days", "hours", "minutes")]
    first = next((place for place, (number, _) in enumerate(units) if number), len(units) - 1)
    return ", ".join(f"{number} {unit if number != 1 else unit[:-1]}" for number, unit in units[first:first + 2])


def tell_deletions(sets: Sequence[BackupSet], keep: timedelta, now: datetime) -> dict[BackupSet, str]:
    """Tell when each set will be deleted. sets: the complete ones, oldest first. keep: how old the newest of a chain must be.

    Exact for the chains before the last full and for orphans, which duplicity's cleanup deletes; for the current chain an estimate
    of when the next full starts a new one, and of its age from then on. Returns texts such as "2 days, 3 hours".
    """
    chains = chains_of(sets)
    chained = {backup_set for chain in chains for backup_set in chain}
    told = {backup_set: "on next daily backup" for backup_set in sets if backup_set not in chained}
    for chain in chains[:-1]:
        end = chain[-1].date + keep
        told.update(dict.fromkeys(chain, "on next daily backup" if end <= now else span(now, end)))
    for full, *increments in chains[-1:]:
        next_full = full.date + timedelta(days=FULL_DAYS)
        if grown := sum(increment.size for increment in increments):
            next_full = full.date + timedelta(days=min(FULL_DAYS, full.size / 2 / (grown / len(increments))))
        newest = ([full] + increments)[-1].date
        last = newest if reason_for_full(sets, now) else max(newest, next_full)
        days = max(0, -((now - last - keep) // timedelta(days=1)))
        told.update(dict.fromkeys((full, *increments), f"approx. {days} day{'' if days == 1 else 's'}"))
    return told


def human_size(size_bytes: int) -> str:
    """Return a size such as 1.2 GB, in decimal units."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "bytes" or size >= 99.95 else f"{size:.1f} {units[0]}"


def headline_of(status: Mapping[str, Any], now: datetime) -> tuple[bool, str]:
    """Return whether all is well, and in a line how it stands: OK, or why the status has exit code 3.

    status: backup_status's answer. now: the time, with its zone.
    """
    backups, last = status["backups"], status["last_run"]
    told = f"last backup {backups[0]['date_delta']} ago" if backups else "there is no complete backup"
    for increments, found in enumerate(backups):
        if found["full"]:
            date = stamp_date(found["date"]).astimezone()
            told += date.strftime(", full on %A" if now - date < timedelta(days=6) else ", full on %Y-%m-%d")
            told += f", {increments} increment{'' if increments == 1 else 's'} since"
            break
    if last is not None and last.get("exit_code") not in (0, 3):
        return False, printable(f"FAILED: the last run failed: {last.get('message')}; {told}")
    if not backups or now - stamp_date(backups[0]["date"]) > timedelta(hours=OVERDUE_HOURS):
        return False, f"OVERDUE: there is no backup of the last {OVERDUE_HOURS} hours; {told}"
    return True, f"OK: {told}"


def status_text(status: Mapping[str, Any], now: datetime, colour: bool = False) -> str:
    """Return backup_status's answer for people, with no line break at its end. now: see headline_of. colour: for a terminal."""
    well, headline = headline_of(status, now)
    lines = [f"\x1b[{32 if well else 31}m{headline}\x1b[0m" if colour else headline, ""]
    row = "{:<25}  {:<20}  {:<9}  {:>8}  {}"
    lines += [row.format("When", "Age", "Type", "Size", "Deleted in")] if status["backups"] else [NO_BACKUPS, ""]
    for backup in status["backups"]:
        kind = "full" if backup["full"] else "increment"
        lines.append(row.format(
            backup["date_str"], backup["date_delta"], kind, human_size(backup["size"]), backup.get("deleted_in", "unknown")))
        if backup["full"]:
            lines.append("")  # a chain ends, or rather begins
    total = sum(backup["size"] for backup in status["backups"]) + status["unmatched_file_size"]
    unmatched = f", of which {human_size(status['unmatched_file_size'])} in files of no complete backup"
    lines += [f"Total:    {human_size(total)}{unmatched if status['unmatched_file_size'] else ''}",
              f"Free:     {human_size(status['free_size'])} on that disk",
              f"Backups:  {printable(status['directory'])}", f"Key:      {printable(status['encpwfile'])} (keep a copy elsewhere)",
              f"Last run: {printable(last_run_text(status['last_run']))}"]
    return "\n".join(lines)


def last_run_text(last: Optional[Mapping[str, Any]]) -> str:
    """Return in a line when the last run ended, in local ISO time, and how it went. last: of last-run.json, None if there was no run."""
    if last is None:
        return "none yet"
    end, seconds = str(last.get("end", "unknown")), last.get("downtime_seconds")
    with contextlib.suppress(ValueError, OverflowError):
        end = datetime.fromisoformat(end).astimezone().isoformat()
    told = [f"exit code {last.get('exit_code')}", last.get("kind"),
            {"direct": "read directly", "copy": "read from a copy"}.get(str(last.get("source"))),
            seconds is not None and f"mail down {seconds} seconds", last.get("message")]
    return f"{end}: {', '.join(str(part) for part in told if part)}"


def show_status(env: Mapping[str, str], as_json: bool, as_html: bool) -> int:
    """Print the status. Returns the exit code: 3 if there is no backup of the last 36 hours, or if the last run failed."""
    now = datetime.now().astimezone()
    status = backup_status(env, now)
    well, headline = headline_of(status, now)
    if as_json:
        print(json.dumps(status, indent=1))
    elif as_html:
        print(status_page(status, now))
    else:
        print(status_text(status, now, sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if not well:
        log.warning(headline)
    return 0 if well else 3


# Status as a web page

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Backups</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; --page: #ffffff; --text: #1b222c; --muted: #566170; --line: #d8dde4; --bar: #2563a8;
    --alarm: #8f1d14; --alarm-page: #fdecea; }}
@media (prefers-color-scheme: dark) {{ :root {{ --page: #14181d; --text: #e4e8ed; --muted: #a4aebb; --line: #363e48; --bar: #7fb3ee;
    --alarm: #ffb9b0; --alarm-page: #3d1d1a; }} }}
body {{ max-width: 44rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--text);
    font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ margin: 0; font-size: 1.6rem; line-height: 1.2; }}
h1 + p, dt, caption, small, thead {{ color: var(--muted); font-size: .8125rem; }}
.alarm {{ padding: .5rem .75rem; border-left: .25rem solid; background: var(--alarm-page); color: var(--alarm); }}
dd {{ margin: 0 0 1rem; }}
.bar {{ display: block; min-width: 2px; height: .5rem; margin-top: .2rem; background: var(--bar); }}
table {{ width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
caption {{ text-align: left; }}
th, td {{ padding: .4rem 0 .4rem min(2rem, 3vw); border-bottom: 1px solid var(--line); font-weight: inherit; text-align: left;
    vertical-align: top; }}
th:first-child {{ padding-left: 0; width: 45%; }}
tbody + tbody tr:first-child > * {{ padding-top: 2rem; }}
.full, tfoot tr:last-child {{ font-weight: bold; }}
.size {{ text-align: right; }}
.size, time span {{ white-space: nowrap; }}
small {{ display: block; font-weight: normal; }}
@media (max-width: 30rem) {{ body {{ padding: .5rem; }} table {{ font-size: .8125rem; }} }}
</style>
</head>
<body>
<main>
<h1>Backups</h1>
<p>As of {now}</p>
<p class="{headline_class}"><strong>{headline}</strong></p>
<dl>
<dt>Last run</dt>
<dd class="{last_class}">{last_run}</dd>
<dt>Encrypted files</dt>
<dd><code>{directory}</code>, {free} free on that disk<br>These are safe to copy anywhere: to another machine, best of all.</dd>
<dt>Key</dt>
<dd><code>{key}</code><br>Keep a copy of this elsewhere, and not beside the files: without it no backup can be opened.</dd>
</dl>
{backups}
</main>
</body>
</html>"""

TABLE = """\
<table>
<caption>All backups, the newest first, in local time. A full backup begins a chain; an increment
needs those below it in its chain.</caption>
<thead>
<tr><th scope="col">When</th><th scope="col">Type</th><th scope="col" class="size">Size</th><th scope="col">Deleted in…</th></tr>
</thead>
{chains}
<tfoot>
{sums}
</tfoot>
</table>"""


def status_page(status: Mapping[str, Any], now: datetime) -> str:
    """Return backup_status's answer as a web page that holds no script and fetches nothing; it is ASCII, whatever the locale.

    now: the time, with its zone, at which the answer was asked for.
    """
    well, headline = headline_of(status, now)
    last = status["last_run"]
    page = PAGE.format(
        headline_class="" if well else "alarm", headline=for_page(headline),
        now=for_page(f"{clock_time(now.astimezone().isoformat(timespec='seconds'))} {status['tz']}"),
        last_class="alarm" if last and last.get("exit_code") == 3 else "", last_run=for_page(clock_time(last_run_text(last))),
        directory=for_page(status["directory"]), free=human_size(status["free_size"]), key=for_page(status["encpwfile"]),
        backups=table(status) if status["backups"] else f"<p><strong>{NO_BACKUPS}</strong></p>")
    return page.encode("ascii", "xmlcharrefreplace").decode()


def for_page(text: str) -> str:
    """Return text as it can stand anywhere in a page, what is not printable as an escape."""
    return html.escape(printable(text))


def clock_time(text: str) -> str:
    """Return text with the local ISO time that it begins with as a clock shows it, such as 2026-11-22 03:00:00."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)[+-]\d\d:\d\d", r"\1 \2", text)


def table(status: Mapping[str, Any]) -> str:
    """Return the page's table of the backups, a part for each chain, and of their sums.

    A bar in each row is as wide, in percent of its cell, as the backup is big beside the largest.
    """
    largest = max(1, *(backup["size"] for backup in status["backups"]))
    chains = "<tbody>\n"
    for number, backup in enumerate(status["backups"], 1):
        kind, (day, clock) = "full" if backup["full"] else "increment", clock_time(backup["date_str"]).split()
        chains += (
            f'<tr class="{kind}"><th scope="row"><time datetime="{backup["date_str"]}">'
            f'<span>{day}</span> <span>{clock}</span></time><small>{backup["date_delta"]} ago</small>'
            f'<span class="bar" style="width: {100 * backup["size"] / largest:.1f}%"></span></th>'
            f'<td>{kind}</td><td class="size">{human_size(backup["size"])}</td>'
            f'<td>{backup.get("deleted_in", "unknown")}</td></tr>\n')
        if backup["full"] and number < len(status["backups"]):
            chains += "</tbody>\n<tbody>\n"
    unmatched = status["unmatched_file_size"]
    sums = {"Files of no complete backup": unmatched} if unmatched else {}
    sums["Total"] = unmatched + sum(backup["size"] for backup in status["backups"])
    return TABLE.format(chains=f"{chains}</tbody>", sums="\n".join(
        f'<tr><th scope="row" colspan="2">{name}</th><td class="size">{human_size(size)}</td><td></td></tr>'
        for name, size in sums.items()))


# Reading: verify, list, restore


@dataclass(frozen=True)
class Reader:
    """What a command that reads knows. archive: an archive directory of its own. environment: for the programs it runs."""

    paths: Paths
    archive: Path
    environment: Mapping[str, str]
    verbose: bool

    def run(
        self, action: str, *options: str, directory: Optional[Path] = None, log_lines: Optional[list[str]] = None,
        watch: utils.Watch = lambda process: None,
    ) -> Finished:
        """Run a duplicity command on the backups, see run_duplicity. directory: to restore to or compare with. Returns how it ended."""
        command = duplicity_command(self.paths, self.archive, action, *options) + ([str(directory)] if directory else [])
        return run_duplicity(command, self.environment, self.verbose, log_lines, watch)

    def open_file(self, name: str, take_text: Optional[utils.TakeLine] = None) -> Finished:
        """Have gpg open a file of encrypted/, see run_gpg. Returns how it ended."""
        return run_gpg(self.paths.encrypted / name, self.environment["PASSPHRASE"], {**self.environment, "PASSPHRASE": ""}, take_text)


@contextlib.contextmanager
def reader_of(settings: Mapping[str, str], verbose: bool = False) -> Iterator[Reader]:
    """Put together what a command that reads needs: directories of its own, so that it neither waits for a backup nor disturbs one.

    No backup deletes a set while the block runs, unless the lock on encrypted/ cannot be had. The archive directory begins as hard
    links to the finished files of cache/ where those can be had; duplicity makes the rest. Raises Failure if there is no backup, or no
    key that opens any.
    """
    paths = paths_of(settings)
    if not complete_sets(paths.encrypted):
        raise Failure(f"there is no complete backup in {paths.encrypted}; make one, or put your copy of the backups there")
    for program in ("duplicity", "gpg", "gpgconf", "setpriv"):
        utils.find_program(program, program_environment())
    passphrase = read_passphrase(paths.key, lenient=True)
    for directory in (paths.backup, paths.encrypted):
        try:
            utils.check_owned_directory(directory)
        except Failure as error:
            log.warning("what is read may be somebody else's: %s", error)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(utils.directory_locked(paths.encrypted, exclusive=False)):
            log.warning("%s is locked by somebody else; a backup that runs meanwhile may delete what is read", paths.encrypted)
        own = Path(stack.enter_context(reader_directory(paths)))
        gnupg = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{paths.gnupg.name}-", dir=RUN_DIRECTORY)))
        for directory in (own, gnupg):
            stack.enter_context(utils.directory_locked(directory, exclusive=True))  # a backup that cleans up sees that we live
        environment = {**program_environment(), "GNUPGHOME": str(gnupg), "TMPDIR": str(own), "PASSPHRASE": passphrase}
        stack.callback(utils.shell, ["gpgconf", "--kill", "all"], {**environment, "PASSPHRASE": ""}, interruptible=False,
                       timeout_seconds=GPGCONF_SECONDS)
        archive = own / "archive"
        archive.mkdir()
        link_finished_files(paths.cache, archive)
        reader = Reader(paths, archive, environment, verbose)
        check_reading_key(reader)
        yield reader


def reader_directory(paths: Paths) -> "tempfile.TemporaryDirectory[str]":
    """Make a directory for a command that reads: on the same disk as cache/, for the links, or where there is no room in TMPDIR."""
    if os.access(paths.backup, os.W_OK) and utils.free_bytes(paths.backup) >= TEMPORARY_BYTES:
        with contextlib.suppress(OSError):  # a disk with an error lets nobody write, whatever access(2) says
            return tempfile.TemporaryDirectory(prefix=READER_PREFIX, dir=paths.backup)
    return tempfile.TemporaryDirectory(prefix=READER_PREFIX)


def check_reading_key(reader: Reader) -> None:
    """Check that the key opens something of the backups, the newest manifest if it is right. Raises Failure if it opens nothing."""
    for backup_set in reversed(complete_sets(reader.paths.encrypted)):
        if not all(is_wrong_key(reader.open_file(name)) for name in backup_set.metadata):
            return
    raise Failure(wrong_key_of(reader.paths))


def link_finished_files(cache: Path, archive: Path) -> None:
    """Fill an archive directory with hard links to the files of another that duplicity has finished, as far as they can be had."""
    for directory, _, names in os.walk(cache):
        target = archive / os.path.relpath(directory, cache)
        target.mkdir(exist_ok=True)
        for name in names:
            if ARCHIVE_FILE.fullmatch(name) and not name.endswith(".part"):
                with contextlib.suppress(OSError):  # another disk, or a backup has just renamed it
                    os.link(Path(directory, name), target / name)


def verify(reader: Reader) -> list[str]:
    """Check every file of every backup: volumes against the checksums in their manifest, manifests and signatures by gpg's own check.

    Prints how many sets, files and bytes were checked. Returns what is damaged or missing, a sentence each.
    """
    sets = read_sets(reader.paths.encrypted)[0]
    complete = [backup_set for backup_set in sets if backup_set.complete]
    running = utils.is_locked(reader.paths.lock)
    wrong = []
    sizes = utils.regular_files(reader.paths.encrypted)
    size = sum(backup_set.size for backup_set in complete)
    with progress(reader.verbose) as draw:
        files = done = 0

        def tell(path: Path) -> None:
            nonlocal files, done
            (log.info if reader.verbose else log.debug)("checking %s", path)
            if draw:
                draw(done, size)
            files += 1
            done += sizes.get(path.name, 0)

        for backup_set in complete:
            wrong += verify_set(reader, backup_set, tell)
    wrong += missing_sets(reader, sets, running)
    print(f"checked {len(complete)} backup sets: {files} files, {human_size(done)}")
    return wrong


def missing_sets(reader: Reader, sets: Sequence[BackupSet], running: bool) -> list[str]:
    """Return what of whole sets is missing, a sentence each. sets: complete or not. running: a backup may be making the last of them."""
    wrong = []
    complete = [backup_set for backup_set in sets if backup_set.complete]
    chained = {backup_set for chain in chains_of(complete) for backup_set in chain}
    for backup_set in sets:
        if backup_set.complete and backup_set not in chained:
            wrong.append(f"the increment of {backup_set.stamp} leads back to no full backup: sets before it are missing")
        if not backup_set.complete and (not running or backup_set.stamp < complete[-1].stamp):
            wrong.append(f"the manifest of {backup_set.stamp} is missing from {reader.paths.encrypted}")
    known = {backup_set.stamp for backup_set in sets}
    for path in sorted(reader.archive.rglob("*.manifest")):
        match = ARCHIVE_FILE.fullmatch(path.name)
        if match and match[1] not in known:
            wrong.append(f"the set of {match[1]} is missing from {reader.paths.encrypted}, all of it")
    return wrong


def verify_set(reader: Reader, backup_set: BackupSet, tell: Callable[[Path], None]) -> list[str]:
    """Check the files of a complete set, see verify. tell: called with each before it is read. Returns what is damaged or missing."""
    wrong = []
    manifest: list[str] = []
    opened = []
    for name in backup_set.metadata:
        path = reader.paths.encrypted / name
        tell(path)
        answer = reader.open_file(name, manifest.append if name == backup_set.manifest else None)
        if not answer.exit_code:
            opened.append(name)
        else:
            why = "another key than this made it, or it is damaged" if is_wrong_key(answer) else "it is damaged"
            wrong.append(f"{path}: {why}")
    if not backup_set.signed:
        wrong.append(f"the signatures of {backup_set.stamp} are missing from {reader.paths.encrypted}")
    checksums = checksums_in(manifest, backup_set.manifest)
    volumes = {name for name in backup_set.files if ".difftar." in name}
    for name in sorted(checksums.keys() | (volumes if backup_set.manifest in opened else set())):
        path = reader.paths.encrypted / name
        if name not in volumes:
            wrong.append(f"{path} is missing")
            continue
        tell(path)
        try:
            if name not in checksums:
                wrong.append(f"{path} is not in its set's manifest")
            elif utils.sha1_of(path) != checksums[name]:
                wrong.append(f"{path} is damaged: its checksum is not that in the manifest")
        except OSError as error:
            wrong.append(f"{path} cannot be read: {error.strerror}")
    return wrong


def checksums_in(manifest: Sequence[str], name: str) -> dict[str, str]:
    """Return the SHA-1 of each volume of a set by the volume's name, empty if the manifest lacks it. manifest: its lines, name: its own."""
    checksums: dict[str, str] = {}
    volume = ""
    for line in manifest:
        if match := re.fullmatch(r"Volume (\d+):", line):
            volume = name.replace(".manifest.", f".vol{match[1]}.difftar.")
            checksums[volume] = ""
        elif match := re.fullmatch(r"    Hash SHA1 ([0-9a-f]{40})", line):
            checksums[volume] = match[1]
    return checksums


def compare(reader: Reader) -> list[str]:
    """Compare the newest backup with the live files, contents included. Returns the differences, a sentence each. Raises Failure."""
    lines: list[str] = []
    answer = reader.run("verify", "--compare-data", *exclusions(reader.paths), "--allow-source-mismatch", "--log-fd=LOG",
                        directory=reader.paths.root, log_lines=lines)
    if answer.exit_code not in (0, 1):
        raise Failure(explain("verify", answer))
    different = [line.removeprefix(". ") for line in lines if line.startswith(". ") and "ifference found: " in line]
    if answer.exit_code and not different:
        raise Failure(explain("verify", answer))
    return different


def list_files(reader: Reader, options: Sequence[str]) -> list[str]:
    """Return the paths in a backup, in order, escaped. options: see time_options. Raises Failure."""
    lines: list[str] = []
    answer = reader.run("list-current-files", *options, "--log-fd=LOG", log_lines=lines)
    if answer.exit_code:
        raise Failure(explain("list-current-files", answer))
    # Whatever is not ASCII duplicity escapes (its util.py, 0.8.22 and 3.2.1).
    names = [printable(match[1].encode("ascii", "backslashreplace").decode("unicode-escape"))
             for line in lines if (match := re.fullmatch(r"INFO 10 \S+ '(.*)' \S+", line))]
    # Records that were lost, for names that are not UTF-8, are the date in 24 characters and the name, as Python shows a string.
    for line in lines:
        if re.match(r"\. [\"']\w{3} \w{3} [ \d]\d ", line):
            with contextlib.suppress(ValueError, SyntaxError):  # a name with a line break can look like one
                names.append(printable(str(ast.literal_eval(line[2:]))[25:]))
    return sorted(names)


def set_of_time(sets: Sequence[BackupSet], time: str, now: datetime) -> BackupSet:
    """Return the set that was the newest at a time. sets: the complete ones, oldest first.

    time: an age such as 3D or 1D12h, where a month (M) has 30 days, or what dateutil's isoparse reads
    with year, month and day, in local time unless it tells a zone. now: the time, with its zone.
    Raises Failure: exit code 2 if that is no time, 1 if it is before the first set, of which
    duplicity (0.8.22, 3.2.1) would say nothing and take that one.
    """
    asked: Optional[datetime] = None
    with contextlib.suppress(ValueError, OverflowError):
        if re.fullmatch(r"(\d+[smhDWMYdwy])+", time):
            ages = re.findall(r"(\d+)(.)", time)
            asked = now - timedelta(seconds=sum(int(number) * AGE_SECONDS[unit] for number, unit in ages))
        elif re.match(r"\d{4}-?\d\d-?\d\d", time):
            asked = isoparse(time).astimezone()
    if asked is None:
        raise Failure(f"{printable(time) or 'nothing'} is not a time; give one such as 3D, 2026-11-20 "
                      "or 2026-11-20T03:00:00", 2)
    older = [backup_set for backup_set in sets if backup_set.date <= asked]
    if not older:
        dates = ", ".join(backup_set.date.astimezone().isoformat() for backup_set in sets)
        raise Failure(f"there is no backup as old as {printable(time)}; name the time of one of these, "
                      f"or a later one: {dates}")
    return older[-1]


def time_options(reader: Reader, time: Optional[str]) -> list[str]:
    """Return duplicity's options for the newest backup, or that of a time, see set_of_time, which is named."""
    if time is None:
        return []
    chains = chains_of(complete_sets(reader.paths.encrypted))
    sets = sorted((backup_set for chain in chains for backup_set in chain), key=lambda found: found.stamp)
    chosen = set_of_time(sets, time, datetime.now(timezone.utc))
    log.warning("backup of %s", chosen.date.astimezone().isoformat(" "))
    return ["-t", str(int(chosen.date.timestamp()))]


def restore(reader: Reader, directory: Path, path: Optional[str], time: Optional[str]) -> None:
    """Restore a backup, or one directory or file of it, into a directory that does not exist yet or is empty.

    path: relative to STORAGE_ROOT; what is in a directory goes into directory, a file goes there by its name. time: see
    set_of_time. Raises Failure.
    """
    of_time = time_options(reader, time)
    wanted = os.path.normpath(path or ".")
    if path == "" or f"{wanted}/".startswith(("/", "../")):
        raise Failure(f"--path is {printable(path or 'empty')}; give it relative to STORAGE_ROOT, such as mail/mailboxes/example.com", 2)
    options = of_time + (["-r", wanted] if wanted != "." else [])
    with restore_directory(reader.paths, directory) as (place, mode):
        fresh = f".restoring-{os.getpid()}"  # versions differ in what they do with a directory that is there
        lines: list[str] = []
        log.info("restoring %s to %s", printable(wanted) if wanted != "." else "everything", directory)
        try:
            with progress(reader.verbose) as draw:
                free = utils.free_bytes(place)
                watch: utils.Watch = lambda process: draw(free - utils.free_bytes(place), None) if draw else None
                answer = reader.run("restore", *options, "--log-fd=LOG", directory=directory / fresh, log_lines=lines, watch=watch)
        except BaseException:
            if utils.is_in(place, fresh):
                log.warning("what was restored until then is in %s", directory / fresh)
            raise
        if answer.exit_code == 19 or not answer.exit_code and not utils.is_in(place, fresh):
            utils.remove_at(fresh, place)  # 3.2.1 leaves an empty one
            raise Failure(f"{printable(wanted)} is not in the backup; there is: {', '.join(near_paths(reader, wanted, of_time))}")
        if answer.exit_code:
            left = f"\nwhat could be restored is in {directory / fresh}" if utils.is_in(place, fresh) else ""
            raise Failure(f"{explain('restore', answer)}{left}")
        move_up(fresh, place, os.path.basename(wanted), mode)
        if lost := read_machine_log(lines)[1]:  # duplicity exits 0 when the disk refuses a name or a content (seen: 0.8.22)
            raise Failure(f"not all could be restored to {directory}; try another disk: {first_of(lost)}")
    log.info("restored to %s", directory)


@contextlib.contextmanager
def restore_directory(paths: Paths, directory: Path) -> Iterator[tuple[int, int]]:
    """Make the directory to restore to, for nobody but root yet, and keep it open: who owns what holds it can rename it meanwhile.

    An empty one may be there. Yields its descriptor and the mode that it had. If the block fails it has that again, or, if it was
    made and is empty, goes. Raises Failure.
    """
    real = Path(os.path.realpath(directory))
    if paths.backup in real.parents:
        raise Failure(f"{directory} is in {paths.backup}, where it could be deleted by the next run; name another place", 2)
    if not directory.parent.is_dir():
        raise Failure(f"{directory.parent} is not a directory; make it, or name another place", 2)
    made = not os.path.lexists(directory)
    if made:
        directory.mkdir(mode=0o700)
    if not directory.is_dir() or any(directory.iterdir()):
        raise Failure(f"{directory} is there already and not empty; name a directory that does not exist yet", 2)
    try:
        with utils.opened(os.fspath(real)) as place:
            mode = stat.S_IMODE(os.fstat(place).st_mode)
            os.fchmod(place, 0o700)
            try:
                yield place, mode
            except BaseException:
                os.fchmod(place, mode)
                raise
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def move_up(fresh: str, place: int, name: str, mode: int) -> None:
    """Put what was restored in its place: place gets a directory's entries, mode, owner and times, a file goes into it by name.

    place: the descriptor of the directory to restore to. fresh: what was restored, an entry of it. mode: what place had.
    """
    status = os.stat(fresh, dir_fd=place, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.rename(fresh, name, src_dir_fd=place, dst_dir_fd=place)
        os.fchmod(place, mode)
        return
    with utils.opened(fresh, parent=place) as source:
        for child in os.listdir(source):
            os.rename(child, child, src_dir_fd=source, dst_dir_fd=place)
    os.rmdir(fresh, dir_fd=place)
    os.fchown(place, status.st_uid, status.st_gid)
    os.fchmod(place, stat.S_IMODE(status.st_mode))
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))


def near_paths(reader: Reader, wanted: str, options: Sequence[str]) -> list[str]:
    """Return what there is in the backup where a path was looked for: the entries of the directory nearest to it, 20 at most."""
    names = list_files(reader, options)
    found: list[str] = []
    while wanted and not found:
        wanted = os.path.dirname(wanted)
        found = [name for name in names if name != "." and os.path.dirname(name) == wanted]
    return found[:20] + (["…"] if len(found) > 20 else [])


# Dry run


def show_plan(night: Night, force_full: bool) -> None:
    """Print what a backup made now would do; nothing is touched, so the key is not tried.

    Raises Failure as the other checks of a backup do.
    """
    check_root()
    paths = night.paths
    with contextlib.suppress(FileNotFoundError):
        utils.check_owned_directory(paths.backup)
    check_surroundings(night)
    sets = complete_sets(paths.encrypted)
    if sets:
        check_clock(night, sets)
    reason = reason_for_full(sets, night.now, force_full)
    services = utils.service_manager(night.environment)
    lines = services.running(night.services)
    before, after = ([[str(paths.backup / name)]] if os.path.lexists(paths.backup / name) else []
                     for name in ("before-backup", "after-backup"))
    commands = [
        *before, *(services.command("stop", line) for line in lines),
        *(services.command("start", line) for line in lines),
        set_command(night, "full" if reason else "incremental", snapshot_of(paths) / "tree"),
        remove_old_command(night), clean_up_command(night), *after]
    print(f"make a full backup: {reason}" if reason else "make an incremental backup")
    if paths.plain.exists():
        print(f"move {printable(str(paths.plain))} to {printable(str(paths.migrated))}")
    for path in dead_paths(paths):
        print(f"delete {printable(str(path))}")
    for command in commands:
        print(f"run {printable(shlex.join(command))}")


# Messages and progress

CLEAR_LINE = "\r\x1b[K"


class _Prefixed(logging.Formatter):
    """Begins every line with the program's name, on a terminal a step with the time, too, and escapes what that could mistake."""

    def format(self, record: logging.LogRecord) -> str:
        terminal = sys.stderr.isatty()
        clock = time.strftime("%H:%M:%S ") if terminal and record.levelno == logging.INFO else ""
        lines = "\n".join(f"backup: {clock}{printable(line)}" for line in super().format(record).split("\n"))
        return CLEAR_LINE + lines if terminal else lines


@contextlib.contextmanager
def progress(verbose: bool) -> Iterator[Optional[Draw]]:
    """Yield a function that draws how far something has come, None where that is not to be shown: without a terminal, and with -v.

    It takes the bytes done, and of how many if that is known, and draws one line over and over again.
    """
    if verbose or not sys.stderr.isatty():
        yield None
        return
    began = time.monotonic()

    def draw(done: int, total: Optional[int]) -> None:
        done = max(0, min(done, total or done))
        rate = done / max(0.001, time.monotonic() - began)
        text = f"{human_size(done)}{f' of {human_size(total)}' if total else ''}, {human_size(int(rate))}/s"
        if total and rate:
            minutes, seconds = divmod(round((total - done) / rate), 60)
            text += f", {minutes}:{seconds:02} left"
        with contextlib.suppress(OSError):  # the terminal is gone: a backup goes on
            sys.stderr.write(f"{CLEAR_LINE}        {text}")
            sys.stderr.flush()

    try:
        yield draw
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()


# Command line

EPILOG = """\
examples:
  backup.py                       back up now, as the settings say
  backup.py --status              what there is and when it will be deleted
  backup.py --list --time 3D      the files in the backup of three days ago
  backup.py --restore /root/old --path mail/mailboxes/example.com/alice
                                  one mailbox, as it was in the newest backup
  backup.py --storage-root /srv/mail   without a settings file

exit codes:
  0      done
  1      failed: no new backup was made, or what was asked could not be done
  2      wrong usage or settings; nothing was touched
  3      the backup was made but something needs attention; for --status: there
         is no complete backup, or the newest is over 36 hours old, or the last
         run failed; for --verify: damage or (with --compare) differences
  4      another run holds the lock; nothing was touched
  5      a mail service could not be started again (comes before any other)
  128+n  ended by signal n, services started again
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are failures like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as a Failure (exit code 2)."""
        raise Failure(f"{message}; see backup.py --help", 2)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line. Raises Failure (exit code 2) if they are wrong or do not go together."""
    parser = Parser(
        prog="backup.py", description="Back up a mail server's user data with duplicity, encrypted.", epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="make a full backup")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, touch nothing")
    parser.add_argument("--status", action="store_true", help="show what backups there are")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="with --status: for programs")
    form.add_argument("--html", action="store_true", help="with --status: as a web page")
    parser.add_argument("--verify", action="store_true", help="check every backup file")
    parser.add_argument("--compare", action="store_true", help="with --verify: also against the live files")
    parser.add_argument("--list", action="store_true", help="list the files in a backup")
    parser.add_argument("--restore", metavar="DIR", help="restore into DIR, which does not exist yet or is empty")
    parser.add_argument("--path", metavar="PATH", help="with --restore: only this, relative to STORAGE_ROOT")
    parser.add_argument("--time", metavar="TIME", help="with --list, --restore: as of TIME, such as 3D or 2026-11-20")
    parser.add_argument("--config", metavar="FILE", type=Path, help=f"settings (default: {SETTINGS_FILE})")
    parser.add_argument("--storage-root", metavar="DIR", help="back up DIR, without a settings file; its owner is STORAGE_USER")
    parser.add_argument("-v", "--verbose", action="store_true", help="show the steps and what duplicity says")
    parser.add_argument("--version", action="version", version=f"backup.py {VERSION}")
    options = parser.parse_args(arguments)
    commands = [name for name in ("status", "verify", "list", "restore") if getattr(options, name) not in (None, False)]
    if options.restore == "":
        parser.error("--restore is empty; name a directory")
    if len(commands) > 1 or commands and (options.full or options.dry_run):
        parser.error(f"--{commands[0]} goes with no other command")
    belongs = {"json": ["status"], "html": ["status"], "compare": ["verify"], "path": ["restore"], "time": ["list", "restore"]}
    for option, wanted in belongs.items():
        if getattr(options, option) not in (None, False) and not set(wanted) & set(commands):
            parser.error(f"--{option} goes with --{' or --'.join(wanted)}")
    return options


def read_settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of the file, or of --storage-root alone. Raises Failure (exit code 2) if they cannot be had."""
    if options.storage_root is None:
        return utils.load_environment(options.config or SETTINGS_FILE)
    settings = utils.load_environment(options.config) if options.config else {}
    if not options.storage_root:
        raise Failure("--storage-root is empty; give it the directory of the user data", 2)
    root = os.path.abspath(options.storage_root)
    try:
        owner = pwd.getpwuid(os.stat(root).st_uid).pw_name
    except OSError as error:
        raise Failure(f"cannot read {printable(root)}: {error.strerror}; name another directory with --storage-root", 2) from error
    except KeyError:  # as on a rescue system, which does not need it to read
        owner = ""
    return {**settings, "STORAGE_ROOT": root, "STORAGE_USER": owner}


def failure_of(error: Exception) -> Failure:
    """Return what the operating system refused as a sentence; a failure as it is."""
    if not isinstance(error, OSError):
        return error if isinstance(error, Failure) else Failure(str(error))
    path = utils.path_in(error)
    return Failure(f"{path}{': ' if path else ''}{error.strerror or error}; see to that and run this again")


def run(arguments: Sequence[str]) -> int:
    """Do what the command line asks for. Returns the exit code. Raises Failure, Interrupted or OSError."""
    options = parse_arguments(arguments)
    if options.verbose or sys.stderr.isatty():
        logging.getLogger().setLevel(logging.INFO)
    settings = read_settings(options)
    if options.status:
        return show_status(settings, options.json, options.html)
    if options.verify or options.list or options.restore is not None:
        return read(options, settings)
    night = night_of(settings, options.verbose)
    if options.dry_run:
        show_plan(night, options.full)
        return 0
    with utils.ended_in_good_order():
        return perform_backup(night, options.full)


def read(options: argparse.Namespace, settings: Mapping[str, str]) -> int:
    """Verify, list or restore. Returns the exit code: 3 for damage or differences. Raises Failure or OSError."""
    names, wrong = [], []
    with utils.ended_in_good_order(), reader_of(settings, options.verbose) as reader:
        if options.list:
            names = list_files(reader, time_options(reader, options.time))
        elif options.restore is not None:
            restore(reader, Path(options.restore).absolute(), options.path, options.time)
        else:
            wrong = verify(reader) + (compare(reader) if options.compare else [])
    utils.raise_if_interrupted()
    for sentence in wrong:
        log.error(sentence)
    for name in names:  # who reads them may be slow, and nothing is held meanwhile
        print(name)
    return 3 if wrong else 0


def main(arguments: Sequence[str]) -> int:
    """Run the command line, say what went wrong in one sentence, and return the exit code. arguments: without the program's name."""
    utils.open_closed_streams()
    utils.allow_any_depth()
    handler = logging.StreamHandler()
    handler.setFormatter(_Prefixed())
    logging.getLogger().addHandler(handler)
    logging.raiseExceptions = False  # a standard error that is gone does not end a backup
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to end
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what holds nothing ends at once, without Python's traceback
    try:
        code = run(arguments)
        if code != 5:  # which comes before any other
            utils.raise_if_interrupted()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # nobody reads on: nothing is left to say
        return 1
    except OSError as error:
        log.error(failure_of(error))
        return 1
    except (Failure, Interrupted) as error:
        log.error(error)
        return error.exit_code
    finally:
        utils.give_up_broken_streams()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
