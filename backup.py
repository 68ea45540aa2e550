#!/usr/bin/python3
"""Nightly backup of a mail server's user data: duplicity, encrypted, mail down for a restart.

The night: check all that can be checked, take the lock, mend what a run that died has
left, migrate the layout of old, decide between a full and an incremental backup, copy
the tree while mail runs, stop mail, bring the copy up to date, start mail again, have
duplicity read the copy, believe the new set only when it is proved, prune, and tell the
after-backup hook. `perform_backup` is that list; all else in here is one of its steps,
the status, or the command line.

STORAGE_USER can rename whatever is in STORAGE_ROOT, backup/ too, but nothing inside
backup/. So a run works inside it: every path there is relative, and no renaming leads
anywhere else.

To restore, a mail server's admin needs nothing but duplicity and the first line of
secret_key.txt.
"""

import signal

if __name__ == "__main__":  # until something is held ^C ends it at once, while it imports, too
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import ast
import base64
import errno
import fcntl
import filecmp
import functools
import hashlib
import html
import io
import json
import logging
import logging.handlers
import math
import os
import pwd
import queue
import re
import secrets
import select
import shlex
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

try:
    from dateutil.parser import isoparse
    from dateutil.relativedelta import relativedelta
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"backup: {error}; install python3-dateutil")

import utils
from utils import Downtime, Failure, Finished, Interrupted, printable

VERSION = "1.0"
SETTINGS_FILE = Path("/etc/mailinabox.conf")
RUN_DIRECTORY = Path("/run")

# What is in backup/, the working directory of a run. That of a command that reads has
# the same names.
KEY = Path("secret_key.txt")  # the passphrase is its first line
ENCRYPTED = Path("encrypted")  # duplicity's target
CACHE = Path("cache")  # for duplicity's archive directory
ARCHIVE = CACHE / "backup"
SNAPSHOT = Path("snapshot")  # the copy of the tree
TEMPORARY = Path("tmp")  # duplicity's temporary directory
LOCK = Path("lock")
LAST_RUN = Path("last-run.json")
LAST_VERIFY = Path("last-verify.json")
PLAIN = Path("duplicity")  # plain backups, in the legacy layout
LEGACY = Path("legacy")  # openssl copies that have no plain original
HOOKS = ("before-backup", "after-backup")
READER_PREFIX = "reader-"

# In STORAGE_ROOT: the copy, where backup/ is a file system of its own, and the plain
# backups of the legacy layout, until a backup contains them.
COPY_BESIDE = ".backup-snapshot"
MIGRATED = "migrated_unencrypted_backup"

PROGRAMS = ("duplicity", "gpg", "gpg-agent", "setpriv")
SETTINGS = ("BACKUP_EXCLUDE", "BACKUP_KEEP_DAYS", "BACKUP_SERVICES")
KEEP_DAYS = "3"
SERVICES = "dovecot postfix"
MOST_FILES = 5_000  # that a run notes for the next
MOST_NAMES = 20  # in a message
FULL_DAYS = 31
OVERDUE_HOURS = 36
LONG_DOWNTIME_SECONDS = 60
SHARES = 7  # of all backup files; a night checks one
KEY_CHARACTERS = 43
# A random key needs no stretching, and gpg's 65 million cost 0.3 s a file.
KEY_ITERATIONS = 1_048_576
VOLUME_MEGABYTES = 250
TEMPORARY_BYTES = 575_000_000  # duplicity 3.2.1 keeps up to 2.3 volumes in its temporary directory
RESERVE_BYTES = 1_000_000_000
SPARE_BYTES = 2_000_000_000
SIGNATURE_SECONDS = 60
CLOCK_SECONDS = 60
GPGCONF_SECONDS = 20
HANGING_SECONDS = 5
STALLED_SECONDS = 600
UNSAID_SECONDS = 5
DAY = 86400
AGE_SECONDS = {"s": 1, "m": 60, "h": 3600, "D": DAY, "d": DAY, "W": 7 * DAY, "w": 7 * DAY,
               "M": 30 * DAY, "Y": 365 * DAY, "y": 365 * DAY}

# Duplicity's file names, from its file_naming.py (0.8.22, 3.2.1): .jsonstat comes with
# 3.x, .part and .gz only in the archive directory.
STAMP = r"[12][0-9]{7}T[0-9]{6}Z"
FILE = re.compile(
    rf"duplicity-(?:full(?:-signatures)?|(?:inc|new-signatures)\.({STAMP})\.to)\.({STAMP})\."
    r"(?:manifest|vol\d+\.difftar|sigtar|jsonstat)((?:\.(?:gpg|gz|part))*)")

# Of duplicity's exit codes, from its log.py (0.8.22 and 3.2.1), those an admin can do
# something about.
DUPLICITY_EXIT_CODES = {
    2: "duplicity does not take these options; install version 0.8.21 or newer",
    5: "duplicity finds a damaged file in its archive directory; run the backup again",
    17: "duplicity finds no complete chain to add to; run the backup with --full",
    19: "the path is not in the backup; name one that is",
    21: "a backup file does not match its checksum; see which with --verify, take an "
        "older backup with --time, or your copy elsewhere",
    23: "duplicity was refused what it needs, or another duplicity uses the archive "
        "directory; end that one",
    30: "duplicity met an error of its own; see its last lines, and what --verify tells",
    31: "gpg failed; see its last lines, and what --verify tells; fetch what is damaged from "
        "your copy elsewhere, or move encrypted/ and cache/ aside and run --full",
    34: "duplicity's temporary directory has no room; make room on that disk",
    35: "duplicity's temporary directory has no room; make room on that disk",
    50: "duplicity could not write to or read from its target; check the disk and its room",
    53: "the disk is full; make room on it",
    utils.NOT_EXECUTABLE: "duplicity could not be executed; install it again",
}

log = logging.getLogger("backup")
Draw = Callable[[int, int | None], None]
Settings = Mapping[str, str]  # of the file, as load_environment returns them
Status = Mapping[str, Any]  # as backup_status returns it


# What a run knows


def utc_now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Work:
    """What every command knows: backup/ and the paths outside of it, absolute."""

    root: Path
    backup: Path
    copy_beside: Path
    migrated: Path
    gnupg: Path  # gpg's home, and so its agent's, for this process alone
    stopped: Path  # lists the services that are to come back
    environment: Mapping[str, str]  # for the programs that are run


@dataclass(frozen=True)
class Night(Work):
    """What a run knows from the start. settings: those of the file. now: when it began."""

    settings: Settings
    user: pwd.struct_passwd
    keep_days: int
    services: tuple[str, ...]
    excluded: tuple[str, ...]  # see excluded_of
    now: datetime


@dataclass
class Record:
    """How a run goes, as last-run.json tells it.

    attention: what an admin must look at although the backup was made. broken: what is
    known to be wrong with backup files, by name, which may be a pattern. unread: what of
    the tree could not be read. lacking: what of that backups lack because the disk is damaged,
    since a full one was asked for. failed: whether the last run did. asked: whether a full one is.
    """

    start: datetime = field(default_factory=utc_now)
    newest_set: str | None = None  # the stamp of the newest complete set, as far as is known
    broken: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)  # of what is broken runs have warned before
    # The backup files that the last good run has left, and their sizes in bytes, None if unknown.
    files: dict[str, int | None] = field(default_factory=dict)
    kind: str | None = None
    source: str | None = None
    mounted: set[str] = field(default_factory=set)  # in STORAGE_ROOT, by relative path
    earlier: set[str] = field(default_factory=set)  # mounted there when backups were made
    entries: int = 0  # of STORAGE_ROOT, counted while mail runs, where duplicity reads it itself
    size: int = 0  # of the new set, in bytes
    duplicity_version: str | None = None
    downtime: Downtime = field(default_factory=Downtime)
    unread: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    failed: bool = False
    asked: bool = False
    attention: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what is worth knowing, no more

    @property
    def news(self) -> bool:
        """Whether something is wrong with backup files that no run has told of before."""
        return not self.broken.items() <= self.told.items()

    def warn(self, message: str) -> None:
        """Say now, and remember, what an admin must look at."""
        if message not in self.attention:
            log.warning(message)
            self.attention.append(message)

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step that needs attention, no more, if it fails: it does not end the run."""
        try:
            step(*arguments)
        except Exception as error:
            self.warn(str(failure_of(error)))


SetKey = tuple[str, str]
DirectoryState = tuple[int, int, int]


@dataclass(frozen=True)
class BackupSet:
    """One full or incremental backup.

    stamp: when it was begun. previous: the stamp of the set it builds on, None for a
    full. files: names in encrypted/. size: of all of them, in bytes.
    """

    stamp: str
    previous: str | None
    complete: bool
    files: frozenset[str]
    size: int

    @property
    def full(self) -> bool:
        """Whether the set is a full backup."""
        return self.previous is None

    @property
    def stamps(self) -> str:
        """What of its files' names tells it from other sets."""
        return self.stamp if self.full else f"{self.previous}.to.{self.stamp}"

    @property
    def manifest(self) -> str:
        """The name of its manifest."""
        return f"duplicity-{'full' if self.full else 'inc'}.{self.stamps}.manifest.gpg"

    @property
    def signatures(self) -> str:
        """The name that its signature file has."""
        return f"duplicity-{'full' if self.full else 'new'}-signatures.{self.stamps}.sigtar.gpg"

    @property
    def signed(self) -> bool:
        """Whether the set has its signatures, without which no increment can be made on it.

        Of another date they are of no use to duplicity (seen: 0.8.22, 3.2.1).
        """
        return self.signatures in self.files

    @property
    def volumes(self) -> frozenset[str]:
        """The names of the files that hold what was backed up."""
        return frozenset(name for name in self.files if ".difftar." in name)

    @property
    def metadata(self) -> list[str]:
        """The names of a complete set's files but the volumes, the manifest first."""
        return [self.manifest, *sorted(self.files - self.volumes - {self.manifest})]

    @property
    def date(self) -> datetime:
        """When the set was begun."""
        return stamp_date(self.stamp)


Sets = Sequence[BackupSet]  # oldest first


def work_of(settings: Settings) -> Work:
    """Compute what every command knows from STORAGE_ROOT.

    Raises Failure (exit code 2) if that is missing from the settings, not absolute or no
    directory.
    """
    name = settings.get("STORAGE_ROOT", "")
    if not name.startswith("/"):
        raise Failure(f"STORAGE_ROOT is {printable(name) or 'missing'}; give it the "
                      "absolute path of the user data in the settings", 2)
    root = Path(os.path.realpath(name))  # duplicity would back up nothing but the link
    if root == Path("/"):
        raise Failure("STORAGE_ROOT is /, the whole system; give it the user data's directory", 2)
    if not root.is_dir():
        raise Failure(f"STORAGE_ROOT {root} is not a directory; correct STORAGE_ROOT in the "
                      "settings", 2)
    backup = root / "backup"
    # Short names that are this root's alone: gpg-agent's socket fails under a long path
    # (seen: over about 70 characters).
    token = hashlib.sha256(os.fsencode(backup)).hexdigest()[:12]
    gnupg = RUN_DIRECTORY / f"backup-gnupg-{token}-{secrets.token_hex(4)}"
    return Work(root, backup, root / COPY_BESIDE, root / MIGRATED, gnupg,
                RUN_DIRECTORY / f"backup-stopped-{token}",
                {**program_environment(), "GNUPGHOME": str(gnupg)})


def keep_days_of(settings: Settings) -> int:
    """Return BACKUP_KEEP_DAYS.

    Raises Failure (exit code 2) unless it is a number from 1 to 9999.
    """
    days = settings.get("BACKUP_KEEP_DAYS", KEEP_DAYS)
    if not re.fullmatch(r"0*[1-9][0-9]{0,3}", days):
        raise Failure(f"BACKUP_KEEP_DAYS is {printable(days) or 'empty'}; give it a "
                      "number of days from 1 to 9999", 2)
    return int(days)


def excluded_of(settings: Settings) -> tuple[str, ...]:
    """Return the paths of BACKUP_EXCLUDE, relative to STORAGE_ROOT.

    Raises Failure (exit code 2) if it cannot be split as a shell splits words, or names
    anything but paths below STORAGE_ROOT. The old backups it cannot name, for they are
    deleted when a backup contains them.
    """
    try:
        paths = shlex.split(settings.get("BACKUP_EXCLUDE", ""))
    except ValueError as error:
        raise Failure(f"BACKUP_EXCLUDE cannot be read: {error}; quote the paths in it as for a "
                      "shell", 2) from error
    for path in paths:
        parts = path.split("/")
        if (parts[0] in ("", MIGRATED) or path.startswith("#")  # as if a comment could follow
                or not {".", ".."}.isdisjoint(parts)):
            raise Failure(f"BACKUP_EXCLUDE names {printable(path) or 'an empty path'}; give it "
                          f"paths relative to STORAGE_ROOT, without ., .. or #, not {MIGRATED}", 2)
    return tuple(map(os.path.normpath, paths))


def night_of(settings: Settings) -> Night:
    """Check the settings and put together what a run knows.

    settings: as load_environment returns them. Raises Failure (exit code 2) if a setting
    is missing or wrong.
    """
    work = work_of(settings)
    if not settings.get("STORAGE_USER"):
        raise Failure(f"STORAGE_USER is missing, or nobody here owns {work.root}; name "
                      "the user who owns the user data in the settings", 2)
    try:
        user = pwd.getpwnam(settings["STORAGE_USER"])
    except (KeyError, ValueError) as error:
        raise Failure(f"there is no user {printable(settings['STORAGE_USER'])}; correct "
                      "STORAGE_USER in the settings", 2) from error
    for key in settings:
        if key.startswith("BACKUP_") and key not in SETTINGS:
            raise Failure(f"{key} is no setting, but these are: {', '.join(SETTINGS)}; correct it "
                          "in the settings", 2)
    services = tuple(settings.get("BACKUP_SERVICES", SERVICES).split())
    for name in services:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9@._-]*[A-Za-z0-9_-])?", name):
            raise Failure(f"{printable(name)} is not the name of a service; correct "
                          "BACKUP_SERVICES in the settings", 2)
    return Night(**vars(work), settings=settings, user=user,
                 keep_days=keep_days_of(settings), services=services,
                 excluded=excluded_of(settings), now=utc_now())


def program_environment() -> dict[str, str]:
    """Return the environment for programs.

    It is the caller's, with the system directories on PATH and messages that are not
    translated.
    """
    path = f"{os.environ.get('PATH') or os.defpath}:{utils.SYSTEM_DIRECTORIES}"
    return {**os.environ, "PATH": path, "LC_ALL": "C.UTF-8", "LANGUAGE": "C"}


# The night


def perform_backup(settings: Settings, force_full: bool = False) -> int:
    """Make the nightly backup: the steps of the night, one line each.

    settings: see night_of. force_full: make a full backup even if an incremental would do.
    Returns the exit code: 0, 3 if something needs attention, 5 if a service could not be
    started again. Raises Failure if no backup was made, Interrupted if a signal ended
    the run. The working directory is backup/ afterwards.
    """
    night = begin_night(settings)                                               # 1
    with utils.exclusive_process(LOCK) as lock, last_run_recorded() as record:
        start_services_left_stopped(night, record)                              # of 3
        record.duplicity_version = check_surroundings(night)
        with gpg_home(night):
            check_newest_set(night, record)                                     # 2
            check_nothing_lost(night, record, force_full)
            recover_from_dead_run(night, record)                                # 3
            make_directories(night)
            migrated = migrate_legacy_layout(night)                             # 4
            sets = complete_sets()
            kind = decide(night, record, sets, force_full)                      # 5
            make_room(night, record, sets, kind)
        record.remarks += remove_damaged_notes(night)
        run_hook(night, "before-backup", record)                                # 6
        with gpg_home(night), utils.own_directory(TEMPORARY):
            with failed_set_thrown_away(night, record), copy_of_tree(night, record) as copy:  # 7
                with mail_stopped(night, record, lock):                         # 8
                    if copy:
                        utils.update_mirror(copy)                               # 9
                    else:
                        make_set(night, record, kind)
                if copy:                                                        # 10: mail is back
                    with utils.low_priority():
                        make_set(night, record, kind, copy)                     # 11
                utils.sync(Path(), ENCRYPTED)  # before what is old goes
            write_last_run(record)  # should this run be killed
            record.attempt(delete_migrated_backups, night, record, migrated)
            record.attempt(check_a_share, night, record)                        # of 14
            if not must_keep_all(night, record, sets):
                record.attempt(delete_old_chains, night, record)                # 12
            if not must_keep_all(night, record, sets):
                record.attempt(clean_up, night, record)                         # 13
            record.attempt(grant_group_read, night)                             # 14
        look_for_losses(night, record)
        record.files = files_to_expect(record)
        write_last_run(record)                                                  # 15
        if not record.news:
            run_hook(night, "after-backup", record)
    log.info(f"made the {record.kind} backup, {human_size(record.size)}; mail was down for "
             f"{record.downtime.seconds:.1f} seconds")
    return exit_code_of(record)


