"""What is lost, full, damaged or misspelt is told, and mended where it can be.

The night that finds it names it, and leaves the good copy elsewhere alone.
"""

import json
import os
import shutil
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import backup
from conftest import PYTHON, FirstNight, OldNights, Result, Store, tree_of
from test_mirror import damage_inodes, disk

pytestmark = pytest.mark.long


def put_hook(store: Store) -> Path:
    """Have a hook after the backup that leaves a mark, and return where."""
    mark = store.scratch / "marks" / "mirrored"
    mark.parent.mkdir()
    mark.parent.chmod(0o777)
    hook = store.backups / "after-backup"
    hook.write_text(f"#!/bin/sh\ntouch {mark}\n")
    hook.chmod(0o755)
    return mark


def status(store: Store, exit_code: int) -> dict[str, Any]:
    """Return what --status tells programs."""
    told = json.loads(store.backup("--status", "--json", exit_code=exit_code).stdout)
    assert told["ok"] == (exit_code == 0)
    assert isinstance(told, dict)
    return told


def names(store: Store) -> set[str]:
    """Return the names of the backup files."""
    return {path.name for path in store.encrypted.iterdir()}


def damage(file: Path) -> bytes:
    """Flip a bit in the last byte of a file, and return what it held."""
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    return content


@pytest.mark.parametrize("lost", ["*", "*inc*", "*inc*manifest*"])
def test_lost_backups_are_no_first_night(
    keyed: Store, first_night: FirstNight, lost: str
) -> None:
    """Each night fails, mirrors nothing and deletes nothing, until they are back."""
    first_night(keyed, 2)
    mark, aside = put_hook(keyed), keyed.scratch / "aside"
    shutil.copytree(keyed.encrypted, aside)
    for path in keyed.encrypted.glob(lost):
        path.unlink()
    left = names(keyed)
    told = status(keyed, 3)["headline"]  # at once, before any night
    assert told.startswith("FAILED: the newest backup, of") and "is missing" in told
    for _ in range(2):
        result = keyed.backup(exit_code=1)
        assert "is missing from" in result.stderr and "run --full" in result.stderr
        assert names(keyed) == left and not mark.exists()
    assert "the newest backup" in keyed.backup("--dry-run", exit_code=1).stderr
    assert status(keyed, 3)["headline"].startswith("FAILED: the last run failed: the newest backup")
    shutil.copytree(aside, keyed.encrypted, dirs_exist_ok=True)
    assert keyed.backup().stderr == ""
    assert mark.exists() and status(keyed, 0)
    keyed.backup("--verify")


@pytest.mark.parametrize("before", ["a good night", "a failed night", "a night without them"])
def test_lost_backups_are_given_up(keyed: Store, first_night: FirstNight, before: str) -> None:
    """With --full a new beginning is made without them, and no night after it asks for them.

    What is lost is named, before a hook deletes it elsewhere, whether a night failed for it or not.
    """
    first_night(keyed)
    if before == "a failed night":
        keyed.stand_in("duplicity", '#!/bin/sh\n[ $1 != incremental ] || exit 50\nexec REAL "$@"\n')
        keyed.backup(exit_code=1)
        (keyed.bin / "duplicity").unlink()
    keyed.run("sh", "-c", f"rm {keyed.encrypted}/*")
    if before == "a night without them":
        keyed.backup(exit_code=1)
    mark = put_hook(keyed)
    errors = keyed.backup("--full", exit_code=3).stderr
    assert "manifest.gpg is missing" in errors and not mark.exists()
    assert keyed.backup().stderr == "" and mark.exists()


@pytest.mark.parametrize("below", ["", "/encrypted"])
def test_disk_that_is_not_mounted(keyed: Store, first_night: FirstNight, below: str) -> None:
    """Where /etc/fstab says that a disk belongs at or below backup/ nothing is made without it."""
    root = keyed.root.with_name("user data")
    keyed.root.rename(root)
    keyed.root.symlink_to(root)
    first_night(keyed)
    table = keyed.scratch / "fstab"
    place = str(keyed.backups).replace("user-data", r"user\040data") + below
    table.write_text(f"UUID=1 / ext4 defaults 0 1\n# a comment\n/dev/null {place} ext4 noauto\n")
    mounts = f'mount --bind {table} /etc/fstab && "$@"'
    before = names(keyed)
    for option in ("--full", "--dry-run"):
        result = keyed.run("unshare", "--mount", "sh", "-c", mounts, "sh", *keyed.command(option),
                           exit_code=1)
        assert f"{root}/backup{below} is not mounted" in result.stderr
    assert names(keyed) == before and keyed.calls("stop") == []
    assert "is not mounted" in status(keyed, 3)["headline"]
    mounts = f'mount --bind "{root}/backup{below}" "{root}/backup{below}" && {mounts}'
    keyed.run("unshare", "--mount", "sh", "-c", mounts, "sh", *keyed.command())


