"""Random stories of nights and mishaps, with a hook that mirrors encrypted/ and deletes there, too.

Whatever happens, no backup that is young leaves the mirror before a run has named it, and what a
restore brings back is what the tree held.
"""

import os
import pwd
import random
import re
import secrets
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import backup
import utils
from conftest import USER, Entry, Store, tree_of
from test_services import programs_of, wait_for

pytestmark = pytest.mark.long

FIRST_NIGHT = datetime(2026, 1, 1, 3, tzinfo=timezone.utc)
KEEP_DAYS = 2
NIGHTS = 9
STORIES = int(os.environ.get("STORIES", "10"))
FIRST_STORY = int(os.environ.get("FIRST_STORY", "1"))

MIRROR = """#!/bin/sh
rsync -rt --delete "$STORAGE_ROOT/backup/encrypted/" %s
"""

# Real duplicity, but it fails to make a set if there is a file `fails`, and after an action what
# the file `loses-ACTION` names is gone.
MOODY_DUPLICITY = """#!/bin/sh
case $1 in full|incremental)
    if [ -e MOODS/fails ]; then rm MOODS/fails; exit 50; fi
esac
setpriv --pdeathsig KILL REAL "$@" || exit $?
if [ -e "MOODS/loses-$1" ]; then
    (cd encrypted && xargs -r rm -f) < "MOODS/loses-$1"
    rm "MOODS/loses-$1"
fi
"""


