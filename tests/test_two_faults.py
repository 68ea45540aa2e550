"""Several things go wrong one after the other, and nothing that is good is lost."""

import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

import backup
from conftest import FirstNight, OldNights, Store, tree_of
from test_bad_mornings import put_hook

pytestmark = pytest.mark.long

MAKES_NO_SET = '#!/bin/sh\ncase $1 in full|incremental) exit 50;; esac\nexec REAL "$@"\n'


def lose_older_chain(store: Store) -> Path:
    """Begin a new chain, and delete all of the one before. Returns where the hook leaves a mark."""
    store.backup("--full")
    mark, stamp = put_hook(store), store.manifests()[0].split(".")[1]
    for path in store.encrypted.glob(f"*{stamp}*"):
        path.unlink()
    return mark


def make_fulls(store: Store, *ages: str) -> list[Path]:
    """Make full backups of these ages, and delete none. Returns the first volume of each."""
    store.stand_in("duplicity", "#!/bin/sh\ncase $1 in remove*) ;; *) exec REAL \"$@\";; esac\n")
    for age in ages:
        store.run("faketime", age, *store.command("--full"))
    return [store.encrypted / name.replace("manifest", "vol1.difftar")
            for name in store.manifests()]


def make_unproved(store: Store) -> str:
    """Make a backup that last-run.json does not know, as of a run that was killed.

    Returns its stamp.
    """
    last_run = store.backups / "last-run.json"
    content = last_run.read_bytes()
    store.backup()
    last_run.write_bytes(content)
    return store.manifests()[-1].split(".")[3]


def make_due(store: Store, file: Path) -> None:
    """Have the next night check the share that a backup file is in."""
    checks = store.backups / "last-verify.json"
    known = json.loads(checks.read_text())
    known["checked"] = {str(number): "2026-01-01T00:00:00+00:00" for number in range(7)}
    known["checked"].pop(str(zlib.crc32(file.name.encode()) % 7))
    checks.write_text(json.dumps(known))


@pytest.mark.parametrize("table", [None, "/dev/sdb1 /mnt\n", "LABEL=x /mnt/a\u00a0b ext4 ro 0 0\n"])
def test_fstab_that_findmnt_cannot_read(keyed: Store, table: str | None) -> None:
    """Is there no /etc/fstab, or a wrong line in it, backups are made all the same."""
    etc = keyed.scratch / "etc"
    keyed.run("cp", "-a", "/etc", etc)
    (etc / "fstab").unlink()
    if table:
        (etc / "fstab").write_text(table)
    keyed.run("unshare", "--mount", "sh", "-c", f'mount --bind {etc} /etc && exec "$@"', "sh",
              *keyed.command("--dry-run"))


def test_swap_in_fstab_is_no_mount_point(keyed: Store) -> None:
    """`none` is no path relative to where the admin stands."""
    table = keyed.scratch / "fstab"
    table.write_text("/dev/sda2 none swap sw 0 0\n")
    keyed.run("unshare", "--mount", "sh", "-c",
              f'mount --bind {table} /etc/fstab && cd {keyed.backups} && exec "$@"', "sh",
              *keyed.command("--dry-run"))


def test_last_good_chain_outlives_a_lost_volume_without_cache(keyed: Store) -> None:
    """An expired chain is not pruned while the newest restores nothing; cache/ is gone."""
    keyed.run("faketime", "10 days ago", *keyed.command())
    keyed.run("faketime", "8 days ago", *keyed.command("--full"))
    old, new = keyed.manifests()
    (keyed.encrypted / new.replace("manifest", "vol1.difftar")).unlink()
    shutil.rmtree(keyed.backups / "cache")  # as every failed night leaves it
    keyed.backup(exit_code=3)
    assert "-full." in keyed.manifests()[-1] or old in keyed.manifests()


def test_failed_night_then_lost_volume(keyed: Store, first_night: FirstNight) -> None:
    """The night after a failed one, which deleted cache/backup, builds on no lost volume."""
    first_night(keyed)
    keyed.stand_in("duplicity", MAKES_NO_SET)
    keyed.backup(exit_code=1)
    (keyed.bin / "duplicity").unlink()
    next(keyed.encrypted.glob("*full.*vol1*")).unlink()
    keyed.backup(exit_code=3)
    assert "-full." in keyed.manifests()[-1]


def test_share_checked_in_the_future_is_checked_again(
    keyed: Store, first_night: FirstNight
) -> None:
    """One night with a wrong clock does not leave a seventh unchecked until then."""
    first_night(keyed)
    checks = keyed.backups / "last-verify.json"
    future = "2097-01-01T00:00:00+00:00"
    checks.write_text(json.dumps({"damaged": {}, "checked": {
        str(share): future if share == 3 else "2026-01-01T00:00:00+00:00" for share in range(7)}}))
    keyed.backup()
    assert future not in checks.read_text()


def test_lost_older_chain_is_told(keyed: Store, first_night: FirstNight) -> None:
    """An older chain that is gone whole, and too young for that, is a loss, too."""
    first_night(keyed)
    mark = lose_older_chain(keyed)
    keyed.backup(exit_code=3)
    assert not mark.exists()


def test_root_takes_no_foreign_directory_for_backup(store: Store) -> None:
    """STORAGE_USER may call another directory of root's backup/: nothing in it is touched."""
    private = store.root / "private"
    (private / "tmp").mkdir(parents=True)
    private.chmod(0o700)
    (private / "tmp" / "precious").touch()
    private.rename(store.backups)
    store.backup(exit_code=2)
    assert (store.backups / "tmp" / "precious").exists()
    assert store.backups.stat().st_mode & 0o777 == 0o700