def test_disk_of_mail_that_is_not_mounted(keyed: Store) -> None:
    """Its mail is not taken for deleted; a disk that is mounted by hand may be missing."""
    table = keyed.scratch / "fstab"
    run = ["unshare", "--mount", "sh", "-c", f'mount --bind {table} /etc/fstab && "$@"', "sh",
           *keyed.command()]
    for place, options, exit_code in (("mail", "defaults,nofail", 1), ("mail", "ro,noauto", 0),
                                      ("mail", "noauto,x-systemd.automount", 1),
                                      ("../mail", "defaults", 0), ("", "defaults", 1)):
        table.write_text(f"UUID=1 {keyed.root}/{place} ext4 {options} 0 2\n")
        result = keyed.run(*run, exit_code=exit_code)
        assert (f"{keyed.root / place} is not mounted" in result.stderr) == (exit_code == 1)


def test_lost_volume_is_not_built_on(keyed: Store, first_night: FirstNight) -> None:
    """A full backup is made, the volume named and nothing mirrored: in that night only."""
    first_night(keyed)
    mark = put_hook(keyed)
    volume = next(keyed.encrypted.glob("*full.*vol1*"))
    volume.unlink()
    result = keyed.backup(exit_code=3)
    assert f"{volume} is missing" in result.stderr and "fetch it" in result.stderr
    assert result.stderr.count(volume.name) == 1
    assert [name for name in keyed.manifests() if "-full." in name] == keyed.manifests()
    assert len(keyed.manifests()) == 2 and not mark.exists()
    told = status(keyed, 0)
    assert told["last_verify"]["damaged"] == {volume.name: "is missing"}
    damaged = next(line for line in keyed.backup("--status").stdout.splitlines()
                   if line.startswith("Damaged:"))
    assert f"{volume.name} is missing; its backup, and those after it" in damaged
    assert volume.name in keyed.backup("--status", "--html").stdout
    assert keyed.backup().stderr == "" and mark.exists()
    assert "-inc." in keyed.manifests()[-1]


def test_rotten_file_is_found_within_seven_nights(keyed: Store, first_night: FirstNight) -> None:
    """Each night checks the share that was checked longest ago; what it finds it tells once."""
    first_night(keyed)
    mark, checks = put_hook(keyed), keyed.backups / "last-verify.json"
    first = json.loads(checks.read_text())["checked"]
    assert len(first) == 1
    keyed.backup("--verify")
    all_checked = json.loads(checks.read_text())["checked"]
    assert len(all_checked) == 7 and "Verified: " in keyed.backup("--status").stdout
    volume = next(keyed.encrypted.glob("*full.*vol1*"))
    content = damage(volume)
    import backup
    share = str(zlib.crc32(volume.name.encode()) % 7)
    checks.write_text(json.dumps({
        "checked": {**all_checked, share: "2026-01-01T00:00:00+00:00"}, "damaged": {}}))
    result = keyed.backup(exit_code=3)
    assert f"{volume} is damaged" in result.stderr and not mark.exists()
    assert "-inc." in keyed.manifests()[-1]
    told = status(keyed, 3)
    assert told["headline"].startswith(f"FAILED: damaged: {volume.name}, the next run makes a full")
    assert backup.should_force_full({"STORAGE_ROOT": str(keyed.root)})
    assert told["last_verify"]["checked"][share] > "2026-02"
    assert os.stat(checks).st_mode & 0o777 == 0o640
    assert os.stat(checks).st_gid == os.stat(keyed.encrypted).st_gid
    assert keyed.backup().stderr == "" and mark.exists()
    assert "-full." in keyed.manifests()[-1] and status(keyed, 0)
    assert volume.name in keyed.backup("--verify", exit_code=3).stderr
    volume.write_bytes(content)
    keyed.backup("--verify")
    assert status(keyed, 0)["last_verify"]["damaged"] == {}