# Steps 1 and 2: what can be checked before anything is touched


def begin_night(settings: Settings) -> Night:
    """Check what needs no lock, and work in backup/.

    A refusal is written to last-run.json. One of the settings leaves no service stopped that
    another run did.
    settings: see night_of. Raises Failure.
    """
    # A disk that hangs would hold every night here, before there is a lock that tells of it.
    backup = os.path.join(settings.get("STORAGE_ROOT", ""), "backup")
    answer = utils.shell(["ls", "--all", "--", backup], program_environment(),
                         timeout_seconds=STALLED_SECONDS)
    if answer.exit_code == utils.TIMED_OUT:
        raise Failure(f"{printable(backup)} has not answered for {STALLED_SECONDS} seconds; see to "
                      "its disk")
    try:
        night = night_of(settings)
        check_mounts(night)
    except Exception as error:
        refusal = failure_of(error)
        with suppress(Failure, OSError):  # backup/ may be missing, not sound, or in use by a run
            work = work_of(settings)
            utils.work_inside(work.backup)
            if LOCK.exists():  # else no run was ever here
                with utils.exclusive_process(LOCK), last_run_recorded() as record:
                    if refusal.exit_code == 2:  # else what mail needs may not be mounted
                        start_services_left_stopped(work, record)
                    raise refusal
        raise refusal from error
    work_in_backup_directory(night)
    return night


def check_mounts(night: Night) -> None:
    """Check that what /etc/fstab mounts in STORAGE_ROOT is mounted. Raises Failure.

    Else all mail there would count as deleted; and with the key and last-run.json on a disk
    that is missing it would look like a first night.
    """
    mounted = utils.mounts()
    for place, options in utils.mounts("/etc/fstab").items():
        if place in mounted:
            continue  # it is not looked at: a server that is gone would not answer
        place = Path(os.path.realpath(place.parent), place.name)
        needed = is_in_tree(night, place) and (
            "noauto" not in options.split(",") or "x-systemd.automount" in options)
        if (needed or place.is_relative_to(night.backup)) and place not in mounted:
            raise Failure(f"{place} is not mounted although /etc/fstab names it; mount it, or "
                          "remove it there")


def mounts_in_tree(night: Night) -> set[str]:
    """Return which disks are mounted in the tree, by relative path, all of which answer.

    Raises Failure or OSError. Else all mail there would count as deleted: duplicity passes over a
    directory whose server is gone without a word (ENOTCONN, ENODEV; seen: 0.8.22).
    """
    check_mounts(night)
    os.listdir(night.root)
    places = {place for place in utils.mounts()
              if is_in_tree(night, place) and not place.is_relative_to(night.backup)}
    for place in places:
        try:
            os.listdir(place)
        except FileNotFoundError:
            if os.path.lexists(place):  # not below another mount: the disk of autofs is gone
                raise
        except (NotADirectoryError, PermissionError):
            pass  # it is a file, or a user's own
    return {os.path.relpath(place, night.root) for place in filter(os.path.ismount, places)}


def unmounted(night: Night, names: Set[str]) -> str:
    """Return which of the disks that were mounted in the tree, by relative path, are not."""
    places = {night.root / name for name in names} - utils.mounts().keys()
    return first_of(sorted(str(place) for place in places if is_in_tree(night, place)))


def is_in_tree(night: Night, place: Path) -> bool:
    """Tell whether a place is STORAGE_ROOT or in it, and not in what BACKUP_EXCLUDE names."""
    return place.is_relative_to(night.root) and not any(
        place.is_relative_to(night.root / name) for name in night.excluded)


def check_not_in_itself(night: Night) -> None:
    """Check that STORAGE_ROOT, or what holds it, is not mounted inside it: that has no end.

    A server that is gone is waited for here, as by a copy. Raises Failure (exit code 2).
    """
    for place in utils.mounts():
        with suppress(OSError):  # as of a user's file system in user space
            if place != night.root and is_in_tree(night, place) and any(
                    map(place.samefile, [night.root, *night.root.parents])):
                raise Failure(f"{night.root} would be in its own backup, for {place} shows it once "
                              "more; unmount that, or name it in BACKUP_EXCLUDE", 2)


def work_in_backup_directory(night: Night) -> None:
    """Make backup/ if it is missing, work in it, and let STORAGE_USER's group through.

    Raises Failure (exit code 2) if it belongs to somebody else or others can write to
    it.
    """
    if not os.path.lexists(night.backup):
        utils.make_owned_directory(night.backup, 0o750, night.user.pw_gid)
    utils.work_inside(night.backup)
    names = set(os.listdir()) - {"lost+found"}  # of a new disk
    if names and names.isdisjoint(map(str, (KEY, ENCRYPTED, PLAIN, LOCK, LAST_VERIFY, *HOOKS))):
        raise Failure(f"{night.backup} is no directory of backups, for it holds "
                      f"{printable(min(names))}; move it to where it belongs", 2)
    os.chown(".", -1, night.user.pw_gid)
    os.chmod(".", stat.S_IMODE(os.stat(".").st_mode) | stat.S_IXGRP)


def check_surroundings(night: Night) -> str:
    """Check the programs, the directories and the key, without a change to any of them.

    Returns duplicity's version. Raises Failure (exit code 2).
    """
    check_not_in_itself(night)
    for program in PROGRAMS:
        utils.find_program(program, night.environment)
    for directory in (ENCRYPTED, CACHE, ARCHIVE, SNAPSHOT, TEMPORARY, PLAIN, LEGACY,
                      night.copy_beside, night.migrated):
        with suppress(FileNotFoundError):
            utils.check_owned_directory(directory)
    if os.path.lexists(KEY):
        check_key()
    elif list(ENCRYPTED.glob("duplicity-*")) or os.path.lexists(PLAIN):
        raise Failure(f"{KEY.absolute()} is missing although there are backups, which only that "
                      f"key opens; put it back from your copy, or move {ENCRYPTED}, {CACHE} and "
                      f"{PLAIN} in {night.backup} aside and run --full", 2)
    return duplicity_version(night)


def read_passphrase() -> str:
    """Return the passphrase, the first line of the key, stripped.

    Raises Failure (exit code 2) if it cannot be read or is no line of text.
    """
    try:
        line = utils.content_of(KEY).partition(b"\n")[0].strip().decode(errors="surrogateescape")
    except OSError as error:
        raise Failure(f"cannot read the key {KEY.absolute()}: {error.strerror}; put your "
                      "copy of the key back", 2) from error
    if not line or not line.isprintable():  # bytes that are not UTF-8 are not
        raise Failure(f"the first line of {KEY.absolute()} is no passphrase; put your "
                      "copy of the key back", 2)
    return line


def check_key() -> None:
    """Check that the key is root's alone and long enough. Raises Failure (exit code 2)."""
    characters = len(read_passphrase())
    status = KEY.stat()
    path = shlex.quote(str(KEY.absolute()))
    if status.st_mode & 0o077:
        raise Failure(f"the key is open to others than its owner; run: chmod 600 {path}", 2)
    if status.st_uid != os.geteuid():
        raise Failure(f"the key is not owned by root; run: chown root {path}", 2)
    if characters < KEY_CHARACTERS:
        raise Failure(f"the first line of the key {path} has less than {KEY_CHARACTERS} "
                      "characters; put your copy of the key back", 2)


def duplicity_version(work: Work) -> str:
    """Return duplicity's version, such as 0.8.22.

    Raises Failure (exit code 2) if it does not run.
    """
    # It wants a temporary directory, and may find none where / is full or read-only.
    environment = {**work.environment, "TMPDIR": str(RUN_DIRECTORY)}
    answer = utils.shell(["duplicity", "--version"], environment)
    match = re.search(r"^ *duplicity (\S+)", str(answer), re.MULTILINE)
    if answer.exit_code or not match:
        raise Failure("duplicity does not run; install it again: "
                      f"duplicity --version ended with {answer}", 2)
    return match[1]


def check_newest_set(night: Night, record: Record) -> None:
    """Check that the key opens the newest set's manifest, and that the set is not of the future.

    duplicity 0.8.22 would add a set under another key, or an orphan before a set of the
    future, and exit 0; a copy such as NAME~ beside a file ends every run of it. A manifest
    that is damaged is noted. Raises Failure.
    """
    regular = utils.regular_files(ENCRYPTED)
    for path in ENCRYPTED.glob("duplicity-*"):
        mistaken = FILE.match(path.name) and not key_of(path.name) and path.suffix != ".enc"
        if mistaken or path.name not in regular:
            raise Failure(f"duplicity would take {path.absolute()} for a backup file; see what it "
                          "is, and move it elsewhere")
    sets = complete_sets()
    if not sets:
        return
    # An increment that is not dated after the newest set would be an orphan.
    utils.pause(max(0.0, check_clock(night, sets) + 1))
    if run_gpg(night, sets[-1].manifest).exit_code:
        if is_of_another_key(night, sets[-1]):
            raise Failure(f"{wrong_key_of(night)}, or {way_out_of(night)}")
        record.broken[sets[-1].manifest] = "is damaged"


def check_clock(night: Night, sets: Sets) -> float:
    """Return how many seconds the newest set is dated in the future.

    sets: the complete ones, oldest first. Raises Failure if that is more than a minute.
    """
    ahead = (sets[-1].date - night.now).total_seconds()
    if ahead > CLOCK_SECONDS:
        raise Failure(f"the newest backup is dated {sets[-1].date.isoformat()}, in the "
                      "future: the clock is wrong, or was; mend the clock, or "
                      f"{way_out_of(night)}")
    return ahead


def check_nothing_lost(work: Work, record: Record, force_full: bool) -> None:
    """Check that the newest set is not older than that of the last run. Raises Failure.

    Else a disk that was not mounted would pass for a first night. force_full: a new beginning
    is made. What is lost is told then all the same, unless all was moved aside, cache/, too.
    """
    sets = complete_sets()
    if lost := newest_lost(sets, record.newest_set):
        if not force_full:
            raise Failure(f"{lost} from {work.backup / ENCRYPTED}; mount its disk, put it back "
                          "from your copy elsewhere, or run --full to begin anew without it, "
                          "which deletes what is left of it")
        if not CACHE.exists() and not backup_files():
            record.files = {}


def newest_lost(sets: Sets, newest_set: str | None) -> str:
    """Return that the newest set of the last run is missing, empty if it is not.

    sets: the complete ones, oldest first. newest_set: the stamp of that one, if there was one.
    """
    newest = sets[-1].stamp if sets else ""
    return f"the newest backup, of {newest_set}, is missing" if (newest_set or "") > newest else ""


def wrong_key_of(work: Work) -> str:
    """Return the sentence on a key that does not open the backups."""
    return (f"the backups in {work.backup / ENCRYPTED} were made with another key than "
            f"that in {work.backup / KEY}; put the old key back")


def way_out_of(work: Work) -> str:
    """Return what can always be done when no set can be added to those there are."""
    return f"move {work.backup / ENCRYPTED} and {work.backup / CACHE} aside and run --full"


def run_gpg(
    work: Work, name: str, take_text: utils.TakeLine | None = None,
    output: Path = Path(os.devnull),
) -> Finished:
    """Have gpg open a file of encrypted/ and check its integrity.

    take_text: gets its text by lines. output: else gets it. Returns how gpg ended. Of some files
    of a few bytes its exit code is 0, and of one that is not encrypted (seen: 2.2.40): only its
    status lines tell, which are kept apart from the text. Raises Failure if it was killed or
    could not be executed.
    """
    command = ["gpg", "--batch", "--no-tty", "--quiet", "--no-keyring", "--status-fd=LOG", "--yes",
               "--pinentry-mode", "loopback", "--passphrase-fd", "0",
               "--output", "-" if take_text else str(output), "--decrypt",
               str(ENCRYPTED / name)]
    passphrase = read_passphrase()
    status: list[str] = []
    answer = utils.shell(command, work.environment, directory=".", secret=passphrase,
                         standard_input=passphrase, on_line=take_text or (lambda line: None),
                         on_log=status.append)
    if answer.exit_code < 0 or answer.exit_code == utils.NOT_EXECUTABLE:
        raise Failure(f"gpg could not check {work.backup / ENCRYPTED / name}; run this again: it "
                      f"ended with {answer}")
    opened = "[GNUPG:] DECRYPTION_OKAY" in status
    return Finished(answer.exit_code or int(not opened),
                    (*answer.last_lines, *status)[-utils.TAIL_LINES:])


def is_wrong_key(answer: Finished) -> bool:
    """Tell, of how gpg ended, whether the passphrase is another than that of the file.

    Seen: gpg 2.2.40, 600 wrong ones of 600.
    """
    return answer.exit_code != 0 and "BAD_PASSPHRASE" in str(answer)


def is_of_another_key(work: Work, found: BackupSet) -> bool:
    """Tell whether the key opens nothing of a complete set, for some of it may be damaged.

    Of the volumes one is tried.
    """
    answers = [run_gpg(work, name) for name in [*found.metadata, *sorted(found.volumes)[-1:]]]
    return any(map(is_wrong_key, answers)) and all(answer.exit_code for answer in answers)


@contextmanager
def gpg_home(work: Work) -> Iterator[None]:
    """Keep gpg's home while the block runs, and leave neither it nor its agent behind."""
    with utils.own_directory(work.gnupg):
        (work.gnupg / "gpg-agent.conf").write_text(f"s2k-count {KEY_ITERATIONS}\n")
        try:
            yield
        finally:  # should that fail: an agent whose home is gone ends by itself
            utils.shell(["gpgconf", "--kill", "gpg-agent"], work.environment,
                        interruptible=False, timeout_seconds=GPGCONF_SECONDS)


# Step 3: what a run that died has left


def start_services_left_stopped(work: Work, record: Record) -> None:
    """Start the services that are still listed in /run.

    An earlier run's keeper died, or they did not start.
    """
    if lines := utils.services_to_start(work.stopped):
        log.warning(f"starting {' and '.join(lines)}, which an earlier run left stopped; delete "
                    f"{work.stopped} if it is to stay so")
        record.downtime.not_started = utils.start_services(
            utils.service_manager(work.environment), lines, work.stopped)


def recover_from_dead_run(work: Work, record: Record) -> None:
    """Delete what a run that died had not finished, and what readers that died have left.

    A set that was killed is never resumed: duplicity would believe parts of it that the
    tree does not bear out any more.
    """
    sets = complete_sets()
    # What is newer than the last good run is not proved: a power cut may have left but names.
    rejected = [found.stamp for found in sets[-1:]
                if any(older.stamp == record.newest_set for older in sets[:-1])
                and any(why for _, why in check_set(work, found))]
    for stamp in rejected:
        log.warning(f"deleting the backup of {stamp}, for its run was ended, and it is damaged")
    for path in dead_files(rejected):
        log.debug(f"deleting {path}")
        utils.remove(path)
        record.broken.pop(path.name, None)
    utils.remove(TEMPORARY)
    for place in (SNAPSHOT, work.copy_beside):
        remove_copy(place)
    utils.remove_abandoned(Path(), f"{READER_PREFIX}????????")
    utils.remove_abandoned(RUN_DIRECTORY, f"{work.gnupg.name.rpartition('-')[0]}*")