def test_first_night_on_a_new_disk(store: Store) -> None:
    """It holds lost+found, and nothing that a backup has made but what --verify has noted."""
    store.backups.mkdir()
    (store.backups / "lost+found").mkdir()
    store.backup("--dry-run")
    (store.backups / "last-verify.json").touch()
    (store.backups / "old-key-2026-11-20").mkdir()
    store.backup()
    assert len(store.manifests()) == 1


def test_lost_manifest_is_named_once(keyed: Store, first_night: FirstNight) -> None:
    """What needs it lacks nothing else, and says so where no run has noted what there was."""
    first_night(keyed, 3)
    full = keyed.encrypted / keyed.manifests()[0]
    full.unlink()
    stamp = full.name.split(".")[1]
    errors = keyed.backup("--verify", exit_code=3).stderr
    assert errors.count("is missing") == 1 and f"{full} is missing" in errors
    shutil.rmtree(keyed.backups / "cache")
    for path in keyed.encrypted.glob(f"*.{stamp}.*"):
        if ".to." not in path.name:
            path.unlink()
    errors = keyed.backup("--verify", exit_code=3).stderr
    assert errors.count("is missing") == 3 and f"{full} is missing" in errors
    (keyed.backups / "last-run.json").unlink()  # as on another machine
    errors = keyed.backup("--verify", exit_code=3).stderr
    assert "nothing can be restored, for they lack their manifest" in errors
    assert all(name.split(".")[3] in errors for name in keyed.manifests())


def test_rubbish_dates_in_last_verify(keyed: Store, first_night: FirstNight) -> None:
    """They are no traceback."""
    first_night(keyed)
    (keyed.backups / "last-verify.json").write_text(json.dumps({"damaged": {}, "checked": {
        str(share): "0001-01-01T00:00:00" for share in range(7)}}))
    keyed.backup("--status")


def test_wrong_exclusions_do_not_keep_from_restoring(
    keyed: Store, first_night: FirstNight
) -> None:
    """A rescue is no time for manners."""
    first_night(keyed)
    keyed.settings.write_text(keyed.settings.read_text() + "BACKUP_EXCLUDE='x\n")
    keyed.backup("--restore", str(keyed.scratch / "rescue"))


def test_verify_finds_the_loss_before_the_night(keyed: Store, first_night: FirstNight) -> None:
    """The night tells of it nevertheless, once, and mirrors nothing."""
    first_night(keyed)
    mark, volume = put_hook(keyed), next(keyed.encrypted.glob("*full.*vol1*"))
    volume.unlink()
    assert f"{volume} is missing; fetch it" in keyed.backup("--verify", exit_code=3).stderr
    assert f"{volume} is missing" in keyed.backup(exit_code=3).stderr
    assert not mark.exists() and "-full." in keyed.manifests()[-1]
    assert keyed.backup().stderr == "" and mark.exists()


@pytest.mark.parametrize("cache", [True, False])
def test_lost_manifest_keeps_what_is_older_than_it(
    keyed: Store, old_nights: OldNights, cache: bool
) -> None:
    """Without it what was before looks like a chain that is over, and old: nothing is pruned."""
    old_nights(keyed, "6 days ago", "5 days ago", "1 day ago", "12 hours ago")
    mark, manifest = put_hook(keyed), keyed.encrypted / keyed.manifests()[2]
    content, before = manifest.read_bytes(), set(keyed.encrypted.iterdir())
    manifest.unlink()
    if not cache:
        shutil.rmtree(keyed.backups / "cache")
    keyed.backup(exit_code=3)
    assert before - set(keyed.encrypted.iterdir()) == {manifest} and not mark.exists()
    assert "no old backups were deleted" in keyed.backup(exit_code=3).stderr
    assert before - set(keyed.encrypted.iterdir()) == {manifest} and mark.exists()
    manifest.write_bytes(content)
    assert keyed.backup("--verify").stderr == ""
    keyed.backup("--restore", str(keyed.scratch / "old"), "--time", "11h")


@pytest.mark.parametrize("lost", [0, 2])
def test_lost_signatures(keyed: Store, first_night: FirstNight, lost: int) -> None:
    """They are told, the others kept, and every backup is restored whole without them."""
    first_night(keyed)
    (keyed.root / "second").touch()
    keyed.backup()
    (keyed.root / "third").touch()
    keyed.backup()
    signatures = sorted(keyed.encrypted.glob("*.sigtar.gpg"), key=lambda path: path.name[-28:])
    mark = put_hook(keyed)
    signatures[lost].unlink()
    keyed.backup("--restore", str(keyed.scratch / "whole"))
    assert tree_of(keyed.scratch / "whole") == tree_of(keyed.root)
    assert "the files cannot be listed, but restored" in keyed.backup("--list", exit_code=1).stderr
    result = keyed.backup(exit_code=3)
    assert result.stderr.startswith(f"backup: {signatures[lost]} is missing; fetch it")
    assert result.stderr.count("\n") == 1
    assert "-full." in keyed.manifests()[-1] and not mark.exists()
    assert keyed.backup().stderr == "" and mark.exists()
    assert all(path.exists() for path in signatures if path != signatures[lost])
    assert f"{signatures[lost]} is missing" in keyed.backup("--verify", exit_code=3).stderr


def test_second_loss_is_told_again(keyed: Store, first_night: FirstNight) -> None:
    """A volume that was fetched, as the message says, and that is lost once more."""
    first_night(keyed)
    mark, volume = put_hook(keyed), next(keyed.encrypted.glob("*full.*vol1*"))
    content = volume.read_bytes()
    for option in ("-v", "--verify"):
        volume.unlink()
        assert f"{volume} is missing; fetch it" in keyed.backup(exit_code=3).stderr
        assert not mark.exists()
        volume.write_bytes(content)
        keyed.backup(option)
        mark.unlink(missing_ok=True)
    assert keyed.backup("--status").stdout.count("Damaged") == 0