def test_nothing_old_goes_for_what_is_damaged(keyed: Store, old_nights: OldNights) -> None:
    """Before a chain is deleted the newest is checked whole, whatever share is due."""
    old_nights(keyed, "-9 days")
    old = names(keyed)
    keyed.run("faketime", "-8 days", *keyed.command("--full"))
    assert old < names(keyed)
    volume = next(path for path in keyed.encrypted.glob("*full.*vol1*") if path.name not in old)
    damage(volume)
    checks = keyed.backups / "last-verify.json"
    due = (zlib.crc32(volume.name.encode()) + 1) % 7
    checks.write_text(json.dumps({"damaged": {}, "checked": {
        str(number): "2026-01-01T00:00:00+00:00" for number in range(7) if number != due}}))
    assert f"{volume} is damaged" in keyed.backup(exit_code=3).stderr
    assert old < names(keyed) and "-inc." in keyed.manifests()[-1]
    assert keyed.backup().stderr == "" and "-full." in keyed.manifests()[-1]
    assert not old & names(keyed)


def test_verify_that_outlasts_a_night(keyed: Store, first_night: FirstNight) -> None:
    """It does not take back what the night has found in a file that it had read before."""
    first_night(keyed, 2)
    checks = keyed.backups / "last-verify.json"
    known = json.loads(checks.read_text())
    volume = next(keyed.encrypted.glob("*full.*vol1*")).name
    found = keyed.scratch / "found"
    found.write_text(json.dumps({**known, "damaged": {volume: "is damaged"}}))
    keyed.stand_in("gpg", f"""#!/bin/sh
case "$*" in *full-signatures*) cp {found} {checks};; esac
exec REAL "$@"
""")
    keyed.backup("--verify")
    assert status(keyed, 3)["last_verify"]["damaged"] == {volume: "is damaged"}
    (keyed.bin / "gpg").unlink()
    keyed.backup("--verify")
    assert status(keyed, 0)["last_verify"]["damaged"] == {}


def test_night_that_outlasts_a_verify(keyed: Store, old_nights: OldNights) -> None:
    """It does not take back what a --verify has found while it checked a share."""
    old_nights(keyed, "-86 hours")
    old = names(keyed)
    for age in ("-2 days", "-1 day"):
        keyed.run("faketime", age, *keyed.command("--full"))
    kept = names(keyed)
    assert old < kept
    checks, found = keyed.backups / "last-verify.json", keyed.scratch / "found"
    volume = sorted(keyed.encrypted.glob("*full.*vol1*"))[-2].name
    found.write_text(json.dumps({
        **json.loads(checks.read_text()), "damaged": {volume: "is damaged"}}))
    keyed.stand_in("gpg", f"""#!/bin/sh
case "$*" in *{keyed.manifests()[0]}*) cp {found} {checks};; esac
exec REAL "$@"
""")
    assert f"{volume} is damaged" in keyed.backup(exit_code=3).stderr
    assert status(keyed, 0)["last_verify"]["damaged"] == {volume: "is damaged"}
    assert kept < names(keyed)


def test_lost_manifest_keeps_what_it_leaves(keyed: Store, first_night: FirstNight) -> None:
    """The volumes stay until they are old, so that the manifest can be had from a copy."""
    first_night(keyed, 3)
    mark, manifest = put_hook(keyed), keyed.encrypted / keyed.manifests()[1]
    content = manifest.read_bytes()
    before = names(keyed) - {manifest.name}
    manifest.unlink()
    assert "leads back to no full one" in status(keyed, 3)["headline"]
    result = keyed.backup(exit_code=3)
    assert backup_stamp(manifest) in result.stderr and not mark.exists()
    assert before < names(keyed) and "-full." in keyed.manifests()[-1]
    manifest.write_bytes(content)
    keyed.backup("--verify")
    assert keyed.backup().stderr == "" and mark.exists()
    manifest.unlink()
    keyed.run("faketime", "+2 days", *keyed.command(), exit_code=3)
    keyed.run("faketime", "+4 days", *keyed.command())
    assert not [name for name in names(keyed) if backup_stamp(manifest) in name]


def backup_stamp(path: Path) -> str:
    """Return the stamp of the set that a backup file belongs to."""
    return path.name.split(".manifest")[0][-16:]


def with_room(store: Store, room: str, exit_code: int, *options: str) -> Result:
    """Run a night, and --status, on a copy of backup/ with so many bytes free, and list encrypted/.

    room: a number, or a shell command that makes it so in its working directory.
    """
    script = (
        'cp -a "$0" "$0.aside" && mount -t tmpfs -o size=800M,mode=750 none "$0" &&'
        ' cp -a "$0.aside/." "$0" && rm -r "$0.aside" && chgrp nogroup "$0" && cd "$0" &&'
        f' {{ {room}; }} && "$@"; code=$?; ls encrypted; "$@" --status; exit $code')
    return store.run("unshare", "--mount", "sh", "-c", script, store.backups,
                     *store.command(*options), exit_code=exit_code)