@dataclass
class Story:
    """What has happened to a store so far.

    mirror: what the hook copies to. moods: what duplicity is to do, see MOODY_DUPLICITY. now: the
    night that comes. known: the files of encrypted/ after the last good run. lost: those of them
    that are gone by a mishap, and of which no run has told. named: those of which one has.
    originals: the tree by the stamp of its backup. told: what happened, and what runs said.
    """

    store: Store
    mirror: Path
    moods: Path
    dice: random.Random
    now: datetime = FIRST_NIGHT
    known: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    originals: dict[str, dict[str, Entry]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        """The names of the files in encrypted/."""
        return sorted(os.listdir(self.store.encrypted)) if self.store.encrypted.exists() else []

    @property
    def filled(self) -> set[str]:
        """The names of those that are not empty."""
        return {name for name in self.files if (self.store.encrypted / name).stat().st_size}

    def pick(self) -> list[str]:
        """Return some of the files, of one set mostly."""
        if not self.files:
            return []
        stamp = own_stamp(self.dice.choice(self.files))
        of_set = [name for name in self.files if own_stamp(name) == stamp]
        return self.dice.sample(of_set, self.dice.choice([1, 1, 1, len(of_set)]))


def own_stamp(name: str) -> str:
    """Return when the set was made to which a file belongs."""
    return backup.stamp_of(Path(name))


def is_old(name: str, names: set[str], now: datetime) -> bool:
    """Tell whether a file may be pruned: its set is old, and all that builds on that.

    names: all that there were.
    """
    sets = filter(None, (backup.key_of(other) for other in names if ".manifest." in other))
    following = {previous: stamp for stamp, previous in sorted(sets)}
    newest = own_stamp(name)
    while newest in following:
        newest = following[newest]
    age = now - backup.stamp_date(newest)
    return age > timedelta(days=KEEP_DAYS) - timedelta(minutes=5)


def lose(story: Story) -> None:
    for name in story.pick():
        (story.store.encrypted / name).unlink()


def empty(story: Story) -> None:
    for name in story.pick():
        os.truncate(story.store.encrypted / name, 0)


def flip(story: Story) -> None:
    """Flip a bit, with the time stamp put back, as a disk does."""
    for name in story.pick()[:1]:
        path = story.store.encrypted / name
        status, content = path.stat(), bytearray(path.read_bytes())
        if content:
            content[story.dice.randrange(len(content))] ^= 1 << story.dice.randrange(8)
            path.write_bytes(content)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def fetch(story: Story) -> None:
    """Put back what the mirror has, and have all checked."""
    story.store.run("rsync", "-rt", "--checksum", f"{story.mirror}/", story.store.encrypted)
    if story.files and (story.store.backups / "secret_key.txt").exists():
        run(story, "--verify")


def lose_cache(story: Story) -> None:
    utils.remove(story.store.backups / "cache")


def lose_some_of_cache(story: Story) -> None:
    paths = sorted((story.store.backups / "cache").glob("*/*"))
    for path in story.dice.sample(paths, len(paths) // 2):
        path.unlink()


def lose_checks(story: Story) -> None:
    (story.store.backups / "last-verify.json").unlink(missing_ok=True)


def fail(story: Story) -> None:
    (story.moods / "fails").touch()


def lose_meanwhile(story: Story) -> None:
    action = story.dice.choice(["full", "incremental", "remove-older-than", "cleanup"])
    (story.moods / f"loses-{action}").write_text("\n".join(story.pick()))


def sleep_long(story: Story) -> None:
    story.now += timedelta(days=story.dice.choice([1, 3, 8]))


MISHAPS: list[Callable[[Story], None]] = [
    lose, lose, empty, flip, fetch, lose_cache, lose_some_of_cache, lose_checks, fail,
    lose_meanwhile, sleep_long]


def run(story: Story, *arguments: str, seconds: float = 0) -> "subprocess.CompletedProcess[str]":
    """Run backup.py at the story's time, and kill it after so many seconds, 0: not at all."""
    killed = ["timeout", "--signal=KILL", f"{seconds:.2f}"] if seconds else []
    result = story.store.run("faketime", story.now.strftime("%Y-%m-%d %H:%M:%S"), *killed,
                             *story.store.command(*arguments), exit_code=None)
    wait_for(lambda: programs_of(story.store) == [])
    story.told += [f"{story.now}: {' '.join(arguments)} exit code {result.returncode}",
                   result.stderr]
    assert not re.search("^Traceback", result.stderr, re.MULTILINE), result.stderr
    for name in story.files:
        if ".manifest." in name:
            story.originals.setdefault(own_stamp(name), tree_of(story.store.root))
    return result


def night(story: Story, calm: bool = False, anew: bool = False) -> int:
    """Live through a night, and check what it did to the mirror and what it told.

    calm: it is not killed. anew: the admin begins anew, which a run that failed asks for.
    """
    tree = story.store.root / "mail/mailboxes/example.com/alice/cur"
    (tree / f"{story.now:%j}.M1P1.host:2,").write_bytes(secrets.token_bytes(2000))
    story.lost = {name for name in (story.lost | story.known) - story.filled
                  if name not in story.named and not is_old(name, story.known, story.now)}
    mirrored = set(os.listdir(story.mirror))
    full = ["--full"] if anew or story.dice.random() < 0.2 else []
    seconds = story.dice.uniform(0.3, 4) if not calm and story.dice.random() < 0.2 else 0
    result = run(story, *full, seconds=seconds)
    code, text = result.returncode, result.stderr
    gone = mirrored - set(os.listdir(story.mirror))
    for name in gone - story.named:
        assert is_old(name, story.known | mirrored, story.now), f"{name} left the mirror untold"
    if text or not seconds:
        utils.remove(story.moods)
        story.moods.mkdir()
        seen = {name for name in story.known | mirrored if name in text or own_stamp(name) in text}
        story.named = (story.named | seen if code else story.named) - set(story.files)
        story.lost -= seen
    if code in (0, 3):
        assert not story.lost, f"lost and not told: {story.lost}"
        story.known = story.filled
    if code == 0:
        assert set(os.listdir(story.mirror)) == set(story.files)
    story.now += timedelta(days=1)
    return code


def assert_restores(story: Story) -> None:
    """Restore every backup: each is what the tree held, but for what the story has damaged."""
    for found in backup.complete_sets(story.store.encrypted):
        stamp, target = found.stamp, story.store.scratch / f"restored-{found.stamp}"
        result = run(story, "--restore", str(target), "--time", found.date.isoformat())
        if result.returncode == 0 and "lacks what it builds on" not in result.stderr:
            restored, original = tree_of(target).items(), story.originals[stamp].items()
            assert not restored ^ original, f"{stamp} restores wrongly"


@pytest.mark.parametrize("number", range(FIRST_STORY, FIRST_STORY + STORIES))
def test_story(keyed: Store, number: int) -> None:
    """A random story, then calm nights, after which all is well again."""
    mirror, moods = keyed.scratch / "mirror", keyed.scratch / "moods"
    moods.mkdir()
    mirror.mkdir()
    os.chown(mirror, pwd.getpwnam(USER).pw_uid, -1)
    hook = keyed.backups / "after-backup"
    hook.write_text(MIRROR % mirror)
    hook.chmod(0o755)
    with keyed.settings.open("a") as stream:
        stream.write(f"BACKUP_KEEP_DAYS={KEEP_DAYS}\n")
    keyed.stand_in("duplicity", MOODY_DUPLICITY.replace("MOODS", str(moods)))
    (keyed.root / "archive").write_bytes(secrets.token_bytes(60_000))
    story = Story(keyed, mirror, moods, random.Random(number))
    try:
        for place in range(NIGHTS):
            if place:
                for mishap in story.dice.sample(MISHAPS, story.dice.choice([0, 1, 1, 2])):
                    story.told.append(f"  {mishap.__name__}")
                    mishap(story)
            if night(story) == 1 and story.dice.random() < 0.5:
                night(story, calm=True, anew=True)
        codes = [night(story, calm=True) for _ in range(KEEP_DAYS + 3)]
        assert codes[-1] == 0 or "--full" in story.told[-1], codes
        assert_restores(story)
    except AssertionError:
        print("\n".join(story.told))
        raise