@pytest.mark.parametrize("lost", ["*full.*manifest*", "*full-sig*", "*full.*vol1*"])
def test_loss_in_a_chain_that_is_old(keyed: Store, old_nights: OldNights, lost: str) -> None:
    """The machine was down for days: what is left of the newest chain is not too old for a loss.

    The full backup that this brings about does not have that deleted before it can be mended.
    """
    old_nights(keyed, "6 days ago", "5 days ago")
    mark, path = put_hook(keyed), next(keyed.encrypted.glob(lost))
    content, all_of_it = path.read_bytes(), set(keyed.encrypted.iterdir())
    path.unlink()
    stamp = path.name.split(".")[1]
    assert stamp in keyed.backup("--verify", exit_code=3).stderr
    assert stamp in keyed.backup(exit_code=3).stderr and not mark.exists()
    path.write_bytes(content)
    assert all_of_it < set(keyed.encrypted.iterdir()) and keyed.backup("--verify").stderr == ""


def test_lost_manifest_and_a_clock_that_jumps(keyed: Store, old_nights: OldNights) -> None:
    """Neither is what the manifest has left deleted as of no use."""
    old_nights(keyed, "70 days ago", "69 days ago")
    (keyed.encrypted / keyed.manifests()[0]).unlink()
    keyed.run("faketime", "68 days ago", *keyed.command(), exit_code=3)
    before = set(keyed.encrypted.iterdir())
    assert "check the clock" in keyed.backup(exit_code=3).stderr
    assert before < set(keyed.encrypted.iterdir())


def test_loss_while_verify_runs(keyed: Store, first_night: FirstNight) -> None:
    """It checks a link of its own, which is whole; what has become of the file is told, too."""
    first_night(keyed)
    volume = next(keyed.encrypted.glob("*full.*vol1*"))
    keyed.stand_in("gpg", f'#!/bin/sh\nrm -f {volume}\nexec REAL "$@"\n')
    assert f"{volume} is missing" in keyed.backup("--verify", exit_code=3).stderr


@pytest.mark.parametrize("kind", [".vol1.", ".sigtar."])
def test_empty_file_hides_no_loss(keyed: Store, first_night: FirstNight, kind: str) -> None:
    """A file that a power cut has emptied, or that README's recipe is tried on, is lost."""
    first_night(keyed)
    path = next(keyed.encrypted.glob(f"*full*{kind}*"))
    path.write_bytes(b"")
    assert f"{path} is missing" in keyed.backup(exit_code=3).stderr
    assert "-full." in keyed.manifests()[-1]
    what = "missing" if kind == ".vol1." else "damaged"
    assert f"{path} is {what}" in keyed.backup("--verify", exit_code=3).stderr
    keyed.backup(exit_code=None)  # 3, unless the night before checked that share
    keyed.backup("--verify", exit_code=3)  # both are told by now, and do not take turns
    assert keyed.backup().stderr == ""


def test_known_damage_outlives_a_night_that_failed(keyed: Store, first_night: FirstNight) -> None:
    """What duplicity knows of a damaged manifest is not thrown away with the failed set."""
    first_night(keyed, 3)
    manifest = keyed.encrypted / keyed.manifests()[1]
    manifest.write_bytes(manifest.read_bytes()[:-10])
    keyed.backup("--verify", exit_code=3)
    keyed.stand_in("duplicity", MAKES_NO_SET)
    keyed.backup(exit_code=1)
    (keyed.bin / "duplicity").unlink()
    keyed.backup(exit_code=None)
    assert "-full." in keyed.manifests()[-1]


def test_volume_of_an_old_chain_is_lost(keyed: Store) -> None:
    """The night that finds it tells of it, and not each seventh that finds it anew."""
    volume = make_fulls(keyed, "9 days ago", "1 hour ago")[0]
    volume.unlink()

    def night() -> str:
        make_due(keyed, volume)
        return keyed.backup(exit_code=None).stderr

    assert f"{volume} is missing" in night()
    assert night() == ""
    assert keyed.backup().stderr == "" and night() == ""


def test_damage_that_the_night_finds_itself(keyed: Store) -> None:
    """What is old and good is not deleted in the night that finds the newest backup damaged."""
    volume = make_fulls(keyed, "9 days ago", "5 hours ago")[1]
    (keyed.bin / "duplicity").unlink()
    before = set(keyed.encrypted.iterdir())
    volume.write_bytes(volume.read_bytes()[:-1] + b"x")
    make_due(keyed, volume)
    told = keyed.backup(exit_code=3).stderr
    assert f"{volume} is damaged" in told and before < set(keyed.encrypted.iterdir())


def test_volumes_that_never_come_back(keyed: Store, old_nights: OldNights) -> None:
    """Nothing is left of a backup that lost them when it is old: --verify has no more to tell."""
    old_nights(keyed, "9 days ago")
    manifest = keyed.encrypted / keyed.manifests()[0]
    next(keyed.encrypted.glob("*.vol1.*")).unlink()
    keyed.run("faketime", "8 days ago", *keyed.command(), exit_code=3)
    assert manifest.exists()
    assert keyed.backup().stderr == "" and not manifest.exists()
    assert keyed.backup("--verify").stderr == "" and len(keyed.manifests()) == 2


def test_loss_beside_what_is_waited_for(keyed: Store, old_nights: OldNights) -> None:
    """The full backup that a lost manifest has parted from its increments is looked for, too."""
    old_nights(keyed, "95 hours ago", "94 hours ago", "60 hours ago")
    mark, (full, lost, _) = put_hook(keyed), keyed.manifests()
    (keyed.encrypted / lost).unlink()
    keyed.backup(exit_code=3)
    (keyed.encrypted / full).unlink()
    assert f"{full} is missing" in keyed.backup(exit_code=3).stderr and not mark.exists()