SHORT = ("free=$(($(stat -f -c '%a * %S' .))) && "
         f"fallocate -l $((free - {575_000_000 + 42_000_000 - 10_000_000})) filler")


def test_full_disk_does_not_heal_by_what_alone_holds_a_file(keyed: Store) -> None:
    """What the disk could not read the night before is whole in the old backup only."""
    big, bad = keyed.root / "big", keyed.root / "ssl/private.pem"
    big.write_bytes(os.urandom(30_000_000))
    keyed.run("faketime", "10 days ago", *keyed.command())
    big.unlink()
    keyed.run("faketime", "8 days ago", "strace", "-qq", "-o", "/dev/null", "-P", bad, "-e",
              "trace=sendfile", "-e", "inject=sendfile:error=EIO", *keyed.command("--full"),
              exit_code=3)
    result = with_room(keyed, SHORT, 1)
    assert f"run --full: {bad}" in result.stderr and "make room there" in result.stderr
    assert set(keyed.manifests()) <= set(result.stdout.split())
    # Not even a full one that is asked for lets it go before it is made.
    assert set(keyed.manifests()) <= set(with_room(keyed, SHORT, 1, "--full").stdout.split())
    keyed.stand_in("duplicity", '#!/bin/sh\ncase $1 in full) exit 50;; esac\nexec REAL "$@"\n')
    before = keyed.manifests()
    for _ in range(2):
        keyed.backup("--full", exit_code=1)
        assert keyed.manifests() == before


def test_full_disk_heals_itself(keyed: Store) -> None:
    """Where room is lacking old chains go first, but never the newest, however old it is."""
    big = keyed.root / "big"
    big.write_bytes(os.urandom(30_000_000))
    keyed.run("faketime", "10 days ago", *keyed.command())
    big.unlink()
    keyed.run("faketime", "8 days ago", *keyed.command("--full"))
    old, new = keyed.manifests()
    known = keyed.backups / "last-verify.json"
    known.write_text(json.dumps({"checked": {}, "damaged": {new: "is damaged"}}))
    result = with_room(keyed, SHORT, 1)
    assert "make room there" in result.stderr and old in result.stdout
    known.unlink()
    result = with_room(keyed, SHORT, 0)
    assert result.stderr == ""
    assert old not in result.stdout and new in result.stdout
    known.write_text(json.dumps({"checked": {}, "damaged": {old: "is damaged"}}))
    result = with_room(keyed, f'{SHORT}; ! "$@"', 0)
    assert f"{old} is damaged; fetch it" in result.stderr
    assert old not in result.stdout and new in result.stdout


@pytest.mark.parametrize("option", [[], ["--full"]])
def test_run_that_failed_makes_way_for_the_next(keyed: Store, option: list[str]) -> None:
    """It may have needed more room than is known: what is old enough goes before, but no more."""
    for age in ("10 days ago", "8 days ago"):
        keyed.run("faketime", age, *keyed.command("--full"))
    keyed.stand_in("duplicity", """#!/bin/sh
case $1 in incremental|full) exit 53;; esac
exec REAL "$@"
""")
    old, new = keyed.manifests()
    for left in ([old, new], [new], [new]):
        assert "the disk is full" in keyed.backup(*option, exit_code=1).stderr
        assert keyed.manifests() == left


def test_full_disk_takes_nothing_that_a_lost_manifest_needs(keyed: Store) -> None:
    """What is before it looks like a chain that is over and old; the manifest may be fetched."""
    (keyed.root / "big").write_bytes(os.urandom(30_000_000))
    for age in ("6 days ago", "1 day ago", "12 hours ago"):
        keyed.run("faketime", age, *keyed.command())
    full, lost = keyed.manifests()[:2]
    (keyed.encrypted / lost).unlink()
    keyed.backup(exit_code=3)
    result = with_room(keyed, SHORT, 1)
    assert "make room there" in result.stderr and full in result.stdout


@pytest.mark.parametrize("losses", [0, 100])
def test_disk_without_a_free_byte(keyed: Store, first_night: FirstNight, losses: int) -> None:
    """What failed for that is told by --status, too: last-run.json is written over if it fits."""
    first_night(keyed)
    stamps = keyed.manifests()[0].split(".")[1]
    known = {"checked": {}, "damaged": {
        f"duplicity-full.{stamps}.vol{number}.difftar.gpg": "is damaged"
        for number in range(1, losses + 1)}}
    (keyed.backups / "last-verify.json").write_text(json.dumps(known))
    result = with_room(keyed, "! dd if=/dev/zero of=filler bs=4k 2> /dev/null", 1)
    assert "has 0 bytes free and a backup needs" in result.stderr
    assert "cannot read" not in result.stdout
    assert losses or "\nFAILED: the last run failed" in result.stdout