def dead_files(rejected: Collection[str] = ()) -> list[Path]:
    """Return what in encrypted/ and cache/ belongs to no set that counts, manifests first.

    Those in cache/ are the very first, for by them a set would count as lost.
    That is what is dated after the newest complete set, and what duplicity only has for
    the time of a run. In cache/ it is also what is not duplicity's archive directory of
    today. rejected: stamps of sets that do not count although they may have a manifest.
    """
    sets = [found for found in complete_sets() if found.stamp not in rejected]
    newest = sets[-1].stamp if sets else ""
    alive = {Path(name).stem for found in sets for name in found.files}
    files = [ENCRYPTED / name for name in utils.regular_files(ENCRYPTED) if name.endswith(".gpg")]
    dead = [path for path in [*files, *ARCHIVE.glob("*")]
            if path.name.endswith((".part", "-tempdir")) or path.stem not in alive
            and (stamp_of(path) > newest or stamp_of(path) in rejected)]
    dead += [path for path in CACHE.glob("*") if path != ARCHIVE]
    return sorted(dead, key=lambda path: (".manifest" not in path.name, path.parent == ENCRYPTED))


def stamp_of(path: Path) -> str:
    """Return the stamp of the set that a file of duplicity's belongs to, empty if it bears none."""
    match = FILE.fullmatch(path.name)
    return match[2] if match else ""


@contextmanager
def failed_set_thrown_away(night: Night, record: Record) -> Iterator[None]:
    """Delete the set that the block was making when it failed, that a full disk gets free.

    It may be whole, and dated before others, where the clock was set back meanwhile. Its
    stamp is new in encrypted/ and in the archive directory, too: an admin may copy sets
    into the one, and duplicity fetches into the other what that lacks of the old ones.
    """
    before = {stamp_of(path) for place in (ENCRYPTED, ARCHIVE) for path in place.glob("*")}
    try:
        yield
    except BaseException as failure:
        try:
            if record.kind:  # duplicity had begun
                ours = {stamp_of(path) for path in ARCHIVE.glob("*")} - before - {""}
                # If it is more than one, others have come from elsewhere: none is to be lost.
                for path in dead_files(ours if len(ours) == 1 else ()):
                    utils.remove(path)
                if isinstance(failure, Exception):  # and no signal
                    throw_away_archive_directory(night)
        except (OSError, Failure) as error:
            log.error("the unfinished backup could not be deleted, the next run will: "
                      f"{failure_of(error)}")
        raise


def throw_away_archive_directory(work: Work) -> None:
    """Delete what duplicity makes anew: damaged, it would have every night fail (seen: 0.8.22).

    It is kept where what it would be made from is damaged, which is told and remembered.
    """
    damaged = [name for found in newest_chain(complete_sets())
               for name in found.metadata if run_gpg(work, name).exit_code]
    if damaged:
        paths = first_of([str(work.backup / ENCRYPTED / name) for name in damaged])
        log.error(f"damaged: {paths}; fetch from your copy elsewhere and run --verify")
        record_checks([], dict.fromkeys(damaged, "is damaged"))
    else:
        utils.remove(ARCHIVE)


def make_directories(night: Night) -> None:
    """Make the directories of a run, each with its mode and group, and the key if there is none."""
    utils.make_owned_directory(ENCRYPTED, 0o750, night.user.pw_gid)
    utils.make_owned_directory(CACHE, 0o700, 0)
    if not KEY.exists():
        utils.write_atomically(KEY, base64.b64encode(secrets.token_bytes(48)).decode() + "\n")
        log.warning(f"made a new key, {KEY.absolute()}: keep a copy of it elsewhere, for without "
                    "it no backup can be opened")


# Step 4: the layout of old


def migrate_legacy_layout(work: Work) -> DirectoryState | None:
    """Move plain backups to where the next backup contains them, and remove their openssl copies.

    Each change leaves a state from which the next run goes on. Returns the state of the
    directory they are in then, if there is one. Raises Failure if there is no room to
    move them to another file system.
    """
    if any(PLAIN.glob("*")):
        utils.make_owned_directory(PLAIN, 0o700, 0)  # it is plain mail
        move_plain_backups(work)
        for place in (work.root, work.migrated):
            utils.sync_directory(place)
    for path in PLAIN.glob("*"):  # of which there is a copy now
        utils.remove(path)
    with suppress(OSError):  # one that is a mount point stays, empty
        PLAIN.rmdir()
    copies: dict[str, int] = {}
    state = None
    with suppress(FileNotFoundError), utils.owned_directory(work.migrated) as directory:
        os.fchmod(directory, 0o700)
        state = directory_state(os.fstat(directory))
        for entry in utils.walk_entries(utils.path_of(directory)):
            name = f"{entry.name}.enc"
            if entry.is_file(follow_symlinks=False) and os.path.lexists(ENCRYPTED / name):
                with suppress(OSError):  # an original that cannot be read is none
                    utils.sha1_of(Path(entry.path))
                    copies[name] = openssl_size(entry.stat(follow_symlinks=False).st_size)
    orphans = []
    for name, size in utils.regular_files(ENCRYPTED).items():
        if copies.get(name) == size:
            (ENCRYPTED / name).unlink()
        elif name.endswith(".enc"):
            orphans.append(name)
    if orphans:
        utils.make_owned_directory(LEGACY, 0o700, 0)
        log.warning("old copies without a plain original of their size that can be read are moved "
                    f"to {LEGACY.absolute()}, {len(orphans)} in number; see there whether you need "
                    "them")
        for name in orphans:
            shutil.move(ENCRYPTED / name, unused(LEGACY / name), copy_to_disk)
    return state


def move_plain_backups(work: Work) -> None:
    """Move the plain backups, by a rename, or by a copy where they are on another file system.

    A copy gets its name when it is whole and on the disk. Raises Failure if it has no room.
    """
    target = work.migrated
    part = target.with_name(f"{MIGRATED}.part")
    remove_copy(part)  # of a run that was killed
    if os.path.lexists(target):
        with utils.owned_directory(target) as directory:
            there = utils.path_of(directory)
            names = os.listdir(there)
            equal = filecmp.cmpfiles(PLAIN, there, utils.regular_files(there), shallow=False)[0]
        if len(equal) == len(os.listdir(PLAIN)):  # a run was killed before it had deleted all
            return
        if names:
            target = unused(target / "again")  # no name of a backup's: the directory may hold none
    with suppress(OSError):  # as where it is a mount point
        os.rename(PLAIN, target)
        return
    if utils.content_size(PLAIN) + reserve_bytes(work.root) > shutil.disk_usage(work.root).free:
        raise Failure(f"{work.root} has no room for the old backups in {PLAIN.absolute()}; make "
                      "room there")
    utils.make_owned_directory(part, 0o700, 0)
    try:
        with utils.owned_directory(part) as directory:
            shutil.copytree(PLAIN, utils.path_of(directory) / "tree", symlinks=True,
                            copy_function=copy_to_disk)
            os.rename("tree", target, src_dir_fd=directory)
    finally:
        remove_copy(part)


def copy_to_disk(source: str, target: str) -> None:
    """Copy a file. Raises OSError where the disk cannot write it, which os.sync does not tell."""
    utils.raise_if_interrupted()
    shutil.copy2(source, target)
    with utils.opened(target, os.O_RDONLY) as copy:
        os.fsync(copy)


def unused(path: Path) -> Path:
    """Return path, or the first of path.2, path.3 and so on at which nothing stands."""
    place, number = path, 1
    while os.path.lexists(place):
        number += 1
        place = path.with_name(f"{path.name}.{number}")
    return place


def directory_state(status: os.stat_result) -> DirectoryState:
    """Return what tells a directory from any other, and from itself after it was renamed."""
    return status.st_dev, status.st_ino, status.st_ctime_ns