def test_clock_that_jumps_while_duplicity_runs(keyed: Store) -> None:
    """What is young by the clock at the begin of the run is not deleted as old."""
    for age in ("42 days ago", "40 days ago"):
        keyed.run("faketime", age, *keyed.command("--full"))
    keyed.stand_in("duplicity", "#!/bin/sh\ncase $1 in full|remove*) unset LD_PRELOAD FAKETIME;; "
                   'esac\nexec REAL "$@"\n')
    before = set(keyed.encrypted.iterdir())
    result = keyed.run("faketime", "40 days ago", *keyed.command("--full"), exit_code=3)
    assert "check the clock" in result.stderr and before < set(keyed.encrypted.iterdir())


def test_no_room_for_a_keybox_is_no_damage(keyed: Store, first_night: FirstNight) -> None:
    """In /run there is none for what gpg would make without need."""
    first_night(keyed)
    result = keyed.run("unshare", "--mount", "sh", "-c",
                       'mount -t tmpfs -o nr_inodes=4,mode=755 none /run && exec "$@"', "sh",
                       *keyed.command("--verify"))
    assert result.stderr == ""


@pytest.mark.parametrize("kind", [".sigtar.", ".manifest."])
def test_what_is_appended_is_damage(keyed: Store, first_night: FirstNight, kind: str) -> None:
    """gpg opens it, but duplicity does not."""
    first_night(keyed)
    path = next(keyed.encrypted.glob(f"*{kind}*"))
    path.write_bytes(path.read_bytes() + b"x")
    assert f"{path} is damaged" in keyed.backup("--verify", exit_code=3).stderr


def test_loss_is_told_again_after_a_kill(keyed: Store, first_night: FirstNight) -> None:
    """The night that finds it dies when its set is made: the next mirrors nothing."""
    first_night(keyed)
    mark, manifest = put_hook(keyed), keyed.encrypted / keyed.manifests()[0]
    manifest.write_bytes(manifest.read_bytes()[:-9] + b"x" * 9)
    keyed.stand_in("duplicity", '#!/bin/sh\nREAL "$@"\n[ $1 != full ] || kill -9 $PPID\n')
    keyed.backup(exit_code=-9)
    (keyed.bin / "duplicity").unlink()
    assert f"{manifest} is damaged" in keyed.backup(exit_code=3).stderr and not mark.exists()
    assert f"{manifest.name} is damaged" in keyed.backup("--status").stdout


def test_lost_signatures_of_an_older_chain(keyed: Store, first_night: FirstNight) -> None:
    """They are told, those after them are kept, and no full backup is made for them."""
    first_night(keyed)
    for number in "12":
        (keyed.root / number).touch()
        keyed.backup()
    keyed.backup("--full")
    mark = put_hook(keyed)
    signatures = sorted(keyed.encrypted.glob("*new-sig*"))
    content = signatures[0].read_bytes()
    signatures[0].unlink()
    assert f"{signatures[0]} is missing" in keyed.backup(exit_code=3).stderr and not mark.exists()
    assert keyed.backup().stderr == "" and mark.exists() and signatures[1].exists()
    assert "-inc." in keyed.manifests()[-1]
    signatures[0].write_bytes(content)
    assert keyed.backup("--verify").stderr == ""


def test_damaged_note_beside_a_lost_volume(keyed: Store) -> None:
    """What duplicity has noted is thrown away, although something in encrypted/ is lost, too."""
    for option in ("-v", "-v", "--full"):
        keyed.backup(option)
    next(keyed.encrypted.glob(keyed.manifests()[0].replace("manifest", "vol1.difftar"))).unlink()
    keyed.backup(exit_code=3)
    newest = keyed.manifests()[-1].removesuffix(".gpg")
    (keyed.backups / "cache/backup" / newest).write_text("garbage\n")
    keyed.backup(exit_code=None)
    assert keyed.backup().stderr == ""


def test_damaged_salt_is_no_other_key(keyed: Store, first_night: FirstNight) -> None:
    """gpg takes it for that; it opens the set's signatures."""
    first_night(keyed)
    manifest = keyed.encrypted / keyed.manifests()[0]
    content = bytearray(manifest.read_bytes())
    content[8] ^= 1
    manifest.write_bytes(content)
    assert f"{manifest} is damaged" in keyed.backup(exit_code=3).stderr
    assert "-full." in keyed.manifests()[-1]


@pytest.mark.parametrize("size", [3, 13, 20])
def test_file_of_a_few_bytes_is_damaged(keyed: Store, first_night: FirstNight, size: int) -> None:
    """Of one that ends after its first packet gpg says nothing, and exits with 0."""
    first_night(keyed)
    signatures = next(keyed.encrypted.glob("*.sigtar.gpg"))
    signatures.write_bytes(signatures.read_bytes()[:size])
    assert f"{signatures} is damaged" in keyed.backup("--verify", exit_code=3).stderr


@pytest.mark.parametrize("kind", [".sigtar.", ".manifest."])
def test_unnoticed_damage_and_a_night_that_fails(
    keyed: Store, first_night: FirstNight, kind: str
) -> None:
    """What duplicity has noted of it is kept, and the damage told: the next night makes a full."""
    first_night(keyed, 3)
    path = next(keyed.encrypted.glob(f"duplicity-full*{kind}*"))
    path.write_bytes(path.read_bytes()[:-10])
    keyed.stand_in("duplicity", "#!/bin/sh\ncase $1 in full|incremental) exit 53;; esac\n"
                   'exec REAL "$@"\n')
    assert f"damaged: {path}; fetch" in keyed.backup(exit_code=1).stderr
    (keyed.bin / "duplicity").unlink()
    mark = put_hook(keyed)
    assert f"{path} is damaged; fetch it" in keyed.backup(exit_code=3).stderr
    assert "-full." in keyed.manifests()[-1] and not mark.exists()