def test_refused_night_is_told(keyed: Store, first_night: FirstNight) -> None:
    """--status and what programs read call it FAILED, with its sentence, until a good one."""
    first_night(keyed)
    key, set_before = keyed.backups / "secret_key.txt", keyed.last_run()["newest_set"]
    key.chmod(0o644)
    sentence = keyed.backup(exit_code=2).stderr.removeprefix("backup: ").strip()
    assert sentence in status(keyed, 3)["headline"]
    assert sentence.split(";")[0] in keyed.backup("--status", "--html", exit_code=3).stdout
    assert keyed.last_run()["newest_set"] == set_before
    key.chmod(0o600)
    keyed.settings.write_text(keyed.settings.read_text() + "BACKUP_KEEPDAYS=30\n")
    result = keyed.backup(exit_code=2)
    assert "BACKUP_KEEPDAYS is no setting" in result.stderr
    assert "BACKUP_KEEP_DAYS" in result.stderr
    assert "BACKUP_KEEPDAYS" in status(keyed, 3)["headline"]
    keyed.backup("--list")
    keyed.settings.write_text(keyed.settings.read_text().replace("KEEPDAYS", "KEEP_DAYS"))
    keyed.backup()
    assert status(keyed, 0)


def test_long_downtime_is_told(keyed: Store, first_night: FirstNight) -> None:
    """A night that kept mail down for long says what would avoid it; a short one does not."""
    first_night(keyed)
    place = keyed.root / "www"
    place.mkdir()
    script = f'mount -t tmpfs none {place} && "$@"'
    command = keyed.command()[2:]
    keyed.run("unshare", "--mount", "sh", "-c", script, "sh", *keyed.command())
    program = keyed.changed_program("LONG_DOWNTIME_SECONDS = 60", "LONG_DOWNTIME_SECONDS = 0")
    result = keyed.run("unshare", "--mount", "sh", "-c", script, "sh", PYTHON, program, *command,
                       exit_code=3)
    assert "mail was down while duplicity read" in result.stderr
    assert "leave it out with BACKUP_EXCLUDE" in result.stderr
    errors = keyed.run(PYTHON, program, *command, exit_code=3).stderr
    assert "mail was down for 0 seconds; see which large files" in errors


def test_signatures_of_another_date(keyed: Store, first_night: FirstNight) -> None:
    """Old versions date them seconds off their set: no other can use them, so a full one comes."""
    first_night(keyed)
    old, (found,) = next(keyed.encrypted.glob("*.sigtar.gpg")), backup.read_sets(keyed.encrypted)
    early = (found.date - timedelta(seconds=5)).strftime("%Y%m%dT%H%M%SZ")
    old.rename(old.with_name(old.name.replace(found.stamp, early)))
    shutil.rmtree(keyed.backups / "cache")  # as on a new machine
    (keyed.backups / "last-run.json").unlink()
    keyed.backup()
    assert "-full." in keyed.manifests()[-1] and len(keyed.manifests()) == 2
    assert keyed.backup().stderr == ""


def test_damaged_inodes(keyed: Store) -> None:
    """What the disk tells nothing of is named, and in the way of no other backup.

    That is a volume of an older chain here, and a hook.
    """
    with disk(keyed, "mkfs.ext4", "-q", "-O", "metadata_csum,^has_journal", size="900M",
              place=keyed.backups):
        keyed.backups.chmod(0o750)
        keyed.put_key()
        keyed.backup()
        keyed.backup("--full")
        put_hook(keyed)
        volume, hook = min(keyed.encrypted.glob("*vol1*")), keyed.backups / "after-backup"
        damage_inodes(keyed, keyed.backups, [path.stat().st_ino for path in (volume, hook)])
        assert len(keyed.backup("--list").stdout.splitlines()) > 10
        keyed.backup("--restore", str(keyed.scratch / "restored"))
        assert tree_of(keyed.scratch / "restored") == tree_of(keyed.root)
        assert str(volume) in keyed.backup("--verify", exit_code=3).stderr
        assert str(volume) in keyed.backup(exit_code=3).stderr
        assert f"the hook {hook} failed" in keyed.backup(exit_code=3).stderr
        assert len(keyed.manifests()) == 4