def openssl_size(size: int) -> int:
    """Return the bytes that an openssl copy of a file of so many bytes has.

    `openssl enc -aes-256-cbc -a -salt` writes 16 bytes of salt and whole blocks of 16,
    in base64 with 64 characters a line.
    """
    characters = -(-(16 + 16 * (size // 16 + 1)) // 3) * 4
    return characters + -(-characters // 64)


# Step 5: full or incremental


def sets_of(sizes: Mapping[str, int]) -> list[BackupSet]:
    """Tell from the names and sizes of files what sets there are, oldest first, complete or not.

    A volume that is empty counts as missing, and so does a set that holds nothing: a power cut
    leaves such. A signature file that is dated up to 60 seconds off a complete set without one
    belongs to that set: some versions date them so.
    """
    members: dict[SetKey, set[str]] = {}
    for name, size in sizes.items():
        if (size or ".difftar." not in name) and (key := key_of(name)):
            members.setdefault(key, set()).add(name)
    loose = [key for key in sorted(members) if all(".sigtar." in name for name in members[key])]
    sets = []
    for stamp, previous in sorted(members.keys() - loose):
        names = members[stamp, previous]
        complete = any(".manifest." in name for name in names)
        if complete and not any(".sigtar." in name for name in names):
            near = [key for key in loose if bool(key[1]) == bool(previous)
                    and abs(stamp_date(key[0]) - stamp_date(stamp)).total_seconds()
                    <= SIGNATURE_SECONDS]
            for key in near[:1]:
                loose.remove(key)
                names = names | members[key]
        if size := sum(sizes[name] for name in names):
            sets.append(BackupSet(stamp, previous or None, complete, frozenset(names), size))
    return sets


def key_of(name: str) -> SetKey | None:
    """Return what tells a set from others, of the name of a file in encrypted/.

    These are its own stamp and that of the set it builds on, empty if it is a full one. None of
    a stray file.
    """
    match = FILE.fullmatch(name)
    if match and match[3] == ".gpg":
        with suppress(ValueError):  # a stray name may hold a month 13
            stamp_date(match[1] or match[2])
            stamp_date(match[2])
            return match[2], match[1] or ""
    return None


def read_sets(encrypted: Path = ENCRYPTED) -> list[BackupSet]:
    """Return the sets that there are, see sets_of."""
    return sets_of(utils.regular_files(encrypted))


def complete_sets(encrypted: Path = ENCRYPTED) -> list[BackupSet]:
    """Return the sets whose manifest, which duplicity writes last, is there, oldest first."""
    return [found for found in read_sets(encrypted) if found.complete]


def stamp_date(stamp: str) -> datetime:
    """Return the time that a stamp in a file name such as 20261122T030000Z stands for."""
    return datetime.strptime(stamp, "%Y%m%dT%H%M%S%z")


def chains_of(sets: Sets) -> list[list[BackupSet]]:
    """Group complete sets, oldest first, into chains: a full and the increments that lead to it.

    Orphans are in none.
    """
    chains: list[list[BackupSet]] = []
    for found in sets:
        if found.full:
            chains.append([found])
        else:
            for chain in chains:
                if chain[-1].stamp == found.previous:
                    chain.append(found)
                    break
    return chains


def loose_sets(sets: Sets) -> list[BackupSet]:
    """Return the sets that nothing can be restored from. sets: complete or not, oldest first."""
    complete = [found for found in sets if found.complete]
    chained = {found for chain in chains_of(complete) for found in chain}
    return [found for found in sets if found not in chained]


def kept_since(keep_days: int, sets: Sets = ()) -> datetime:
    """Return the time before which backups are old enough to be deleted. See keep_days_of.

    sets: complete ones, oldest first, of which nothing since the newest full one is.
    """
    fulls = [found.date for found in sets if found.full] or [found.date for found in sets]
    return min([utc_now() - timedelta(days=keep_days), *fulls[-1:]])


def newest_chain(sets: Sets) -> list[BackupSet]:
    """Return the chain that ends with the newest set, empty if none does. sets: see chains_of."""
    return next((chain for chain in chains_of(sets) if chain[-1] == sets[-1]), [])


def broken_in(chain: Sets, broken: Collection[str]) -> list[str]:
    """Return which files of those that are damaged or missing, by their names, are a chain's."""
    stamps = {found.stamp for found in chain}
    return sorted(name for name in broken if stamp_of(Path(name)) in stamps)


def backup_files() -> dict[str, int | None]:
    """Return the files in encrypted/ that belong to a set, by name their sizes; no empty ones."""
    sizes = utils.regular_files(ENCRYPTED)
    return {name: size for name, size in sizes.items() if size and key_of(name)}


def files_to_expect(record: Record) -> dict[str, int | None]:
    """Return the backup files that the next run is to find, see Record.

    What is lost is looked for while something of its set is there, lest it part a chain.
    """
    there = backup_files()
    expected = there.keys() | broken_in(read_sets(), record.broken)
    # The size from before: of one that was cut since the present one would pass for right.
    return {name: record.files.get(name) or there.get(name) for name in sorted(expected)}


def broken_files(files: Mapping[str, int | None], keep_days: int) -> dict[str, str]:
    """Return what is known to be wrong with backup files, by name.

    It is in last-verify.json, or "is missing" of what is gone since the last good run, "is
    damaged" of what has another size. Of that is passed over what is old enough to be deleted, see
    kept_since. files: see Record.
    """
    there = backup_files()
    sets = [found for found in sets_of(dict.fromkeys(files, 1)) if found.complete]
    kept = kept_since(keep_days, complete_sets())
    chains = [*chains_of(sets), *([found] for found in loose_sets(sets))]
    left = {name for chain in chains if chain[-1].date >= kept
            for found in chain for name in found.files}
    known, all_there = read_last_verify(LAST_VERIFY)["damaged"], utils.regular_files(ENCRYPTED)
    wrong = {name: "is damaged" if name in there else "is missing" for name in sorted(left)
             if name not in there or files[name] not in (None, there[name])}
    return {**wrong, **{name: why for name, why in known.items() if (
        name not in there if why == "is missing" else name in all_there)}}


def decide(night: Night, record: Record, sets: Sets, force_full: bool) -> str:
    """Return the kind of the next backup, full or incremental, and tell which files are lost.

    sets: the complete ones, oldest first. force_full: a full one was asked for.
    """
    record.asked = force_full or not sets
    look_for_losses(night, record)
    reason = reason_for_full(sets, night.now, record.broken, force_full)
    return "full" if reason else "incremental"


def look_for_losses(night: Night, record: Record) -> None:
    """See which backup files are damaged or lost, and remember them.

    Of what no run has told yet it warns: elsewhere it would be lost by a hook that mirrors, too.
    """
    record.broken.update(broken_files(record.files, night.keep_days))
    record.told = {name: why for name, why in record.told.items() if name in record.broken}
    lost = [f"{night.backup / ENCRYPTED / name} {why}"
            for name, why in sorted(record.broken.items() - record.told.items())]
    if lost:
        record.warn(f"{first_of(lost)}; fetch it from your copy elsewhere and run --verify: "
                    "no more old backups are deleted now, and the hook after-backup is not run, "
                    "lest that goes, too")
    with suppress(OSError):  # on a disk without a free byte what is old enough may still go
        record_checks([], record.broken)  # should this run be killed


def reason_for_full(
    sets: Sets, now: datetime, broken: Collection[str] = (),
    force_full: bool = False,
) -> str | None:
    """Return why the next backup must be a full one, None if an incremental will do.

    sets: the complete ones, oldest first. broken: the names of files that are damaged or
    missing. force_full: it was asked for.
    """
    if force_full:
        return "it was asked for"
    if not sets:
        return "there is no complete backup yet"
    chain = newest_chain(sets)
    if not chain:
        return "the newest set does not lead back to a full backup"
    if wrong := broken_in(chain, broken):
        return f"{wrong[0]} is damaged or missing"
    if sum(found.size for found in chain[1:]) * 2 > chain[0].size:
        return "the increments add up to more than half of the full backup"
    if now - chain[0].date > timedelta(days=FULL_DAYS):
        return f"the full backup is over {FULL_DAYS} days old"
    if not all(found.signed for found in chain):
        return "signatures are missing, without which duplicity would exit 17 night after night"
    return None


def should_force_full(env: Settings, now: datetime | None = None) -> bool:
    """Tell whether the next backup of the STORAGE_ROOT in env must be a full one.

    What is lost since the last run, or --verify, only the next one sees. now: the time,
    with its zone; default the clock's.
    """
    backup = work_of(env).backup
    broken = read_last_verify(backup / LAST_VERIFY)["damaged"]
    now = now or utc_now()
    return reason_for_full(complete_sets(backup / ENCRYPTED), now, broken) is not None


def make_room(night: Night, record: Record, sets: Sets, kind: str) -> None:
    """Check the room; where it is lacking delete chains that are old enough first.

    That is done, too, if the last run failed: it may have needed more than is known.
    Not while the newest chain is damaged or incomplete, or a file is waited for, and never
    that chain. sets: the complete ones, oldest first. kind: of the next backup. Raises Failure.
    """
    chain, lacking = newest_chain(sets), lack_of_room(night, sets, kind)
    if (lacking or record.failed) and chain and not broken_in(
            chain, record.broken) and not must_keep_all(night, record, sets):
        with utils.own_directory(TEMPORARY):
            record.attempt(delete_old_chains, night, record, chain[0].date)
        lacking = lack_of_room(night, sets, kind)
    if lacking:
        record.told = record.broken  # that the next run need not wait for it
        raise Failure(lacking)


def lack_of_room(
    work: Work, sets: Sets, kind: str, freed: int = 0, disk: Path = Path()
) -> str:
    """Return what lacks room for the next backup and duplicity's temporary files, empty if none.

    sets: the complete ones, oldest first. kind: of the next backup, which is taken to be as
    big as the newest of its kind. freed: bytes that will be free until then. disk: a
    directory on the disk that they go to.
    """
    size = sum([found.size for found in sets if found.full == (kind == "full")][-1:])
    needed = {disk: size + TEMPORARY_BYTES}
    if ENCRYPTED.exists() and ENCRYPTED.stat().st_dev != disk.stat().st_dev:
        needed = {ENCRYPTED: size, disk: TEMPORARY_BYTES}
    for place, room in needed.items():
        free, room = shutil.disk_usage(place).free + freed, room + reserve_bytes(place)
        if free < room:
            return (f"{work.backup if place == disk else place.absolute()} has {human_size(free)} "
                    f"free and a backup needs {human_size(room)} at least; make room there")
    return ""


def remove_damaged_notes(work: Work) -> list[str]:
    """Delete the archive directory if signatures in it are damaged. Returns a remark then.

    With a flipped bit an increment can bring back what was deleted, exit code 0, and a list
    of files lacks some (seen: 0.8.22). When it is deleted duplicity makes it anew.
    """
    paths = sorted(map(str, ARCHIVE.glob("*.sigtar.gz")))
    command = ["gzip", "--test", *paths]
    if not paths or utils.shell(command, work.environment, directory=".").exit_code == 0:
        return []
    utils.remove(ARCHIVE)
    return [f"{ARCHIVE.absolute()} is made anew, for it was damaged"]


def reserve_bytes(path: Path) -> int:
    """Return the room that a backup leaves to mail: 5 % of path's file system, at most 1 GB."""
    return min(shutil.disk_usage(path).total // 20, RESERVE_BYTES)


# Steps 6 and 15: hooks


def run_hook(night: Night, name: str, record: Record) -> None:
    """Run an executable file of backup/ as STORAGE_USER, if it is there.

    What goes wrong with it needs attention, no more. It gets the settings of the file,
    and PATH, HOME and USER. It is started by /bin/sh, which runs one without a `#!` line
    itself, as the 2015 script did. It has a day: STORAGE_USER could suspend it for ever.
    """
    hook, user = night.backup / name, night.user
    if name in os.listdir():  # also one whose inode is damaged
        log.info(f"running the hook {hook}")
        environment = {**night.settings, "PATH": night.environment["PATH"],
                       "HOME": user.pw_dir, "USER": user.pw_name}
        answer = utils.shell(
            ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups",
             "/bin/sh", "-c", 'exec "$0"', str(hook)], environment, umask=0o022, on_line=log.debug,
            timeout_seconds=DAY)
        if answer.exit_code:
            record.warn(f"the hook {hook} failed; mend it, or make it executable: it ended with "
                        f"{answer}")


# Steps 7 to 10: the copy


@contextmanager
def copy_of_tree(night: Night, record: Record) -> Iterator[utils.Mirror | None]:
    """Keep a copy of STORAGE_ROOT while the block runs; its first pass is made here, mail running.

    Yields None where it cannot be had: then duplicity has to read STORAGE_ROOT itself
    while mail is stopped.
    """
    place = place_of_copy(night, Path())
    spare = min(shutil.disk_usage(night.root).total // 10, SPARE_BYTES)
    excluded = {night.backup.name, COPY_BESIDE, *night.excluded}
    copy = None
    record.mounted = mounts_in_tree(night)
    log.info(f"copying {night.root} while mail runs")
    with ExitStack() as stack:
        stack.callback(record.attempt, remove_copy, place)
        try:
            copy = stack.enter_context(
                utils.mirror_of(night.root, place, excluded, may_link, spare))
        except utils.LostWrites:
            raise  # it is no reason to have mail down, too
        except (Failure, OSError) as error:
            record.remarks.insert(0, f"mail was down while duplicity read {night.root} "
                                  f"itself, because it could not be copied: {error}")
            log.info(record.remarks[0])
            record.entries = utils.count_entries(night.root, left_out(night, night.excluded))
        yield copy
        if not copy:
            mounts_in_tree(night)  # a server that died meanwhile ends the run


def place_of_copy(work: Work, backup: Path) -> Path:
    """Return the directory for the copy: it must be on the tree's own mount, for the links.

    backup: a directory on the disk of backup/.
    """
    one_disk = backup.stat().st_dev == work.root.stat().st_dev
    return SNAPSHOT if one_disk and work.backup not in utils.mounts() else work.copy_beside


def remove_copy(place: Path) -> None:
    """Remove a copy of the tree, of this run or of one that died, if it is there.

    Raises Failure if what stands there is no copy: STORAGE_USER can give directories of
    root's another name, that of the copy beside backup/, too.
    """
    if not os.path.lexists(place):
        return
    with utils.owned_directory(place) as directory:
        if foreign := sorted(set(os.listdir(directory)) - {"tree"}):
            raise Failure(f"{place.absolute()} is not a copy of the tree, for it holds "
                          f"{printable(foreign[0])}; move it to where it belongs")
        utils.remove("tree", directory)
    place.rmdir()


@contextmanager
def mail_stopped(night: Night, record: Record, lock: int) -> Iterator[None]:
    """Keep mail stopped while the block runs, see utils.services_stopped.

    lock: its descriptor.
    """
    log.info("stopping mail")
    manager = utils.service_manager(night.environment)
    lines = manager.running(night.services)
    if manager.unknown and "BACKUP_SERVICES" in night.settings:  # of the default any may be missing
        record.warn(f"BACKUP_SERVICES names {' and '.join(manager.unknown)}, which is no service "
                    "of this system and was not stopped; correct it in the settings")
    try:
        with utils.not_suspended(), utils.services_stopped(
                manager, lines, night.stopped, lock, record.downtime, STALLED_SECONDS):
            yield
    except Interrupted:
        if record.downtime.seconds and not record.downtime.not_started:
            log.warning(f"mail is back after {record.downtime.seconds:.1f} seconds")
        raise
    log.info(f"mail is back after {record.downtime.seconds:.1f} seconds")
    if record.downtime.seconds > LONG_DOWNTIME_SECONDS:
        if record.source == "direct":
            record.warn(f"{record.remarks.pop(0)}; make room there, or mount elsewhere what is "
                        "mounted inside, or leave it out with BACKUP_EXCLUDE")
        else:
            record.warn(f"mail was down for {record.downtime.seconds:.0f} seconds; see which large "
                        "files are written to all the time, and leave them out with BACKUP_EXCLUDE")
    if record.downtime.awake:
        record.warn("something started mail while it was to be down, "
                    f"{record.downtime.awake}: the backup may hold half of what it "
                    "wrote; see what did")


def may_link(path: str, siblings: Set[str]) -> bool:
    """Tell of a directory of the tree whether its files are never rewritten in place.

    These are messages, and volumes of the legacy layout. path: relative to STORAGE_ROOT.
    siblings: the names of all directories beside it: Maildir's cur, new and tmp are side
    by side.
    """
    is_maildir = os.path.basename(path) in ("cur", "new") and {"cur", "new", "tmp"} <= siblings
    return is_maildir or path.split("/")[0] == MIGRATED


# Steps 11 to 14: duplicity


def duplicity_command(action: str, *arguments: str) -> list[str]:
    """Return a duplicity command for what is in the working directory.

    The order is that of all versions: action, options, then the rest, the target last.
    The kernel kills it when this process dies, so that no orphan goes on writing.
    """
    return ["setpriv", "--pdeathsig", "KILL", "duplicity", action, "--log-fd=LOG",
            "--archive-dir", str(CACHE), "--name", ARCHIVE.name, *arguments]


TARGET = f"file://{ENCRYPTED}"


def set_command(night: Night, action: str, copy: Path | None = None) -> list[str]:
    """Return the command that makes a set.

    action: full or incremental. copy: to read, with mail running, in place of
    STORAGE_ROOT. It would wait for half a minute before each further attempt, with mail down.
    """
    return duplicity_command(
        action, *([] if copy else exclusions(night, night.excluded)),
        "--volsize", str(VOLUME_MEGABYTES),
        "--gpg-options=--cipher-algo=AES256", "--allow-source-mismatch", "--num-retries", "1",
        str(copy or night.root), TARGET)


def left_out(work: Work, excluded: Sequence[str]) -> list[Path]:
    """Return what of STORAGE_ROOT no backup holds. excluded: see excluded_of."""
    return [work.backup, work.copy_beside, *map(work.root.joinpath, excluded)]


def exclusions(work: Work, excluded: Sequence[str]) -> list[str]:
    """Return duplicity's options to leave that out, and so all below it.

    A name to --exclude would mean the same name with a line break at its end, too.
    """
    return [part for path in left_out(work, excluded)
            for part in ("--exclude-regexp", rf"\A{re.escape(str(path))}\Z")]


def pruning_command(action: str, *age: str) -> list[str]:
    """Return the command for remove-older-than or cleanup."""
    return duplicity_command(action, "--force", "--verbosity", "error", *age, TARGET)


def run_duplicity(
    work: Work, command: Sequence[str], watch: utils.Watch = lambda process: None,
    go_on: Callable[[], None] = lambda: None,
) -> tuple[Finished, list[str]]:
    """Run a duplicity command in the working directory.

    The passphrase is in its environment; nothing but duplicity and its gpg ever has it.
    watch: see utils.shell. go_on: called again and again while it does. Returns how it ended, and
    the lines of its machine log. A record with a name that is not UTF-8 fails to be written there
    (0.8.22, 3.2.1); Python then prints it as an error of logging, from where it is put back as a
    WARNING. After a fatal error it may hang for ever: a thread waits for a gpg that nobody reads
    (seen: 0.8.22 to 3.2.1). It is ended then. Raises Failure where it stands still otherwise, as
    when a pipe was put in place of a file: it waits for somebody who writes to that.
    """
    lines: list[str] = []
    lost_records: list[str] = []
    fatal: dict[int, float] = {}  # when it told of an error, by the exit code for that
    state, changed = b"", time.monotonic()

    def take_line(line: str) -> None:
        log.debug(line)
        if line.startswith("Message: "):
            lost_records.extend(["WARNING 1", f". {line.removeprefix('Message: ')}"])

    def take_record(line: str) -> None:
        lines.append(line)
        if match := re.match(r"ERROR (?!1\b)(\d+)", line):  # it goes on after some of code 1
            fatal.setdefault(int(match[1]), time.monotonic())

    def end_if_hanging(process: int) -> None:
        nonlocal state, changed
        watch(process)
        before, state = state, utils.state_of(process)  # a launcher only waits for it
        now = time.monotonic()
        if state != before:
            changed = now
            go_on()
        if now > changed + STALLED_SECONDS + HANGING_SECONDS:  # while mail is down the keeper acts
            raise Failure(f"duplicity stood still for {STALLED_SECONDS} seconds; see which disk "
                          "does not answer, and run this again")
        if fatal and now > max(fatal.values()) + HANGING_SECONDS:
            os.killpg(process, signal.SIGKILL)

    log.debug(f"running {shlex.join(command)}")
    passphrase = read_passphrase()
    # A relative directory for temporary files would be made absolute.
    environment = {**work.environment, "PASSPHRASE": passphrase,
                   "TMPDIR": f"/proc/self/cwd/{TEMPORARY}"}
    answer = utils.shell(
        command, environment, directory=".", secret=passphrase, umask=0o077, watch=end_if_hanging,
        on_line=take_line, on_log=take_record)
    if fatal and answer.exit_code < 0:
        answer = Finished(max(fatal), answer.last_lines)
    return answer, lines + lost_records


def explain(action: str, answer: Finished) -> str:
    """Return the sentence on how duplicity failed, and its last lines."""
    # Of a restore it is 30, of a quota 31.
    full = re.search(r"\[Errno (28|122)\]", str(answer))
    meaning = DUPLICITY_EXIT_CODES.get(53 if full else answer.exit_code, "see its last lines")
    return f"duplicity {action} failed: {meaning}; it ended with {answer}"


def make_set(
    night: Night, record: Record, action: str, copy: utils.Mirror | None = None
) -> None:
    """Have duplicity make a set, and believe it only when it is proved.

    duplicity must say so, its manifest be there, and no entry be missing: 0.8.22 exits 0
    for a tree that vanishes while it reads. action: full or incremental. copy: what it
    reads in place of STORAGE_ROOT. Raises Failure.
    """
    root, tree = str(night.root), copy.target if copy else night.root
    record.kind, record.source = action, "copy" if copy else "direct"
    before = {found.stamps for found in complete_sets()}
    if not copy and not os.path.samefile(".", night.backup):
        raise Failure(f"somebody renamed {night.backup}; give it its name back")
    entries = utils.count_entries(tree) if copy else record.entries
    log.info(f"duplicity makes the {action} backup of {root}")
    command = set_command(night, action, copy.target if copy else None)
    with progress() as draw:
        total = utils.content_size(tree) if draw and copy and action == "full" else None
        answer, log_lines = run_duplicity(night, command, watch_set(night, record, draw, total),
                                          record.downtime.go_on)
    if answer.exit_code:
        raise Failure(explain(action, answer))
    if not copy and (gone := unmounted(night, record.mounted)):
        raise Failure(f"{gone} was unmounted while mail was down; see to that and run this again")
    sets = complete_sets()
    if before.difference(found.stamps for found in sets):
        raise Failure(f"while duplicity ran backups went from {ENCRYPTED.absolute()}; see to its "
                      "disk, and run this again")
    made = newest_chain(sets)[-1:]
    if not made or made[0].stamps in before or made[0].full != (action == "full") or any(
            why for _, why in check_set(night, made[0], [])):
        raise Failure(f"duplicity ended well but no new {action} set is in "
                      f"{ENCRYPTED.absolute()}; run the backup with --full")
    reported, warnings = read_machine_log(log_lines)
    early = [text for text in warnings
             if re.fullmatch(r"\W?(?i:warning): .* has negative mtime, treating as 0\.\W?", text)]
    if early:
        record.remarks.append(f"times before 1970 are 1970 in the backup: {first_of(early)}")
        warnings = [text for text in warnings if text not in early]
    unexplained = math.inf if reported is None else abs(reported - entries) - len(warnings)
    # Nothing changes a copy. Others than mail may go on writing to the tree itself: then
    # a hundredth of it may come or go meanwhile.
    if unexplained > 0 and (copy or unexplained > entries // 100 + abs(
            utils.count_entries(tree, left_out(night, night.excluded)) - entries)):
        raise Failure(f"duplicity read {reported} of the {entries} files and directories "
                      f"of {root}, and did not say why; see that nothing but mail writes "
                      "there, and run the backup again")
    record.size, record.newest_set = made[0].size, made[0].stamp
    record.files = {**backup_files(), **record.files}
    if copy:
        record.unread = [printable(f"{root}/{path}: {why}") for path, why in copy.unread.items()]
    record.unread += [warning.replace(str(tree), root) for warning in warnings]
    if record.asked:  # one that comes by itself reads again only what is there still
        if gone := unmounted(night, record.earlier):
            record.warn(f"{gone} is not mounted and was when earlier backups were made: this one "
                        "does without it, and they are deleted when they are old enough")
        record.lacking, record.earlier = [], set()
    record.lacking = [*dict.fromkeys(record.lacking + list(filter(is_damage, record.unread)))]
    if record.unread:
        record.warn(f"not all of {root} could be read; check the disk, or leave out what cannot be "
                    f"read with BACKUP_EXCLUDE: {first_of(record.unread)}")


def is_damage(why: str) -> bool:
    """Tell whether a file could not be read because the disk is damaged.

    why: a path and the reason, or what duplicity says: of what it cannot list or look at no reason
    (0.8.22, 3.2.1), and it may just have gone.
    """
    reasons = [os.strerror(number) for number in utils.DAMAGED]
    if why.startswith("/"):
        return why.endswith(tuple(reasons))
    named = re.match(r"\W?Error (?:listing directory|accessing possibly locked file) (.*)", why)
    if named and "\\" not in named[1]:  # else it may be escaped
        try:
            os.lstat(named[1])
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENAMETOOLONG)
    return bool(named or re.match(rf"\W?Error ({'|'.join(reasons)}) ", why))


def watch_set(
    work: Work, record: Record, draw: Draw | None, total: int | None
) -> utils.Watch:
    """Return a watch on duplicity that ends it before it takes the last room.

    It also draws how much of the tree duplicity has read. total: how much there is to
    read, in bytes, if that is known. What it reads besides is, of each finished volume,
    three times as much (seen: 0.8.22, 3.2.1).
    """
    before = sum(utils.regular_files(ENCRYPTED).values())
    reserves = {place: reserve_bytes(place) for place in (Path(), ENCRYPTED)}
    if record.source == "copy":  # it may be on another disk, and keeps there what is deleted now
        reserves[work.root] = min(reserve_bytes(work.root), shutil.disk_usage(work.root).free // 2)

    def watch(process: int) -> None:
        for place, reserve in reserves.items():
            if shutil.disk_usage(place).free < reserve:
                raise Failure("duplicity was ended before it took the last room of "
                              f"{place.absolute()}; make room there")
        if draw:
            made = sum(utils.regular_files(ENCRYPTED).values()) - before
            draw(utils.bytes_read_by(process) - 3 * made, total)

    return watch


def first_of(texts: Sequence[str]) -> str:
    """Return the first of some texts, and how many more there are."""
    more = f"; and {len(texts) - MOST_NAMES} more" if len(texts) > MOST_NAMES else ""
    return "; ".join(texts[:MOST_NAMES]) + more


def read_machine_log(lines: Sequence[str]) -> tuple[int | None, list[str]]:
    """Read duplicity's machine log.

    It has records of `LEVEL code`, and then of lines that begin with a full stop.
    A file that could not be read is a WARNING with the general code 1, or 9 if its
    status could not be had, and exit code 0; the statistics count it as an error or not
    (all seen: 0.8.22, 3.2.1). Returns the number of source entries, and the warnings but
    those about other sets in the target: with codes 2 to 6 (duplicity's log.py), and one
    with code 1, of a set without signatures.
    """
    entries: int | None = None
    warnings: list[str] = []
    level = ""
    for line in lines:
        text = line[2:]
        if line and not line.startswith("."):
            level = "" if re.match("WARNING [2-6]\\b", line) else line.split()[0]
            warnings.append("")
        elif line and level == "WARNING":  # a name with a line break takes several
            warnings[-1] += f"\\n{text}" if warnings[-1] else text
        elif match := re.fullmatch(r"SourceFiles (\d+)", text.strip()):
            entries = int(match[1])
    return entries, [text for text in dict.fromkeys(warnings)
                     if text and not text.startswith("Warning, discarding last backup set")]


def delete_migrated_backups(night: Night, record: Record, state: DirectoryState | None) -> None:
    """Delete the plain backups of the legacy layout, now that a backup contains them.

    state: of their directory from before the backup: one that was renamed meanwhile,
    even there and back, may not be in it.
    """
    migrated = night.migrated
    if state is None:
        return
    root = f" {night.root}"
    unread = record.unread + record.lacking  # of the latter a run notes the first for the next
    if len(record.lacking) >= MOST_NAMES or any(
            migrated.name in why or why.endswith(root) for why in unread):
        record.warn(f"{migrated} is kept because not all of it could be read; check the disk")
        return
    with utils.owned_directory(migrated) as directory:
        if directory_state(os.fstat(directory)) != state:
            record.warn(f"{migrated} is kept because it was changed during the backup; "
                        "run the backup again")
            return
        names = sorted(os.listdir(directory), key=lambda name: name.startswith("duplicity-"))
        # Encrypted ones, moved aside, STORAGE_USER may have given this name.
        if names and not names[-1].startswith("duplicity-") or any(
                name.endswith(".gpg") for name in names):
            record.warn(f"{migrated} is kept because it holds no plain backups; move it to "
                        "where it belongs, or away")
            return
        # What tells that they are backups goes last, so that the run after one that is
        # killed here goes on.
        for name in names:
            utils.remove(name, directory)
    migrated.rmdir()


def must_keep_all(night: Night, record: Record, sets: Sets) -> bool:
    """Tell, and warn, whether nothing old may be deleted in this run.

    What is old may alone hold a file that could not be read since, or what is on a disk that is
    not mounted. Or files may be waited for: what sets younger than BACKUP_KEEP_DAYS need that
    lead nowhere, and in the night that tells of them all. Duplicity would delete what is left of
    such sets, or what is before them as a chain that is over. Or the clock may have jumped ahead,
    and all would be old; a new set tells what it was for duplicity, if it has jumped meanwhile.
    sets: the complete ones from before this run, oldest first.
    """
    there, kept = read_sets(), kept_since(night.keep_days)
    loose = [found.stamp for found in loose_sets(there) if found.date > kept]
    if loose:
        record.warn("no old backups were deleted, for with what is missing these would be whole "
                    f"again: {first_of(loose)}; put it back from your copy elsewhere, or move "
                    "their files away")
    now = max([night.now, *(found.date for found in there if found.complete)])
    after_a_pause = bool(sets) and now - sets[-1].date > timedelta(days=FULL_DAYS)
    if after_a_pause:
        record.warn(f"no old backups were deleted because the newest was over {FULL_DAYS} days "
                    "old: check the clock; if it is right the next run will delete them")
    if record.lacking:
        record.warn("no old backups were deleted, for they alone may hold what could not be read; "
                    f"mend the disk, and run --full: {first_of(record.lacking)}")
    if gone := unmounted(night, record.earlier):
        record.warn(f"no old backups were deleted, for {gone} is not mounted and was when "
                    "they were made; mount it, or run --full to do without it")
    return bool(loose or record.lacking or gone) or after_a_pause or record.news


def delete_old_chains(night: Night, record: Record, begin: datetime | None = None) -> None:
    """Delete the chains whose newest set is older than BACKUP_KEEP_DAYS, if the newest is whole.

    begin: that of a chain which is to stay, however old its newest set is.
    """
    chains = chains_of(complete_sets())
    if any(chain[-1].date < kept_since(night.keep_days) for chain in chains[:-1]):
        log.info("checking the newest backups before old ones are deleted")
        check_files(night, record, chains[-1], range(SHARES))
        if record.news:
            return
    age = f"{night.keep_days}D"
    if begin and night.now - begin > timedelta(days=night.keep_days):
        age = str(int(begin.timestamp()))
    run_pruning(night, record, "remove-older-than", age)
    # It leaves the manifests of sets that have lost their volumes (seen: 0.8.22).
    for chain in chains_of(complete_sets())[:-1]:
        if chain[-1].date < kept_since(night.keep_days) and not any(
                found.volumes for found in chain):
            for found in chain:
                utils.remove(ENCRYPTED / found.manifest)


def clean_up(night: Night, record: Record) -> None:
    """Run duplicity's cleanup, but not where signatures are lost.

    It would delete those after them, too (seen: 0.8.22, 3.2.1); their chain goes as a whole.
    """
    if all(found.signed for chain in chains_of(complete_sets()) for found in chain):
        run_pruning(night, record, "cleanup")


def run_pruning(night: Night, record: Record, action: str, *age: str) -> None:
    """Run remove-older-than or cleanup; that it fails needs attention, no more."""
    log.info(f"deleting old backups: {action}")
    answer, _ = run_duplicity(night, pruning_command(action, *age))
    if answer.exit_code:
        record.warn(explain(action, answer))


def grant_group_read(night: Night) -> None:
    """Give STORAGE_USER's group, and so the hooks, read access to the encrypted files."""
    wanted = (0, night.user.pw_gid, 0o640)
    for name in utils.regular_files(ENCRYPTED):
        path = ENCRYPTED / name
        with suppress(FileNotFoundError):
            status = path.lstat()
            if (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != wanted:
                os.chown(path, 0, night.user.pw_gid)
                path.chmod(0o640)


def check_a_share(night: Night, record: Record) -> None:
    """Check a seventh of the backup files as --verify does: those not checked for longest."""
    checked = read_last_verify(LAST_VERIFY)["checked"]
    share = min(range(SHARES), key=lambda number: checked.get(str(number), ""))
    log.info("checking a seventh of the backup files")
    check_files(night, record, complete_sets(), [share])
    record_checks([share], {})


def check_files(night: Night, record: Record, sets: Sets, shares: Collection[int]) -> None:
    """Check the files of some sets that are in some shares, and tell what is wrong with them."""
    look_for_losses(night, record)  # a --verify may have found some since, or a check took hours
    known = read_last_verify(LAST_VERIFY)["damaged"]
    results = {**dict.fromkeys(known, ""), **record.broken}  # or it is whole again
    with utils.low_priority():
        for found in sets:
            results.update(check_set(night, found, shares))
    record.broken = {name: why for name, why in results.items() if why}
    record_checks([], results, known)
    look_for_losses(night, record)


# Step 15: how the run went


@contextmanager
def last_run_recorded() -> Iterator[Record]:
    """Write last-run.json when the block ends, however it ends.

    A service that could not be started again is told of, and outranks every other exit
    code.
    """
    record = new_record()
    try:
        yield record
        utils.raise_if_interrupted()
        record.told = record.broken
    except (Exception, Interrupted) as error:
        failure = failure_of(error)
        if failure.exit_code == 2 and record.duplicity_version:
            failure.exit_code = 1  # for step 1 is over
        if record.downtime.not_started:
            failure.exit_code = 5
        last = new_record()  # what this run would have changed of it holds on
        record.newest_set, record.files = last.newest_set, last.files
        record.lacking, record.earlier, record.mounted = last.lacking, last.earlier, set()
        write_last_run(record, failure.exit_code, str(failure))
        raise failure from error
    else:
        write_last_run(record)
    finally:
        for name, why in record.downtime.not_started.items():
            log.error(f"{name} could not be started again; mend it, the next run tries it, too: "
                      f"{why}")


def new_record() -> Record:
    """Return the record of a run that begins now, with what the last one hands on.

    Where that tells of no backups cache/ does, but for volumes.
    """
    last = read_last_run(LAST_RUN)
    cached = [name for name, size in utils.regular_files(ARCHIVE).items() if size]
    files = {f"{name.removesuffix('.gz')}.gpg": None for name in cached}
    newest_set = max((stamp_of(Path(name)) for name in cached if name.endswith(".manifest")),
                     default=None)
    return Record(newest_set=last.get("newest_set") or newest_set,
                  failed=last.get("exit_code") == 1, files={**last.get("files", files)},
                  lacking=list(map(str, last.get("lacking", []))),
                  earlier=set(map(str, last.get("mounted", []))),
                  told={name: str(why) for name, why in last.get("told", {}).items()})


def exit_code_of(record: Record) -> int:
    """Return the exit code of a run that made a backup."""
    return 5 if record.downtime.not_started else 3 if record.attention else 0


def write_last_run(record: Record, exit_code: int | None = None, message: str = "") -> None:
    """Write last-run.json.

    exit_code, message: of a run that failed; of one that made a backup the record tells them.
    """
    messages = [f"{name} could not be started again" for name in record.downtime.not_started]
    messages += [*record.attention, *record.remarks, message]
    record.attempt(save_json, LAST_RUN, {
        "start": record.start.isoformat(timespec="seconds"),
        "end": utc_now().isoformat(timespec="seconds"),
        "kind": record.kind,
        "source": record.source,
        "downtime_seconds": round(record.downtime.seconds, 3),
        "exit_code": exit_code_of(record) if exit_code is None else exit_code,
        "message": "; ".join(text.splitlines()[0] for text in messages if text),
        "duplicity_version": record.duplicity_version,
        "newest_set": record.newest_set,
        "told": record.told,
        "lacking": record.lacking[:MOST_NAMES],
        "mounted": sorted(record.mounted | record.earlier),
        # Of more the volumes are passed over: their manifests name them, too.
        "files": dict(sorted(record.files.items(), key=lambda item: ".difftar." in item[0])
                      [:MOST_FILES]),
    })


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of JSON for root and the group of backup/, which is STORAGE_USER's."""
    text = json.dumps(content, indent=1) + "\n"
    utils.write_atomically(path, text, 0o640, Path().stat().st_gid)


def read_last_verify(path: Path) -> dict[str, dict[str, str]]:
    """Return what last-verify.json holds.

    checked: by the number of a share, when it was checked last. damaged: what is wrong with
    files, by name. Both are empty where there is no such file.
    """
    with suppress(Exception):  # a file that somebody edited may hold anything
        content = json.loads(utils.content_of(path))
        now = utc_now()
        return {"checked": {share: date for share, date in content["checked"].items()
                            # A clock may have been ahead.
                            if datetime.fromisoformat(date).astimezone() <= now},
                "damaged": {name: str(why) for name, why in content["damaged"].items()}}
    return {"checked": {}, "damaged": {}}


def record_checks(
    shares: Collection[int], results: Mapping[str, str], known: Collection[str] = ()
) -> None:
    """Add to last-verify.json which shares of the files were checked just now.

    results: what is wrong with files, by name, empty if nothing is. What was wrong before
    stays so until it was checked again, or nothing of its set is there any more. known: what
    was wrong when the check began: what another has found meanwhile is not taken back.
    """
    last = read_last_verify(LAST_VERIFY)
    now = utc_now().isoformat(timespec="seconds")
    wrong = {**last["damaged"],
             **{name: why for name, why in results.items() if why or name in known}}
    save_json(LAST_VERIFY, {
        "checked": {**last["checked"], **{str(share): now for share in shares}},
        "damaged": {name: wrong[name] for name in broken_in(read_sets(), wrong)
                    if wrong[name]}})


def read_last_run(path: Path) -> dict[str, Any]:
    """Return what last-run.json holds, nothing if there was no run yet.

    If it cannot be read, a failed run that says so.
    """
    try:
        content = json.loads(utils.content_of(path))
        if content and isinstance(content, dict):
            if not re.fullmatch(STAMP, str(content.get("newest_set"))):
                content.pop("newest_set", None)
            for name, kind in ("told", dict), ("lacking", list), ("mounted", list), ("files", dict):
                if not isinstance(content.get(name), kind):
                    content.pop(name, None)
            return content
        why = f"{path.absolute()} does not hold a run"
    except FileNotFoundError:
        return {}
    except PermissionError:  # to be told that only root may
        raise
    except (OSError, ValueError, RecursionError) as error:
        why = f"cannot read {path.absolute()}: {error}"
    why += "; see that all disks are mounted"  # nobody knows what was lacking
    return {"exit_code": 1, "message": f"{why}, and run --full", "lacking": [why]}


# Status

NO_BACKUPS = "No backups have been made yet."


def backup_status(env: Settings, now: datetime | None = None) -> dict[str, Any]:
    """Tell what backups there are, how big, when each will be deleted and how the last run went.

    env: settings with STORAGE_ROOT. now: the time, with its zone; default the clock's.
    Only directory entries are read. Returns, made for JSON: directory, encpwfile, tz;
    backups, newest first, each with date (such as 20261122T030000Z), date_str (local ISO
    time), date_delta (its age), full, previous (the date it builds on), size in bytes,
    and deleted_in; excluded, whether there is something by each path of BACKUP_EXCLUDE;
    unmatched_file_size in bytes, of files that belong to no complete
    set; free_size in bytes, of the disk they are on; last_run, as in last-run.json, None
    if there was none. Raises Failure, OSError.
    """
    backup = work_of(env).backup
    encrypted = backup / ENCRYPTED
    now = (now or utc_now()).astimezone()
    sets = complete_sets(encrypted)
    matched = {name for found in sets for name in found.files}
    last_run = read_last_run(backup / LAST_RUN)
    last_verify = read_last_verify(backup / LAST_VERIFY)
    broken = broken_in(sets, last_verify["damaged"])
    deleted_in = tell_deletions(sets, timedelta(days=keep_days_of(env)), now, broken)
    disk = next(path for path in (encrypted, *encrypted.parents) if path.exists())
    status: dict[str, Any] = {
        "directory": str(encrypted), "encpwfile": str(backup / KEY), "tz": now.tzname(),
        "backups": [{
            "date": found.stamp, "date_str": found.date.astimezone().isoformat(),
            "date_delta": span(found.date, now), "full": found.full, "previous": found.previous,
            "size": found.size, "deleted_in": deleted_in[found],
        } for found in reversed(sets)],
        "excluded": {path: os.path.lexists(backup.parent / path) for path in excluded_of(env)},
        "unmatched_file_size": sum(size for name, size in utils.regular_files(encrypted).items()
                                   if name not in matched),
        "free_size": shutil.disk_usage(disk).free,
        "last_run": last_run or None, "last_verify": last_verify}
    chain = newest_chain(sets)
    trouble = ""
    if lost := newest_lost(sets, last_run.get("newest_set")):
        trouble = lost
    elif sets and not chain:
        trouble = "the newest backup leads back to no full one, the next run makes one"
    elif wrong := broken_in(chain, broken):
        trouble = f"damaged: {wrong[0]}, the next run makes a full backup"
    status["ok"], status["headline"] = headline_of(status, now, trouble)
    return status


def span(begin: datetime, end: datetime) -> str:
    """Return the time between two in its two largest units, such as "3 hours, 5 minutes".

    Of one that is over it is "0 minutes".
    """
    delta = relativedelta(max(begin, end).astimezone(begin.tzinfo), begin)  # of two zones it errs
    units = ["years", "months", "days", "hours", "minutes"]
    while units[1:] and not getattr(delta, units[0]):
        del units[0]
    numbers = {unit: getattr(delta, unit) for unit in units[:2]}
    return ", ".join(f"{number} {unit if number != 1 else unit[:-1]}"
                     for unit, number in numbers.items())


def tell_deletions(
    sets: Sets, keep: timedelta, now: datetime, broken: Collection[str] = ()
) -> dict[BackupSet, str]:
    """Tell when each set will be deleted, in texts such as "2 days, 3 hours".

    Exact for the chains before the last full and for orphans, which duplicity's cleanup
    deletes; for the current chain an estimate of when the next full starts a new one,
    and of its age from then on. sets: the complete ones, oldest first. keep: how old the
    newest of a chain must be. broken: see reason_for_full.
    """
    chains = chains_of(sets)
    told: dict[BackupSet, str] = {}
    for chain in [*chains[:-1], *([found] for found in loose_sets(sets))]:
        end = chain[-1].date + keep
        told.update(dict.fromkeys(chain, "on next daily backup" if end <= now else span(now, end)))
    for chain in chains[-1:]:
        full, *increments = chain
        days: float = FULL_DAYS
        if grown := sum(increment.size for increment in increments):
            days = min(days, full.size / 2 / (grown / len(increments)))
        last = chain[-1].date
        if not reason_for_full(sets, now, broken):
            last = max(last, full.date + timedelta(days))
        days_left = max(0, -((now - last - keep) // timedelta(1)))
        text = f"approx. {days_left} day{'' if days_left == 1 else 's'}"
        told.update(dict.fromkeys(chain, text))
    return told


def human_size(size_bytes: int) -> str:
    """Return a size such as 1.2 GB, in decimal units."""
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    whole = units[0] == "bytes" or size >= 99.95
    return f"{size:.0f} {units[0]}" if whole else f"{size:.1f} {units[0]}"


def headline_of(
    status: Status, now: datetime, trouble: str = ""
) -> tuple[bool, str]:
    """Return whether all is well, and in a line how it stands: OK, or why --status has exit code 3.

    status: backup_status's answer. now: the time, with its zone. trouble: what is wrong with
    the newest backup.
    """
    backups, last = status["backups"], status["last_run"]
    told = f"last backup {backups[0]['date_delta']} ago" if backups else (
        "there is no complete backup")
    for increments, found in enumerate(backups):
        if found["full"]:
            date = stamp_date(found["date"]).astimezone()
            recent = now - date < timedelta(days=6)
            told += date.strftime(", full on %A" if recent else ", full on %Y-%m-%d")
            told += f", {increments} increment{'' if increments == 1 else 's'} since"
            break
    if last is not None and last.get("exit_code") not in (0, 3):
        return False, printable(f"FAILED: the last run failed: {last.get('message')}; {told}")
    if trouble:
        return False, f"FAILED: {trouble}; {told}"
    overdue = timedelta(hours=OVERDUE_HOURS)
    if not backups or now - stamp_date(backups[0]["date"]) > overdue:
        return False, f"OVERDUE: there is no backup of the last {OVERDUE_HOURS} hours; {told}"
    return True, f"OK: {told}"


def status_text(status: Status) -> str:
    """Return backup_status's answer for people, with no line break at its end."""
    lines = [status["headline"], ""]
    row = "{:<19} {:<20} {:<9} {:>8} {}"
    if status["backups"]:
        lines += [row.format("When", "Age", "Type", "Size", "Deleted in")]
    else:
        lines += [NO_BACKUPS, ""]
    for backup in status["backups"]:
        kind = "full" if backup["full"] else "increment"
        lines.append(row.format(clock_time(backup["date_str"]), backup["date_delta"], kind,
                                human_size(backup["size"]), backup["deleted_in"]))
        if backup["full"]:
            lines.append("")  # a chain ends, or rather begins
    unmatched = status["unmatched_file_size"]
    total = human_size(sum(backup["size"] for backup in status["backups"]) + unmatched)
    if unmatched:
        total += f", of which {human_size(unmatched)} in files of no complete backup"
    return "\n".join([
        *lines, f"Total:    {total}", f"Free:     {human_size(status['free_size'])} on that disk",
        f"Backups:  {printable(status['directory'])}",
        f"Key:      {printable(status['encpwfile'])} (keep a copy elsewhere)",
        f"Last run: {printable(last_run_text(status['last_run']))}",
        *(f"{name + ':':<9} {printable(text)}" for name, text in checks_text(status).items())])


def checks_text(status: Status) -> dict[str, str]:
    """Return up to when backup files were checked, and what is damaged or left out.

    Each is under a heading. status: backup_status's answer.
    """
    checked, damaged = status["last_verify"]["checked"], []
    for name, why in status["last_verify"]["damaged"].items():
        damaged.append(f"{name} {why}; " + (
            "no increment can be made on it" if ".sigtar." in name else
            "its backup, and those after it to the next full one, cannot be restored whole"))
    told = {"Damaged": first_of(damaged)} if damaged else {}
    if len(checked) == SHARES:
        date = datetime.fromisoformat(min(checked.values())).astimezone()
        told["Verified"] = f"up to {date.isoformat()}"
    excluded = [path if there else f"{path} (not found)"
                for path, there in status["excluded"].items()]
    if excluded:
        told["Left out"] = ", ".join(excluded)
    return told


def last_run_text(last: Status | None) -> str:
    """Return in a line when the last run ended, in local ISO time, and how it went.

    last: of last-run.json, None if there was no run.
    """
    if last is None:
        return "none yet"
    end, seconds = str(last.get("end", "unknown")), last.get("downtime_seconds")
    with suppress(ValueError, OverflowError):
        end = datetime.fromisoformat(end).astimezone().isoformat()
    source = {"direct": "read directly", "copy": "read from a copy"}.get(str(last.get("source")))
    told = [f"exit code {last.get('exit_code')}", last.get("kind"), source,
            seconds and f"mail down {seconds} seconds", last.get("message")]
    return f"{end}: {', '.join(str(part) for part in told if part)}"


def show_status(env: Settings, as_json: bool, as_html: bool) -> int:
    """Print the status. Returns the exit code: 0, or 3 if not all is well, see headline_of."""
    now = datetime.now().astimezone()
    status = backup_status(env, now)
    if as_json:
        print(json.dumps(status, indent=1))
    elif as_html:
        print(status_page(status, now))
    else:
        print(status_text(status))
    sys.stdout.flush()  # what is said on standard error comes after it
    if not status["ok"]:
        log.warning(status["headline"])
    return 0 if status["ok"] else 3


# Status as a web page

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Backups</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<meta http-equiv="Content-Security-Policy"
    content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ color-scheme: light dark; --page: #ffffff; --text: #1b222c; --muted: #566170;
    --line: #d8dde4; --bar: #2563a8; --alarm: #8f1d14; --alarm-page: #fdecea; }}
@media (prefers-color-scheme: dark) {{
    :root {{ --page: #14181d; --text: #e4e8ed; --muted: #a4aebb; --line: #363e48;
        --bar: #7fb3ee; --alarm: #ffb9b0; --alarm-page: #3d1d1a; }}
}}
body {{ max-width: 44rem; margin: 0 auto; padding: 1rem; background: var(--page);
    color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ margin: 0; font-size: 1.6rem; line-height: 1.2; }}
h1 + p, dt, caption, small, thead {{ color: var(--muted); font-size: .8125rem; }}
.alarm {{ padding: .5rem .75rem; border-left: .25rem solid; background: var(--alarm-page);
    color: var(--alarm); }}
dd {{ margin: 0 0 1rem; }}
.bar {{ display: block; min-width: 2px; height: .5rem; margin-top: .2rem;
    background: var(--bar); }}
table {{ width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums;
    overflow-wrap: normal; }}
caption {{ text-align: left; }}
th, td {{ padding: .4rem 0 .4rem min(2rem, 3vw); border-bottom: 1px solid var(--line);
    font-weight: inherit; text-align: left; vertical-align: top; }}
th:first-child {{ padding-left: 0; width: 45%; }}
tbody + tbody tr:first-child > * {{ padding-top: 2rem; }}
.full, tfoot tr:last-child {{ font-weight: bold; }}
.size {{ text-align: right; }}
.size, time span {{ white-space: nowrap; }}
small {{ display: block; font-weight: normal; }}
@media (max-width: 30rem) {{
    body {{ padding: .5rem; }}
    table {{ font-size: .8125rem; }}
}}
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
{checks}
<dt>Encrypted files</dt>
<dd><code>{directory}</code>, {free} free on that disk<br>
These are safe to copy anywhere: to another machine, best of all.</dd>
<dt>Key</dt>
<dd><code>{key}</code><br>
Keep a copy of this elsewhere, and not beside the files: without it no backup can be opened.</dd>
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
<tr><th scope="col">When</th><th scope="col">Type</th><th scope="col" class="size">Size</th>
<th scope="col">Deleted in…</th></tr>
</thead>
{chains}
<tfoot>
{sums}
</tfoot>
</table>"""


def status_page(status: Status, now: datetime) -> str:
    """Return backup_status's answer as a web page without a script, which fetches nothing.

    It is ASCII, whatever the locale. now: the time, with its zone, at which the answer
    was asked for.
    """
    last = status["last_run"]
    page = PAGE.format(
        headline_class="" if status["ok"] else "alarm", headline=for_page(status["headline"]),
        now=for_page(f"{now.astimezone():%Y-%m-%d %H:%M:%S} {status['tz']}"),
        last_class="alarm" if last and last.get("exit_code") == 3 else "",
        last_run=for_page(clock_time(last_run_text(last))),
        checks="\n".join(f"<dt>{name}</dt>\n<dd>{for_page(text)}</dd>"
                         for name, text in checks_text(status).items()),
        directory=for_page(status["directory"]), free=human_size(status["free_size"]),
        key=for_page(status["encpwfile"]),
        backups=table(status) if status["backups"] else f"<p><strong>{NO_BACKUPS}</strong></p>")
    return page.encode("ascii", "xmlcharrefreplace").decode()


def for_page(text: str) -> str:
    """Return text as it can stand anywhere in a page, what is not printable as an escape."""
    return html.escape(printable(text))


def clock_time(text: str) -> str:
    """Return text with the ISO time that it begins with as a clock shows it."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)[+-]\d\d:\d\d", r"\1 \2", text)


def table(status: Status) -> str:
    """Return the page's table of the backups, a part for each chain, and of their sums.

    A bar in each row is as wide, in percent of its cell, as the backup is big beside the
    largest.
    """
    largest = max(backup["size"] for backup in status["backups"])
    chains = "<tbody>\n"
    for number, backup in enumerate(status["backups"], 1):
        kind = "full" if backup["full"] else "increment"
        day, clock = clock_time(backup["date_str"]).split()
        chains += (
            f'<tr class="{kind}"><th scope="row"><time datetime="{backup["date_str"]}">'
            f'<span>{day}</span> <span>{clock}</span></time>'
            f'<small>{backup["date_delta"]} ago</small>'
            f'<span class="bar" style="width: {100 * backup["size"] / largest:.1f}%"></span></th>'
            f'<td>{kind}</td><td class="size">{human_size(backup["size"])}</td>'
            f'<td>{backup["deleted_in"]}</td></tr>\n')
        if backup["full"] and number < len(status["backups"]):
            chains += "</tbody>\n<tbody>\n"
    unmatched = status["unmatched_file_size"]
    sums = {"Files of no complete backup": unmatched} if unmatched else {}
    sums["Total"] = unmatched + sum(backup["size"] for backup in status["backups"])
    return TABLE.format(chains=f"{chains}</tbody>", sums="\n".join(
        f'<tr><th scope="row" colspan="2">{name}</th><td class="size">{human_size(size)}</td>'
        "<td></td></tr>" for name, size in sums.items()))


# Reading: verify, list, restore

PUT_BACK = "put back your copy of it, or take an older backup with --time"


@dataclass(frozen=True)
class Reader(Work):
    """What a command that reads knows. Its working directory is its own, with links to backups.

    sets: those that it reads, of the ones that were complete when it began, oldest first.
    """

    sets: Sets


Choice = Callable[[Sets], Sets]


@contextmanager
def reader_of(
    settings: Settings, choose: Choice = list, signatures: bool = True
) -> Iterator[Reader]:
    """Put together what a command that reads needs, and work in a directory of its own.

    That has hard links to the files of sets that are complete now, and to duplicity's
    notes on them. So a set that is being made, or that died, is not seen (duplicity from
    3.0.6 on takes it for the newest, and fails), what is pruned meanwhile is still read,
    and no backup notices. choose: picks the sets to read; damage in others is no matter
    then. signatures: whether these are needed, too; a restore needs none, but fails if one
    is damaged. Raises Failure if there is no backup, or no key that opens any.
    """
    work = work_of(settings)
    for program in PROGRAMS:
        utils.find_program(program, work.environment)
    if not complete_sets(work.backup / ENCRYPTED):
        raise Failure(f"there is no complete backup in {work.backup / ENCRYPTED}; mount its disk, "
                      "put your copy of the backups there, or make one")
    utils.work_inside(work.backup)
    read_passphrase()
    try:
        utils.check_owned_directory(ENCRYPTED)
        check_key()
    except Failure as error:  # a rescue is no time for manners
        log.warning(f"what is read may be somebody else's: {error}")
    with ExitStack() as stack:
        backup = stack.enter_context(utils.opened("."))
        own = stack.enter_context(reader_directory(backup))
        reader = Reader(**vars(work), sets=link_sets(own, backup, choose, signatures))
        stack.callback(os.fchdir, backup)  # where own is, whatever its path leads to by then
        os.chdir(own)
        stack.enter_context(gpg_home(reader))
        if all(is_of_another_key(reader, found) for found in reversed(reader.sets)):
            raise Failure(wrong_key_of(reader))
        yield reader


@contextmanager
def reader_directory(backup: int) -> Iterator[Path]:
    """Make a directory for a command that reads: in backup/, or in TMPDIR if that has more room.

    It gets a link to the key. backup: the descriptor of backup/, the working directory.
    """
    name = f"{READER_PREFIX}{secrets.token_hex(4)}"
    key = utils.path_of(backup) / KEY
    with ExitStack() as stack:
        own = Path(tempfile.gettempdir(), name)
        here, there = (shutil.disk_usage(place).free for place in (Path(), own.parent))
        if here >= min(TEMPORARY_BYTES, there):
            with suppress(OSError):  # as on a disk for reading only, or that has no links
                near = stack.enter_context(utils.own_directory(Path(name)))
                os.symlink(key, near / KEY)
                own = near
        if own.is_absolute():
            stack.enter_context(utils.own_directory(own))
            os.symlink(key, own / KEY)
        yield own


def link_sets(own: Path, backup: int, choose: Choice, signatures: bool) -> Sets:
    """Fill the directory of a command that reads. Returns the sets that are in it.

    backup: the descriptor of backup/. choose, signatures: see reader_of.
    """
    (own / TEMPORARY).mkdir()
    while True:
        for directory in (ENCRYPTED, CACHE, ARCHIVE):
            utils.remove(own / directory)
            (own / directory).mkdir()
        sets = choose(complete_sets())
        names = {name for found in sets for name in found.files
                 if signatures or ".sigtar." not in name}
        # In the archive directory manifests are not compressed, signatures are.
        notes = [path for path in ARCHIVE.glob("*")
                 if f"{path.name.removesuffix('.gz')}.gpg" in names]
        try:
            for path in [*notes, *(ENCRYPTED / name for name in names)]:
                link(path, own, backup)
            return sets
        except FileNotFoundError:  # a backup is just pruning
            continue


def link(path: Path, own: Path, backup: int) -> None:
    """Link a file into the directory of a command that reads.

    path: relative, it is the same there. backup: see link_sets.

    Where the file system allows no hard link it is a symbolic one, which a backup can
    prune away.
    """
    try:
        os.link(path, own / path)
    except FileNotFoundError:
        raise
    except OSError as error:
        log.debug(f"what a backup prunes meanwhile cannot be read: {error}")
        os.symlink(utils.path_of(backup) / path, own / path)


def prefer_encrypted_manifests(reader: Reader, exit_code: int) -> None:
    """Put the manifests of encrypted/ into the archive directory, where they can be opened.

    What is there bears no checksum, and by a shorter one a restore lacks files, exit code 0
    (seen: 0.8.22, 3.2.1); that duplicity opens them itself fails with 3.0.6. Raises Failure
    with the exit code where neither is whole: it names no volumes, or not all that are there.
    """
    fresh = TEMPORARY / "manifest"
    for found in reader.sets:
        plain = ARCHIVE / Path(found.manifest).stem
        answer = run_gpg(reader, found.manifest, output=fresh)
        if answer.exit_code == 0:
            os.replace(fresh, plain)
        checksums: dict[str, str] = {}
        take_line = take_checksums(found.manifest, checksums)
        with suppress(FileNotFoundError), plain.open(errors="surrogateescape") as lines:
            for line in lines:
                take_line(line.rstrip("\n"))
        named = {volume for volume, checksum in checksums.items() if checksum}
        if not named or answer.exit_code and not named >= found.volumes:
            raise Failure(f"{reader.backup / ENCRYPTED / found.manifest} cannot be used; "
                          f"{PUT_BACK}: gpg ended with {answer}", exit_code)
        for volume in sorted(named - found.volumes):
            log.warning(f"{reader.backup / ENCRYPTED / volume} is missing; {PUT_BACK}")


def verify(reader: Reader) -> dict[str, str]:
    """Check every file of every backup.

    Volumes are checked against the checksums in their manifest, manifests and signatures
    by gpg's own check. Returns what is wrong with each, by name, empty if nothing is.
    """
    results: dict[str, str] = {}
    checked, sizes = 0, utils.regular_files(ENCRYPTED)
    total = sum(found.size for found in reader.sets)
    with progress() as draw:
        for found in reader.sets:
            for name, why in check_set(reader, found):
                results[name] = why
                checked += sizes.get(name, 0)
                if draw:
                    draw(checked, total)
    return results


def missing_sets(keep_days: int) -> list[str]:
    """Return which sets are missing or lead nowhere, and print which are unfinished.

    keep_days: see kept_since.
    """
    complete, newest_set = complete_sets(), new_record().newest_set
    newest = max([newest_set or "", *(found.stamp for found in complete)])
    kept = kept_since(keep_days, complete)
    useless = []
    for found in loose_sets(read_sets()):
        if found.stamp > newest:
            print(f"the backup of {found.stamp} is unfinished: it is being made, or the next run "
                  "deletes it")
        elif found.date >= kept:
            useless.append(found.stamp)
    wrong = list(filter(None, [newest_lost(complete, newest_set)]))
    if useless:
        wrong.append("from these nothing can be restored, for they lack their manifest or what "
                     f"they build on: {first_of(useless)}; put it back from your copy elsewhere")
    return wrong


def check_set(
    work: Work, found: BackupSet, shares: Collection[int] = range(SHARES)
) -> Iterator[tuple[str, str]]:
    """Check the files of a complete set, see verify.

    shares: what is in these only, but the manifest, and whether the volumes are there, always.
    Yields each file's name, and what is wrong with it, empty if nothing is.
    """
    def is_asked(name: str) -> bool:
        return zlib.crc32(name.encode()) % SHARES in shares

    checksums: dict[str, str] = {}
    why = gpg_check(work, found.manifest, take_checksums(found.manifest, checksums))
    if not why and not checksums:
        why = "is damaged"
    yield found.manifest, why
    for name in filter(is_asked, found.metadata[1:]):
        yield name, gpg_check(work, name)
    if why:
        return  # nothing tells what its volumes should be
    for name in sorted(checksums.keys() | found.volumes):
        if name not in found.volumes:
            yield name, "is missing"
        elif name not in checksums:
            yield name, "is not in its set's manifest"
        elif is_asked(name):
            log.debug(f"checking {work.backup / ENCRYPTED / name}")
            try:
                good = utils.sha1_of(ENCRYPTED / name) == checksums[name]
                yield name, "" if good else "is damaged: its checksum is not that in the manifest"
            except OSError as error:
                yield name, f"cannot be read: {error.strerror}"


def gpg_check(work: Work, name: str, take_text: utils.TakeLine | None = None) -> str:
    """Return what is wrong with a file that gpg opens, empty if nothing is. See run_gpg."""
    log.debug(f"checking {work.backup / ENCRYPTED / name}")
    answer = run_gpg(work, name, take_text)
    if is_wrong_key(answer):
        return "was made with another key than this, or it is damaged"
    return "is damaged" if answer.exit_code else ""


def take_checksums(name: str, checksums: dict[str, str]) -> utils.TakeLine:
    """Return a function that takes the lines of a manifest, which may be millions.

    It adds to checksums the SHA-1 of each volume by the volume's name, empty if there is
    none. name: the manifest's.
    """
    volume = ""

    def take_line(line: str) -> None:
        nonlocal volume
        if match := re.fullmatch(r"Volume (\d+):", line):
            volume = name.replace(".manifest.", f".vol{match[1]}.difftar.")
            checksums[volume] = ""
        elif match := re.fullmatch(r"    Hash SHA1 ([0-9a-f]{40})", line):
            checksums[volume] = match[1]

    return take_line


def compare(reader: Reader, excluded: Sequence[str]) -> list[str]:
    """Compare the newest backup with the live files, contents included.

    excluded: see excluded_of; what is now and was not then is no difference. Returns the
    differences, a sentence each. Raises Failure (exit code 3).
    """
    prefer_encrypted_manifests(reader, 3)
    answer, lines = run_duplicity(reader, duplicity_command(
        "verify", "--compare-data", *exclusions(reader, excluded), "--allow-source-mismatch",
        TARGET, str(reader.root)))
    different = [line.removeprefix(". ") for line in lines
                 if line.startswith(". ") and "ifference found: " in line]
    if answer.exit_code not in (0, 1) or answer.exit_code and not different:
        raise Failure(explain("verify", answer), 3)
    missing = tuple(f"Difference found: File {printable(path)}/" for path in excluded)
    return [line for line in different
            if not f"{line.removesuffix(' is missing')}/".startswith(missing)]


def list_files(reader: Reader) -> list[str]:
    """Return the paths in a backup, in order, escaped. reader: of a chain. Raises Failure."""
    if unsigned := [found.signatures for found in reader.sets if not found.signed]:
        raise Failure(f"{reader.backup / ENCRYPTED / unsigned[0]} is missing: the files cannot "
                      f"be listed, but restored; {PUT_BACK}")
    remove_damaged_notes(reader)
    stamp = reader.sets[-1].stamp
    answer, lines = run_duplicity(
        reader, duplicity_command("list-current-files", "-t", stamp, TARGET))
    if answer.exit_code:
        raise Failure(explain("list-current-files", answer))
    names = []
    for line in lines:
        if match := re.fullmatch(r"INFO 10 \S+ '(.*)' \S+", line):
            # Whatever is not ASCII duplicity escapes (its util.py, 0.8.22 and 3.2.1).
            escaped = match[1].encode("ascii", "backslashreplace")
            names.append(printable(escaped.decode("unicode-escape")))
        elif re.match(r"\. [\"']\w{3} \w{3} [ \d]\d ", line):
            # Records that were lost, for names that are not UTF-8, are the date in 24
            # characters and the name, as Python shows a string.
            with suppress(ValueError, SyntaxError):  # a name can look like one
                names.append(printable(str(ast.literal_eval(line[2:]))[25:]))
    return sorted(names)


def set_of_time(sets: Sets, time: str, now: datetime) -> BackupSet:
    """Return the set that was the newest at a time. sets: the complete ones, oldest first.

    time: an age such as 3D or 1D12h, where a month (M) has 30 days, or what dateutil's
    isoparse reads with year, month and day, in local time unless it tells a zone. now:
    the time, with its zone. Raises Failure: exit code 2 if that is no time, 1 if it is
    before the first set, of which duplicity (0.8.22, 3.2.1) would say nothing and take
    that one.
    """
    asked: datetime | None = None
    with suppress(ValueError, OverflowError):
        if re.fullmatch(r"(\d+[smhDWMYdwy])+", time):
            ages = re.findall(r"(\d+)(.)", time)
            seconds = sum(int(number) * AGE_SECONDS[unit] for number, unit in ages)
            asked = now - timedelta(seconds=seconds)
        elif re.match(r"\d{4}-?\d\d-?\d\d", time):
            asked = isoparse(time).astimezone()
    if asked is None:
        raise Failure(f"{printable(time) or 'nothing'} is not a time; give one such as "
                      "3D, 2026-11-20 or 2026-11-20T03:00:00", 2)
    older = [found for found in sets if found.date <= asked]
    if not older:
        dates = ", ".join(found.date.astimezone().isoformat() for found in sets)
        raise Failure(f"there is no backup as old as {printable(time)}; name the time of "
                      f"one of these, or a later one: {dates}")
    return older[-1]


def chain_at(sets: Sets, time: str | None = None) -> list[BackupSet]:
    """Return the set that is the newest, or was at a time, and before it those that it needs.

    sets: the complete ones. time: see set_of_time. Raises Failure.
    """
    chains = {found: chain[:place] for chain in chains_of(sets)
              for place, found in enumerate(chain, 1)}
    whole = [found for found in sets if found in chains]
    if not whole:
        raise Failure(f"no backup in {ENCRYPTED.absolute()} leads back to a full one; put your "
                      "copy of what is missing there")
    now = utc_now()
    taken, asked = (found[-1] if time is None else set_of_time(found, time, now)
                    for found in (whole, sets))
    if asked != taken:
        log.warning(f"the backup of {asked.date.astimezone()} lacks what it builds on, see "
                    f"--verify: that of {taken.date.astimezone()} is taken")
    return chains[taken]


def restore(reader: Reader, wanted: str, place: int) -> bool:
    """Restore a backup, or one directory or file of it. Returns whether that is in the backup.

    reader: of a chain. wanted: a relative path, empty for everything. place: the descriptor
    of a directory; what is in a directory goes into it, a file goes there by its name.
    Raises Failure.
    """
    prefer_encrypted_manifests(reader, 1)
    directory, chain = utils.path_of(place).readlink(), reader.sets
    # Duplicity (0.8.22, 3.2.1) takes what is in a name as $NAME for a variable, but only once.
    part = ["-r", "$WANTED"] if wanted else []
    # What others do in a directory that is theirs leads nowhere: duplicity writes to one
    # of root's, through a descriptor.
    fresh = f".restoring-{secrets.token_hex(4)}"
    os.mkdir(fresh, 0o700, dir_fd=place)
    with utils.opened(fresh, parent=place) as descriptor:
        target = utils.path_of(descriptor) / "restored"
        log.info(f"restoring {printable(wanted) or 'everything'} to {directory}")
        command = ["env", f"WANTED={wanted}", *duplicity_command(
            "restore", "-t", chain[-1].stamp, *part, TARGET, str(target))]
        try:
            check_own(descriptor, directory / fresh)
            with progress() as draw:
                answer, lines = run_duplicity(
                    reader, command, watch_restore(chain, draw, not part))
            if answer.exit_code == 19 or not answer.exit_code and not os.path.lexists(target):
                utils.remove("restored", descriptor)  # 3.2.1 leaves an empty one
                return False
            if answer.exit_code:
                raise Failure(explain("restore", answer))
            status = move_up(descriptor, place, os.path.basename(wanted))
        finally:
            try:
                os.rmdir(fresh, dir_fd=place)
            except OSError:  # it is not empty
                log.warning(f"what was restored until then is in {directory / fresh}")
    if stat.S_ISDIR(status.st_mode):
        utils.set_metadata(".", status, place)
    if lost := read_machine_log(lines)[1]:  # the disk refused something (seen: 0.8.22)
        raise Failure(f"not all could be restored to {directory}; try another disk: "
                      f"{first_of(lost)}")
    log.info(f"restored to {directory}")
    return True


def check_own(directory: int, path: Path) -> None:
    """Check that a directory which was just made by its path is what was opened. Raises Failure.

    What root makes in it belongs to who made it, on disks of other owners, too. directory:
    its descriptor.
    """
    os.mkdir("own", dir_fd=directory)
    own = os.stat("own", dir_fd=directory, follow_symlinks=False).st_uid
    os.rmdir("own", dir_fd=directory)
    if own != os.fstat(directory).st_uid:
        raise Failure(f"somebody has put another directory in place of {path}; restore to where "
                      "only root can write")


def watch_restore(chain: Sets, draw: Draw | None, all_of_it: bool) -> utils.Watch:
    """Return a watch on duplicity that draws how much of a chain's volumes it is done with.

    A copy of each is in its temporary directory for as long as it reads it (seen: 0.8.22,
    3.2.1). all_of_it: whether it will need every volume.
    """
    sizes = {(ENCRYPTED / name).stat().st_size for found in chain for name in found.volumes}
    begun: set[int] = set()

    def watch(process: int) -> None:
        if draw:
            there = {size for place in TEMPORARY.glob("*-tempdir")
                     for size in utils.regular_files(place).values()}
            begun.update(there & sizes)
            draw(sum(begun - there), sum(sizes) if all_of_it else None)

    return watch


@contextmanager
def restore_directory(work: Work, name: str) -> Iterator[int]:
    """Make the directory to restore to, or take an empty one, and keep it open and locked.

    Yields its descriptor. If the block fails and it was made and is empty, it goes.
    Raises Failure (exit code 2) or OSError.
    """
    directory = Path(os.path.abspath(name).replace("//", "/"))
    if directory == work.root or directory.is_relative_to(work.backup):
        raise Failure(f"{directory} is STORAGE_ROOT itself, or in its backup/; name another "
                      "directory", 2)
    made = not os.path.lexists(directory)
    with ExitStack() as stack:
        parent = stack.enter_context(utils.opened(os.path.realpath(directory.parent)))
        # Who put a link there may want root to write where it leads.
        if utils.path_of(parent).readlink() != directory.parent or directory.is_symlink():
            raise Failure(f"{directory} leads through a symbolic link to "
                          f"{os.path.realpath(directory)}; name that, if it is what you mean", 2)
        with utils.whole_path_told(parent):
            if made:
                os.mkdir(directory.name, 0o700, dir_fd=parent)
        place = stack.enter_context(utils.opened(directory.name or ".", parent=parent))
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(f"another restore to {directory} is under way; wait for it to end, or "
                          "name another directory", 2) from error
        except OSError as error:  # NFS locks no directory
            log.debug(f"{directory} is not locked: {error}")
        if os.listdir(place):
            raise Failure(f"{directory} is there already and not empty; name a "
                          "directory that does not exist yet", 2)
        try:
            yield place
        except BaseException:
            if made:
                with suppress(OSError):
                    os.rmdir(directory.name, dir_fd=parent)
            raise


def move_up(source: int, place: int, name: str) -> os.stat_result:
    """Put what was restored, `restored` in source, in its place.

    place gets a directory's entries, a file goes into it by name. source, place: descriptors.
    Returns the status of what was restored.
    """
    status = os.stat("restored", dir_fd=source, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.rename("restored", name, src_dir_fd=source, dst_dir_fd=place)
        return status
    with utils.opened("restored", parent=source) as restored:
        for child in os.listdir(restored):
            os.rename(child, child, src_dir_fd=restored, dst_dir_fd=place)
    os.rmdir("restored", dir_fd=source)
    return status


def near_paths(names: Sequence[str], wanted: str) -> list[str]:
    """Return the entries of the directory nearest to a path that is not there, 20 at most.

    names: all paths there are.
    """
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
    check_mounts(night)
    with ExitStack() as stack:
        if os.path.lexists(night.backup):
            utils.work_inside(night.backup)
            disk = Path()
        else:  # what a directory looks like in which nothing was ever made
            os.chdir(stack.enter_context(tempfile.TemporaryDirectory(dir=RUN_DIRECTORY)))
            stack.callback(os.chdir, "/")
            disk = night.root
        check_surroundings(night)
        sets = complete_sets()
        if sets:
            check_clock(night, sets)
        record = new_record()
        check_nothing_lost(night, record, force_full)
        dead = dead_files()
        freed = sum(path.stat().st_size for path in [*dead, *ENCRYPTED.glob("*.enc")]
                    if path.is_file())
        broken = broken_files(record.files, night.keep_days)
        reason = reason_for_full(sets, night.now, broken, force_full)
        kind = "full" if reason else "incremental"
        if lacking := lack_of_room(night, sets, kind, freed, disk):
            raise Failure(lacking)
        print(f"make a full backup: {reason}" if reason else "make an incremental backup")
        if PLAIN.exists():
            print(f"move {printable(str(PLAIN.absolute()))} to {printable(str(night.migrated))}")
        for path in dead:
            print(f"delete {printable(str(path.absolute()))}")
        for name in night.excluded:
            print(f"leave out {printable(name)}")
        services = utils.service_manager(night.environment)
        for line in services.running(night.services):
            print(f"stop and start {line}")
        for command in (set_command(night, kind, place_of_copy(night, disk) / "tree"),
                        pruning_command("remove-older-than", f"{night.keep_days}D"),
                        pruning_command("cleanup")):
            print(f"run {printable(shlex.join(command))}")


# Messages and progress

CLEAR_LINE = "\r\x1b[K"
PROGRESS = logging.INFO + 1


class _Prefixed(logging.Formatter):
    """Begins every line with the program's name, on a terminal a step with the time, too.

    What a terminal could mistake is escaped. A line of progress is left as it is.
    """

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno == PROGRESS:
            return CLEAR_LINE + record.getMessage()
        terminal = sys.stderr.isatty()
        step = terminal and record.levelno <= logging.INFO
        clock = time.strftime("%H:%M:%S ", time.localtime(record.created)) if step else ""
        lines = "".join(f"backup: {clock}{printable(line)}\n"
                        for line in super().format(record).split("\n"))
        return CLEAR_LINE + lines if terminal else lines


def listen_to_messages() -> logging.handlers.QueueListener:
    """Have messages printed on standard error by a thread, so that none holds the run.

    Progress is passed over while a terminal takes nothing, as after Ctrl-S.
    """
    logging.raiseExceptions = False  # a standard error that is gone does not end a backup
    handler = logging.StreamHandler()
    handler.terminator = ""
    handler.setFormatter(_Prefixed())
    handler.addFilter(lambda record: record.levelno != PROGRESS
                      or bool(select.select([], [sys.stderr], [], 0)[1]))
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    logging.getLogger().addHandler(logging.handlers.QueueHandler(messages))
    listener = logging.handlers.QueueListener(messages, handler)
    # In the background a terminal may suspend who writes to it, with mail down.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
    try:
        listener.start()
    except RuntimeError:  # no thread can be had: they are printed at once
        logging.getLogger().addHandler(handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTTOU])
    return listener


@contextmanager
def progress() -> Iterator[Draw | None]:
    """Yield a function that draws how far something has come.

    It takes the bytes done, and of how many if that is known, and draws one line over
    and over again. None where that is not to be shown: without a terminal, and with -v.
    """
    if log.isEnabledFor(logging.DEBUG) or not sys.stderr.isatty():
        yield None
        return

    def draw(done: int, total: int | None) -> None:
        text = human_size(max(0, min(done, total or done)))
        log.log(PROGRESS, f"        {text}" + (f" of {human_size(total)}" if total else ""))

    try:
        yield draw
    finally:
        log.log(PROGRESS, "")


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
         run failed, or the newest chain is damaged; for --verify: damage or
         (with --compare) differences
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
    """Return the options of a command line.

    Raises Failure (exit code 2) if they are wrong or do not go together.
    """
    parser = Parser(
        prog="backup.py", epilog=EPILOG, allow_abbrev=False,
        description="Back up a mail server's user data with duplicity, encrypted.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--full", action="store_true", help="make a full backup")
    add("--dry-run", action="store_true", help="show what would be done, touch nothing")
    command = parser.add_mutually_exclusive_group().add_argument
    command("--status", action="store_true", help="show what backups there are")
    form = parser.add_mutually_exclusive_group().add_argument
    form("--json", action="store_true", help="with --status: for programs")
    form("--html", action="store_true", help="with --status: as a web page")
    command("--verify", action="store_true", help="check every backup file")
    add("--compare", action="store_true", help="with --verify: also against the live files")
    command("--list", action="store_true", help="list the files in a backup")
    command("--restore", metavar="DIR",
            help="restore into DIR, which does not exist yet or is empty")
    add("--path", help="with --restore: only this, relative to STORAGE_ROOT")
    add("--time", help="with --list, --restore: as of TIME, such as 3D or '2026-11-20 03:00:00'")
    add("--config", metavar="FILE", type=Path, help=f"settings (default: {SETTINGS_FILE})")
    add("--storage-root", metavar="DIR",
        help="back up DIR, without a settings file; its owner is STORAGE_USER")
    add("-v", "--verbose", action="store_true", help="show the steps and what duplicity says")
    add("--version", action="version", version=f"backup.py {VERSION}")
    options = parser.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value not in (None, False)}
    if any(value in ("", []) for value in vars(options).values()):  # [] is argparse's for `--`
        parser.error("an option has no value")
    command_name = (given & {"status", "verify", "list", "restore"} or {"a backup"}).pop()
    belongs = {"full": "a backup", "dry_run": "a backup", "json": "--status", "html": "--status",
               "compare": "--verify", "path": "--restore", "time": "--list and --restore"}
    for option in sorted(given & belongs.keys()):
        if command_name not in belongs[option]:
            parser.error(f"--{option.replace('_', '-')} is an option of {belongs[option]}")
    return options


def read_settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of the file, or of --storage-root alone.

    Raises Failure (exit code 2) if they cannot be had.
    """
    if options.storage_root is None:
        return utils.load_environment(options.config or SETTINGS_FILE)
    settings = utils.load_environment(options.config) if options.config else {}
    root = os.path.abspath(options.storage_root)
    try:
        owner = pwd.getpwuid(os.stat(root).st_uid).pw_name
    except OSError as error:
        raise Failure(f"cannot read {printable(root)}: {error.strerror}; name another "
                      "directory with --storage-root", 2) from error
    except KeyError:  # as on a rescue system, which does not need it to read
        owner = ""
    return {**settings, "STORAGE_ROOT": root, "STORAGE_USER": owner}


def failure_of(error: BaseException) -> Failure | Interrupted:
    """Return what the operating system refused, or nobody foresaw, as a sentence.

    A failure is returned as it is, and so is a signal.
    """
    if isinstance(error, (Failure, Interrupted)):
        return error
    if not isinstance(error, OSError):
        log.debug("where it happened", exc_info=error)
        return Failure(f"something unforeseen happened, {type(error).__name__}: {error}; "
                       "run this again with -v and tell what it prints")
    path = utils.path_in(error)
    why = f"{path}: {error.strerror}" if path else str(error.strerror or error)
    refused = isinstance(error, PermissionError) and os.geteuid() != 0
    return Failure(f"{why}; {'run it as root' if refused else 'see to that and run this again'}")


def run(arguments: Sequence[str]) -> int:
    """Do what the command line asks for.

    Returns the exit code. Raises Failure, Interrupted or OSError.
    """
    options = parse_arguments(arguments)
    if options.verbose or sys.stderr.isatty():
        logging.getLogger().setLevel(logging.DEBUG if options.verbose else logging.INFO)
    reads = options.verify or options.list or options.restore
    if not options.status and os.geteuid() != 0:
        raise Failure("only root can read all mail and the backups; run it as root",
                      1 if reads else 2)
    settings = read_settings(options)
    if options.status:
        return show_status(settings, options.json, options.html)
    if options.verify:
        return show_damage(settings, options.compare)
    if reads:
        list_or_restore(options, settings)
        return 0
    if options.dry_run:
        show_plan(night_of(settings), options.full)
        return 0
    with utils.ended_in_good_order():
        return perform_backup(settings, options.full)


def show_damage(settings: Settings, with_live_files: bool) -> int:
    """Verify, and tell what is wrong. Returns the exit code: 0, or 3 for damage or differences.

    with_live_files: compare these, too. Raises Failure or OSError.
    """
    keep_days = keep_days_of(settings)
    with utils.ended_in_good_order(), reader_of(settings) as reader:
        known = read_last_verify(reader.backup / LAST_VERIFY)["damaged"]
        results = verify(reader)
    utils.raise_if_interrupted()
    print(f"checked {len(reader.sets)} backup sets: {len(results)} files, "
          f"{human_size(sum(found.size for found in reader.sets))}")
    # Now backup/ is the working directory again.
    broken = broken_files(new_record().files, keep_days)
    results.update((name, why) for name, why in broken.items()
                   if why == "is missing" and not results.get(name))  # it may just have gone
    with suppress(OSError):  # as on a disk that is mounted for reading only
        record_checks(range(SHARES), results, known)
    wrong = [f"{reader.backup / ENCRYPTED / name} {why}; fetch it from your copy elsewhere "
             "before the next night" for name, why in results.items() if why]
    wrong += missing_sets(keep_days)
    for sentence in wrong:
        log.error(sentence)
    if with_live_files:
        with utils.ended_in_good_order(), reader_of(settings, chain_at, signatures=False) as reader:
            different = compare(reader, excluded_of(settings))
        for sentence in different:
            log.error(sentence)
        wrong += different
    return 3 if wrong else 0


def name_backup(chain: Sets) -> None:
    """Say which backup is read, the last of a chain."""
    log.warning(f"backup of {chain[-1].date.astimezone()}")


def list_or_restore(options: argparse.Namespace, settings: Settings) -> None:
    """List the files in a backup, or restore it. Raises Failure or OSError."""
    choose = functools.partial(chain_at, time=options.time)
    with utils.ended_in_good_order(), ExitStack() as stack:
        if options.restore:
            work = work_of(settings)
            place = stack.enter_context(restore_directory(work, options.restore))
            path = f"{os.path.normpath(options.path or '.')}/".removeprefix(f"{work.root}/")
            wanted = "" if path == "./" else path.strip("/")
            with (reader_of(settings, choose, signatures=False) as reader,
                  utils.whole_path_told(place)):
                name_backup(reader.sets)
                if restore(reader, wanted, place):
                    return
        with reader_of(settings, choose) as reader:
            if options.time and not options.restore:
                name_backup(reader.sets)
            names = list_files(reader)
        if options.restore:
            raise Failure("\n    ".join([f"{printable(wanted)} is not in the backup; there is:",
                                        *near_paths(names, wanted)]))
    utils.raise_if_interrupted()
    for name in names:  # who reads them may be slow, and nothing is held meanwhile
        print(name)


def main(arguments: Sequence[str]) -> int:
    """Run the command line, say what went wrong in one sentence, and return the exit code.

    arguments: without the program's name.
    """
    utils.reset_signals()
    utils.open_closed_streams()
    listener = listen_to_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for what the terminal cannot show
    try:
        utils.allow_any_depth()
        code = run(arguments)
        if code != 5:  # which comes before any other
            utils.raise_if_interrupted()
        sys.stdout.flush()
    except SystemExit:  # of --help and --version
        code = 0
    except BrokenPipeError:  # nobody reads on: nothing is left to say
        code = 128 + signal.SIGPIPE
    except (Exception, Interrupted) as error:
        failure = failure_of(error)
        log.error(failure)
        code = failure.exit_code
    utils.give_up_if_broken(sys.stdout)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
    signal.alarm(UNSAID_SECONDS)  # nobody may take what is still to be said
    with suppress(RuntimeError):  # where no thread could be had nothing is
        listener.stop()
    utils.give_up_if_broken(sys.stderr)
    signal.alarm(0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