def test_lost_set_and_a_night_that_fails(keyed: Store, first_night: FirstNight) -> None:
    """Nothing is left of it: the next night tells it again, and mirrors nothing."""
    first_night(keyed)
    mark = lose_older_chain(keyed)
    shutil.rmtree(keyed.backups / "cache")
    keyed.stand_in("duplicity", MAKES_NO_SET)
    keyed.backup(exit_code=1)
    (keyed.bin / "duplicity").unlink()
    assert "is missing; fetch it" in keyed.backup(exit_code=3).stderr and not mark.exists()


@pytest.mark.parametrize("lost", [True, False])
def test_two_damaged_files_are_no_other_key(
    keyed: Store, first_night: FirstNight, lost: bool
) -> None:
    """A manifest that looks like another key's beside signatures that are damaged or lost."""
    first_night(keyed, 2)
    manifest = keyed.encrypted / keyed.manifests()[1]
    content = bytearray(manifest.read_bytes())
    content[8] ^= 1
    manifest.write_bytes(content)
    signatures = next(keyed.encrypted.glob("*new-sig*"))
    signatures.write_bytes(signatures.read_bytes()[:-10])
    if lost:
        signatures.unlink()
    assert f"{manifest} is damaged" in keyed.backup(exit_code=3).stderr


def test_damaged_note_beside_lost_signatures_of_an_older_chain(keyed: Store) -> None:
    """What duplicity has noted can be made anew, for the newest chain is whole."""
    for option in ("-v", "-v", "--full"):
        keyed.backup(option)
    next(keyed.encrypted.glob("*new-sig*")).unlink()
    newest = keyed.manifests()[-1].removesuffix(".gpg")
    (keyed.backups / "cache/backup" / newest).write_text("")
    keyed.backup(exit_code=None)
    keyed.backup(exit_code=None)
    assert len(keyed.manifests()) >= 4


def test_another_key_beside_a_damaged_file(keyed: Store, first_night: FirstNight) -> None:
    """That one file is no file of gpg's does not make the key right."""
    first_night(keyed)
    next(keyed.encrypted.glob("*.sigtar.gpg")).write_bytes(b"")
    (keyed.backups / "secret_key.txt").write_text("another" * 10 + "\n")
    assert "made with another key" in keyed.backup(exit_code=1).stderr


def test_lost_manifest_that_grows_old_is_told_once(keyed: Store, old_nights: OldNights) -> None:
    """The full that lacks it is older than BACKUP_KEEP_DAYS before its increments are."""
    old_nights(keyed, "95 hours ago", "70 hours ago")
    (keyed.encrypted / keyed.manifests()[0]).unlink()
    for hours, told in ((60, 1), (20, 0)):
        errors = keyed.run("faketime", f"{hours} hours ago", *keyed.command(), exit_code=3).stderr
        assert errors.count("is missing; fetch it") == told, errors


def test_what_a_lost_set_would_complete_is_kept(keyed: Store, old_nights: OldNights) -> None:
    """All of it is gone: for a night nothing is deleted."""
    old_nights(keyed, "6 days ago", "5 days ago", "1 day ago")
    keyed.run("faketime", "12 hours ago", *keyed.command("--full"))
    stamp = keyed.manifests()[2].split(".")[3]
    for path in keyed.encrypted.glob(f"*.to.{stamp}.*"):
        path.unlink()
    before = set(keyed.encrypted.iterdir())
    assert f"{stamp}.manifest.gpg is missing" in keyed.backup(exit_code=3).stderr
    assert before < set(keyed.encrypted.iterdir())


def test_loose_sets_go_although_signatures_were_lost(keyed: Store, old_nights: OldNights) -> None:
    """What leads nowhere is deleted when it is old, whatever was marked in it before."""
    old_nights(keyed, "9 days ago", "8 days ago", "7 days ago")
    full, increment = keyed.manifests()[0], keyed.manifests()[1]
    next(keyed.encrypted.glob("*new-sig*")).unlink()
    keyed.run("faketime", "7 days ago", *keyed.command("--verify"), exit_code=3)
    (keyed.encrypted / full).unlink()
    for age, code in (("6 days ago", 3), ("1 hour ago", None)):
        keyed.run("faketime", age, *keyed.command(), exit_code=code)
    assert not (keyed.encrypted / increment).exists()


def test_lost_manifest_that_is_old_in_a_young_chain(keyed: Store, old_nights: OldNights) -> None:
    """All since depends on it: it is named, however old it is, and not mirrored away."""
    old_nights(keyed, "6 days ago", "5 days ago", "1 day ago", "12 hours ago")
    mark, manifest = put_hook(keyed), keyed.encrypted / keyed.manifests()[0]
    manifest.unlink()
    assert f"{manifest} is missing" in keyed.backup("--verify", exit_code=3).stderr
    assert "Damaged" in keyed.backup("--status", exit_code=3).stdout
    assert f"{manifest} is missing" in keyed.backup(exit_code=3).stderr and not mark.exists()


def test_damaged_file_that_is_lost_later(keyed: Store, first_night: FirstNight) -> None:
    """The copy elsewhere may still be the good one: what happens to the file now is told, too."""
    first_night(keyed)
    mark, volume = put_hook(keyed), next(keyed.encrypted.glob("*full.*vol1*"))
    volume.write_text("damaged")
    keyed.backup("--verify", exit_code=3)
    assert f"{volume} is damaged" in keyed.backup(exit_code=3).stderr and not mark.exists()
    keyed.backup()
    mark.unlink()
    volume.unlink()
    assert f"{volume} is missing" in keyed.backup(exit_code=3).stderr and not mark.exists()


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("kind", [".vol1.", ".sigtar.", ".manifest."])
def test_file_that_is_cut(
    keyed: Store, first_night: FirstNight, kind: str, forgotten: bool
) -> None:
    """The night that follows sees it, and does not copy it over the good one elsewhere.

    So it does when last-run.json was lost, and a night has been well since.
    """
    first_night(keyed)
    path = next(keyed.encrypted.glob(f"*{kind}*"))
    if forgotten:
        (keyed.backups / "last-run.json").unlink()
        keyed.backup()
    mark = put_hook(keyed)
    content = path.read_bytes()
    os.truncate(path, len(content) - 20)
    told = keyed.backup(exit_code=3).stderr
    assert f"{path} is damaged" in told and not mark.exists()
    path.write_bytes(content)
    assert keyed.backup("--verify").stderr == keyed.backup().stderr == "" and mark.exists()


def test_file_that_is_lost_again(keyed: Store, first_night: FirstNight) -> None:
    """It came back, and a night failed: that one of the same name was told of is no excuse."""
    first_night(keyed)
    mark, volume = put_hook(keyed), next(keyed.encrypted.glob("*full.*vol1*"))
    content = volume.read_bytes()
    volume.unlink()
    keyed.backup(exit_code=3)
    volume.write_bytes(content)
    keyed.stand_in("duplicity", MAKES_NO_SET)
    keyed.backup(exit_code=1)
    (keyed.bin / "duplicity").unlink()
    volume.unlink()
    assert f"{volume} is missing" in keyed.backup(exit_code=3).stderr and not mark.exists()


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("lost", ["*", "duplicity-inc.*.manifest*", "duplicity-full.*.manifest*"])
def test_backups_are_lost_with_last_run(
    keyed: Store, old_nights: OldNights, damaged: bool, lost: str
) -> None:
    """cache/ tells of them: their copy elsewhere is not thrown away by a hook that mirrors."""
    old_nights(keyed, "2 days ago", "1 day ago")
    mark = put_hook(keyed)
    for path in keyed.encrypted.glob(lost):
        path.unlink()
    (keyed.backups / "last-run.json").unlink()
    if damaged:
        (keyed.backups / "last-run.json").write_bytes(bytes(500))
    left = os.listdir(keyed.encrypted)
    newest_is_lost = "full" not in lost
    for _ in range(2 if newest_is_lost else 1):
        assert "is missing" in keyed.backup(exit_code=1 if newest_is_lost else 3).stderr
        assert not mark.exists() and set(left) <= set(os.listdir(keyed.encrypted))
    if newest_is_lost:
        assert "is missing" in keyed.backup("--full", exit_code=3).stderr and not mark.exists()


def test_damaged_last_run_keeps_what_is_old(keyed: Store, first_night: FirstNight) -> None:
    """What it knew to be lacking is unknown then: nothing old goes until a full backup is made."""
    first_night(keyed)
    (keyed.backups / "last-run.json").write_bytes(bytes(500))
    for _ in range(2):
        told = keyed.backup(exit_code=3).stderr
        assert "no old backups were deleted" in told
        assert f"cannot read {keyed.backups}/last-run.json" in told
    assert keyed.backup("--full").stderr == ""


@pytest.mark.parametrize("noted", [["x"], {"x": ["y"]}, {"x": None}, [None, [["y"]]], 1])
def test_what_was_noted_is_rubbish(keyed: Store, first_night: FirstNight, noted: object) -> None:
    """A last-run.json that somebody edited ends no night."""
    first_night(keyed)
    path = keyed.backups / "last-run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "told": noted, "files": noted}))
    assert keyed.backup().stderr == ""


def test_very_many_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is noted of them can be read again: what their manifests do not tell goes first."""
    monkeypatch.chdir(tmp_path)
    stem = "duplicity-full.20261122T030000Z"
    volumes = [f"{stem}.vol{number}.difftar.gpg" for number in range(30_000)]
    files = [*volumes, f"{stem}.manifest.gpg"]
    backup.write_last_run(backup.Record(files=dict.fromkeys(files, 250_000_000), told=dict.fromkeys(
        files[-5000:], "is damaged: its checksum is not that in the manifest")))
    noted = backup.new_record().files
    assert files[-1] in noted and len(noted) > 4000


@pytest.mark.parametrize("name", [".manifest.", ".vol1."])
def test_copy_of_a_backup_file_beside_it(
    keyed: Store, first_night: FirstNight, name: str
) -> None:
    """As `cp -b` leaves it where a file was fetched: it would end every run of duplicity."""
    first_night(keyed)
    path = next(keyed.encrypted.glob(f"*{name}*"))
    shutil.copy(path, f"{path}~")
    errors = keyed.backup(exit_code=1).stderr
    assert errors.startswith(f"backup: duplicity would take {path}~ for a backup file")
    assert keyed.calls("stop") == []


def test_file_that_comes_back_during_a_good_run(keyed: Store, first_night: FirstNight) -> None:
    """A file is fetched just then, as the message says: the new backup is as good as any."""
    first_night(keyed)
    keyed.backup("--full")
    volume = next(keyed.encrypted.glob(keyed.manifests()[0].replace("manifest", "vol1.difftar")))
    volume.rename(keyed.scratch / "elsewhere")
    keyed.backup(exit_code=3)
    keyed.stand_in("duplicity", "#!/bin/sh\n[ $1 != incremental ] || "
                   f"mv {keyed.scratch}/elsewhere {volume}\nexec REAL \"$@\"\n")
    keyed.backup()
    assert len(keyed.manifests()) == 4 and keyed.backup("--verify").stderr == ""


def test_restore_of_what_lacks_its_base(keyed: Store, old_nights: OldNights) -> None:
    """That an older backup is taken is said, not only which."""
    old_nights(keyed, "6 days ago", "5 days ago", "1 day ago", "12 hours ago")
    asked = keyed.backup("--status").stdout.splitlines()[3][:19]
    (keyed.encrypted / keyed.manifests()[2]).unlink()
    place = str(keyed.scratch / "restored")
    for number, arguments in enumerate([(), ("--time", asked), ("--time", "4D")]):
        errors = keyed.backup("--restore", f"{place}{number}", *arguments).stderr
        assert (f"the backup of {asked}+00:00 lacks what it builds on" in errors) == (number < 2)


@pytest.mark.parametrize("what, code", [("*{stamp}*", 1), ("*{stamp}.vol*", 3)])
def test_loss_while_duplicity_runs(
    keyed: Store, first_night: FirstNight, what: str, code: int
) -> None:
    """An older backup, or a part of it, goes in those hours: no hook mirrors that."""
    first_night(keyed)
    keyed.backup("--full")
    mark, stamp = put_hook(keyed), keyed.manifests()[0].split(".")[1]
    keyed.stand_in("duplicity", "#!/bin/sh\n[ $1 != incremental ] || rm "
                   f"{keyed.encrypted}/{what.format(stamp=stamp)}\nexec REAL \"$@\"\n")
    told = keyed.backup(exit_code=code).stderr
    (keyed.bin / "duplicity").unlink()
    if code == 1:
        assert "while duplicity ran backups went from" in told
        told = keyed.backup(exit_code=3).stderr
    assert f"{stamp}.vol1.difftar.gpg is missing" in told and not mark.exists()
    assert keyed.backup().stderr == ""


def test_disk_that_goes_while_duplicity_runs(keyed: Store, first_night: FirstNight) -> None:
    """A full backup that was made beside the disk is none: the night fails until that is back."""
    first_night(keyed)
    away = keyed.scratch / "away"
    (keyed.root / "much").write_bytes(os.urandom(1_000_000))
    keyed.backup()
    mark, before = put_hook(keyed), set(keyed.encrypted.iterdir())
    keyed.stand_in("duplicity", f"#!/bin/sh\n[ $1 != full ] || mv {keyed.encrypted} {away}\n"
                   f"mkdir -p {keyed.encrypted}\nexec REAL \"$@\"\n")
    assert "see to its disk" in keyed.backup(exit_code=1).stderr and not mark.exists()
    (keyed.bin / "duplicity").unlink()
    assert list(keyed.encrypted.iterdir()) == []
    assert "is missing" in keyed.backup(exit_code=1).stderr
    shutil.rmtree(keyed.encrypted)
    away.rename(keyed.encrypted)
    assert keyed.backup().stderr == "" and before < set(keyed.encrypted.iterdir())


def test_killed_after_it_has_pruned(keyed: Store, old_nights: OldNights) -> None:
    """What went because it was old is no loss, although last-run.json still names it."""
    old_nights(keyed, "6 days ago", "5 days ago")
    path = keyed.backups / "last-run.json"
    before = path.read_text()
    keyed.backup("--full")
    assert len(keyed.manifests()) == 1
    path.write_text(before)
    assert keyed.backup("--verify").stderr == keyed.backup().stderr == ""


@pytest.mark.parametrize("action", ["remove-older-than", "cleanup"])
def test_loss_while_it_prunes(keyed: Store, first_night: FirstNight, action: str) -> None:
    """Neither is what a lost manifest leaves deleted as of no use, nor does a hook mirror that."""
    first_night(keyed, 2)
    mark, manifest = put_hook(keyed), keyed.encrypted / keyed.manifests()[0]
    left = set(keyed.encrypted.iterdir()) - {manifest}
    keyed.stand_in("duplicity", f'#!/bin/sh\nREAL "$@"\n[ $1 != {action} ] || rm {manifest}\n')
    errors = keyed.backup(exit_code=3).stderr
    assert f"{manifest} is missing" in errors and not mark.exists()
    assert left < set(keyed.encrypted.iterdir())


@pytest.mark.parametrize("lost", ["*", "*-full*"])
def test_loss_of_a_chain_of_which_one_backup_is_new(
    keyed: Store, old_nights: OldNights, lost: str
) -> None:
    """After days without a run all but the newest is old, but that needs it: no hook deletes it."""
    old_nights(keyed, "6 days ago")
    mark, stamp = put_hook(keyed), keyed.manifests()[0].split(".")[1]
    keyed.stand_in("duplicity", '#!/bin/sh\nREAL "$@"\n[ $1 != remove-older-than ] || '
                   f"rm {keyed.encrypted}/{lost}\n")
    assert f"full.{stamp}.manifest.gpg is missing" in keyed.backup(exit_code=3).stderr
    assert not mark.exists()


def test_what_else_is_lost_beside_the_newest(keyed: Store, first_night: FirstNight) -> None:
    """Who begins anew without the newest backup, as he is told to, learns of all others first."""
    first_night(keyed)
    lost = keyed.manifests()[0]
    keyed.backup("--full")
    mark = lose_older_chain(keyed)
    (keyed.encrypted / keyed.manifests()[-1]).unlink()
    shutil.rmtree(keyed.backups / "cache")
    keyed.backup(exit_code=1)
    assert f"{lost} is missing" in keyed.backup("--full", exit_code=3).stderr and not mark.exists()


def test_manifests_and_notes_are_lost(keyed: Store, first_night: FirstNight) -> None:
    """What is left of the backups was not moved aside: --full names what it begins anew without."""
    first_night(keyed)
    mark, manifest = put_hook(keyed), keyed.encrypted / keyed.manifests()[0]
    manifest.unlink()
    shutil.rmtree(keyed.backups / "cache")
    assert f"{manifest} is missing" in keyed.backup("--full", exit_code=3).stderr
    assert not mark.exists()


def test_loss_while_the_hook_runs(keyed: Store, first_night: FirstNight) -> None:
    """The next night names it."""
    first_night(keyed)
    signatures = next(keyed.encrypted.glob("*.sigtar.gpg"))
    put_hook(keyed)
    keyed.stand_in("setpriv", f'#!/bin/sh\ncase $* in */after-backup) rm {signatures};; esac\n'
                   'exec REAL "$@"\n')
    keyed.backup()
    (keyed.bin / "setpriv").unlink()
    assert f"{signatures} is missing" in keyed.backup(exit_code=3).stderr


@pytest.mark.parametrize("disk", ["user-data", "user-data/backup/encrypted"])
def test_disk_that_loses_what_was_written(
    keyed: Store, old_nights: OldNights, disk: str
) -> None:
    """The backup goes, what is old stays, mail as well, and the next night is a good one again."""
    old_nights(keyed, "6 days ago", "5 days ago")
    before, mark = set(keyed.encrypted.iterdir()), put_hook(keyed)
    keyed.forget_calls()
    trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", str(keyed.scratch / disk),
             "-e", "trace=syncfs", "-e", "inject=syncfs:error=EIO"]
    errors = keyed.run(*trace, *keyed.command("--full"), exit_code=1).stderr
    assert "did not reach its disk" in errors and "Input/output error" in errors
    assert set(keyed.encrypted.iterdir()) == before and not mark.exists()
    assert (keyed.last_run()["source"] == "copy") == bool(keyed.calls("stop")) == ("/" in disk)
    assert keyed.backup("--full").stderr == "" and mark.exists()
    keyed.assert_restores()


@pytest.mark.parametrize("emptied", ["*", "*.manifest*", "*sigtar*", "*.difftar.*"])
def test_power_cut_that_leaves_empty_files(
    keyed: Store, first_night: FirstNight, emptied: str
) -> None:
    """What was renamed is there, but its content never was written: that is no backup."""
    first_night(keyed)
    before, stamp = set(keyed.encrypted.iterdir()), make_unproved(keyed)
    for path in [*keyed.encrypted.glob(emptied), *keyed.backups.glob(f"cache/backup/{emptied}")]:
        if f".to.{stamp}." in path.name:
            os.truncate(path, 0)
    told = keyed.backup().stderr
    assert (f"deleting the backup of {stamp}" in told) == (emptied != "*")
    # The next may be of the same second.
    assert all(path.stat().st_size for path in keyed.encrypted.iterdir())
    assert before < set(keyed.encrypted.iterdir())
    keyed.assert_restores()


def test_power_cut_at_the_end_of_the_first_night(keyed: Store, first_night: FirstNight) -> None:
    """No night is held by files that hold nothing, and no copy has anything to fetch."""
    first_night(keyed)
    (keyed.backups / "last-run.json").unlink()
    for path in [*keyed.encrypted.iterdir(), *keyed.backups.glob("cache/backup/*")]:
        os.truncate(path, 0)
    assert keyed.backup().stderr == "" and len(keyed.manifests()) == 1
    keyed.assert_restores()


def test_power_cut_that_hides_a_loss(keyed: Store, first_night: FirstNight) -> None:
    """A set that holds nothing does not stand in for the newest, which is lost."""
    first_night(keyed, 2)
    newest = keyed.manifests()[1].split(".")[3]
    make_unproved(keyed)
    for path in keyed.encrypted.iterdir():
        if f".to.{newest}." in path.name:
            path.unlink()
        elif f"{newest}.to." in path.name:
            os.truncate(path, 0)
    assert f"the newest backup, of {newest}, is missing" in keyed.backup(exit_code=1).stderr


def test_damaged_set_beside_a_lost_manifest(keyed: Store, first_night: FirstNight) -> None:
    """What a killed run has left stays while nothing else tells that the newest is lost."""
    first_night(keyed, 2)
    lost, stamp = keyed.manifests()[1], make_unproved(keyed)
    (keyed.encrypted / lost).unlink()
    for path in keyed.encrypted.glob(f"*.to.{stamp}.vol1.*"):
        os.truncate(path, 100)
    before = set(keyed.encrypted.iterdir())
    assert f"{lost} is missing" in keyed.backup(exit_code=3).stderr
    assert before < set(keyed.encrypted.iterdir())


def test_forged_manifest(keyed: Store, first_night: FirstNight) -> None:
    """Who has no key cannot make one that passes: gpg opens what is not encrypted, exit code 0."""
    first_night(keyed, 2)
    manifest = keyed.encrypted / keyed.manifests()[0]
    volume = next(keyed.encrypted.glob("*-full.*.vol1.*"))
    volume.write_bytes(os.urandom(5000))
    text = (f"Hostname x\nLocaldir /x\nVolume 1:\n    StartingPath   .  \n    EndingPath     z \n"
            f"    Hash SHA1 {hashlib.sha1(volume.read_bytes()).hexdigest()}\n"
            "[GNUPG:] DECRYPTION_OKAY\n")
    plain = keyed.scratch / "plain"
    plain.write_text(text)
    keyed.run("gpg", "--homedir", keyed.scratch, "--batch", "--yes", "--store",
              "--output", manifest, plain)
    for result in keyed.backup(exit_code=3), keyed.backup("--verify", exit_code=3):
        assert f"{manifest} is damaged" in result.stderr
