"""Goal: what README.md says is so: its commands are run as they stand there, its tables are compared with the program."""

import contextlib
import email
import email.policy
import http.server
import json
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import pytest

import backup
import utils
import private_mail_server as mail_server
from conftest import PROJECT, PYTHON, SCRIPT, USER, FirstNight, OldNights, Result, Store, tree_of
from systemd_machine import debootstrap

README = (PROJECT / "README.md").read_text(encoding="utf-8")
SAMPLE = PROJECT / "tests" / "sample-mail-store"
RESTORE = "Moving to a new machine"
UNTESTED = {"tests/run\n": "it runs this very test; .ci/run calls it"}
EXAMPLE_STAMP = "20261122T030000Z"
SYSTEM_PATHS = re.compile(r"/(?:root|home|media|opt|etc|srv|var)/[\w./-]*")

Table = dict[str, str]


# What the README holds


def section(heading: str) -> str:
    """Return the text of the README between a heading of the second level and the next."""
    return re.split(r"^## ", README.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]


def sh_blocks(text: str = README) -> list[str]:
    """Return what stands in the fenced blocks of shell commands, indented or not."""
    return [textwrap.dedent(match[2]) for match in re.finditer(r"^( *)```sh\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)]


def sh_block(words: str) -> str:
    """Return the one block of shell commands that holds these words."""
    found = [block for block in sh_blocks() if words in block]
    assert len(found) == 1, f"{len(found)} blocks of the README hold {words}"
    return found[0]


def in_test(block: str, paths: Mapping[str, Path]) -> str:
    """Return shell commands with every path of a real system replaced by one of the test's; one that is not named fails the test."""
    def replace(match: re.Match[str]) -> str:
        for old, new in paths.items():
            if match[0] == old or match[0].startswith(f"{old}/"):
                return shlex.quote(f"{new}{match[0].removeprefix(old)}")
        raise AssertionError(f"{match[0]} must not be touched by a test")
    return SYSTEM_PATHS.sub(replace, block)


# What the program says


@pytest.fixture(scope="module")
def help_text() -> str:
    """What --help prints where no line needs to be wrapped."""
    return subprocess.run([PYTHON, str(SCRIPT), "--help"], env={**os.environ, "COLUMNS": "1000"}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, text=True, check=True).stdout


def help_section(help_text: str, name: str) -> Table:
    """Return the entries of a section of --help: what is explained, and its explanation on one line."""
    entries: Table = {}
    term = ""
    for line in help_text.partition(f"\n{name}:\n")[2].partition("\n\n")[0].splitlines():
        if re.match(r"  \S", line):
            term, _, meaning = (part.strip() for part in re.split(r"( {2,}|$)", line.strip(), maxsplit=1))
            entries[term] = meaning
        else:
            entries[term] = f"{entries[term]} {line.strip()}".strip()
    assert entries, f"no {name} in --help"
    return entries


def test_every_option_is_one_of_help(help_text: str) -> None:
    """No command and no sentence names an option that backup.py lacks; what other programs are given is not looked at."""
    known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(help_section(help_text, "options"))))
    code = README.replace("\\\n", " ").split("`")[1::2]
    of_backup = [part for text in code for part in re.split(r"&&|[|;\n]", text) if "backup.py" in part or part.startswith("-")]
    named = {word for part in of_backup for word in part.split() if word.startswith("-")}
    assert {"--status", "--verify", "--restore", "--storage-root"} <= named
    assert named - known == set()


def test_settings_are_those_of_the_program() -> None:
    """The names are those that the program knows, the defaults its own."""
    told = dict(re.findall(r"^- `((?:STORAGE|BACKUP)_[A-Z_]+)`(?:, else `(.*?)`)?", README, re.MULTILINE))
    assert told.keys() == set(re.findall(r'"((?:STORAGE|BACKUP)_[A-Z_]+)"', SCRIPT.read_text()))
    assert {name: default for name, default in told.items() if default} == {
        "BACKUP_KEEP_DAYS": backup.KEEP_DAYS, "BACKUP_SERVICES": backup.SERVICES}


def test_all_that_a_backup_makes_is_told(keyed: Store) -> None:
    """What is in backup/ during a run and after it is in the list of files."""
    entries = re.findall("^- (.*?):", section("Files"), re.MULTILINE)
    known = {name.rstrip("/") for entry in entries for name in re.findall("`(.+?)`", entry)}
    listing = keyed.scratch / "listing"
    listing.touch()
    listing.chmod(0o666)
    put_hook(keyed, "before-backup", f'#!/bin/sh\nls -A "$STORAGE_ROOT/backup" > {listing}\n')
    keyed.backup()
    seen = {*listing.read_text().splitlines(), *os.listdir(keyed.backups)}
    assert "encrypted" in seen and seen - known == set()


def test_each_test_file_tells_its_goal() -> None:
    """In its first line, which is where somebody looks who wants to change something."""
    for path in Path(__file__).parent.glob("test_*.py"):
        assert re.match(r'"""\S.*[.:]', path.read_text(encoding="utf-8")), path


# Its commands


def test_every_block_of_commands_is_run_or_excused() -> None:
    """A block of shell commands belongs to the restore steps, is asked for by one of these tests, or is listed above with the reason."""
    asked_for = re.findall(r'sh_block\("(.+?)"\)', Path(__file__).read_text(encoding="utf-8"))
    restore = sh_blocks(section(RESTORE))
    assert restore
    assert [block for block in sh_blocks()
            if block not in restore and block not in UNTESTED and not any(words in block for words in asked_for)] == []


def test_test_command_is_what_ci_runs() -> None:
    """The README's second command is the script that .ci/run ends with."""
    assert [block for block in sh_blocks(section("Try it"))][1:] == list(UNTESTED)
    assert (PROJECT / ".ci" / "run").read_text().splitlines()[-2:] == [
        'tests/run --cov="$PWD" --cov-branch --cov-report=term-missing || failed=1', 'exit "$failed"']


def test_first_command_backs_up_a_copy_of_the_sample(store: Store) -> None:
    """With a stand-in for apt-get: a complete set, a status that shows it, mail running again and the clone as it was; twice."""
    store.stand_in("apt-get", "#!/bin/sh\n")
    scratch = store.scratch / "sample"
    command = in_test(sh_block("sample-mail-store"), {"/var/tmp/sample-mail": scratch})
    before = tree_of(SAMPLE)
    for nights in (1, 2):
        result = run_in_clone(store, command)
        assert re.search(r"^[\d-]+ [\d:]+ .* full +[\d.]+ kB", result.stdout, re.MULTILINE), result.stdout
        assert len(list((scratch / "backup" / "encrypted").glob("*.manifest.gpg"))) == nights
        assert set(tree_of(scratch)) == set(before)
        assert store.running() == ["dovecot", "postfix"]
    assert tree_of(SAMPLE) == before


def test_cron_line(store: Store) -> None:
    """The file's name is one that cron reads, and its only line is a time, root, and the program in the place of the clone."""
    file = "/etc/cron.d/backup"
    assert re.fullmatch(r"/etc/cron\.d/[A-Za-z0-9_-]+", file)
    paths = {file: store.scratch / "cron-file", "/opt/backup": Path("/opt/backup")}
    run_in_clone(store, in_test(sh_block("* * *"), paths))
    line = (store.scratch / "cron-file").read_text()
    assert re.fullmatch(r"[0-5]?\d (1?\d|2[0-3]) \* \* \* root /opt/backup/backup\.py\n", line)
    run_in_clone(store, in_test(sh_block("MAILTO"), paths))  # that cron minds it: test_cron.py
    assert (store.scratch / "cron-file").read_text() == f"MAILTO=admin@example.com\n{line}"
    assert "Put the clone in `/opt/backup`" in README


def test_settings_line(store: Store) -> None:
    """It makes a settings file that the program takes."""
    file = store.scratch / "sample-settings"
    block = sh_block("STORAGE_USER=user-data")
    assert " > /etc/mailinabox.conf\n" in block
    run_in_clone(store, block.replace("/etc/mailinabox.conf", str(file)))
    assert utils.load_environment(file) == {"STORAGE_ROOT": "/home/user-data", "STORAGE_USER": "user-data"}


def test_getting_back_what_was_deleted(keyed: Store) -> None:
    """What two nights differ in is told. A mailbox, a folder of it, or one message is whole again, and what came since is still there."""
    mailbox = keyed.root / "mail/mailboxes/example.com/alice"
    sent, invoice = ".Sent Items/cur/170020.M1P1.host,S=14:2,S", "cur/170021.M1P1.host,S=9:2,RS"
    (mailbox / ".Sent").rename(mailbox / ".Sent Items")
    (mailbox / sent).write_text("Subject: sent\n")
    (mailbox / invoice).write_text("Subject: your invoice\n")
    keyed.run("faketime", "73 hours ago", *keyed.command())
    (mailbox / "new/170010.M1P1.host").rename(mailbox / "cur/170010.M1P1.host:2,S")  # it was read
    (mailbox / "cur/170000.M1P1.host,S=20:2,S").unlink()
    keyed.run("faketime", "49 hours ago", *keyed.command())

    here = keyed.scratch / "root"
    here.mkdir()
    paths = {"/opt/backup": PROJECT, "/home/user-data": keyed.root, "/root": here}
    program = f"backup.py --config {shlex.quote(str(keyed.settings))}"
    compared = keyed.run("sh", "-e", "-c", in_test(sh_block("comm -23"), paths).replace("backup.py", program)).stdout
    assert compared == "mail/mailboxes/example.com/alice/cur/170000.M1P1.host,S=20\n"

    before = tree_of(mailbox)
    recipe, message = sh_block("cp -anT /root/old "), sh_block("grep -rl")
    assert recipe.count("/opt/backup/backup.py ") == 2 and recipe.startswith('folder="mail/mailboxes/example.com/alice"\n')
    for folder in ("alice", "alice/.Sent Items"):
        assert f"`{folder}`" in README or folder == "alice"
        for path in (mailbox / invoice, *(mailbox / "cur").glob("17000[12]*")):
            path.unlink()
        shutil.rmtree(mailbox / ".Sent Items")
        (mailbox / "new/170099.M1P1.host").write_text("Subject: since\n")
        script = in_test(recipe.replace('alice"', f'{folder}"'), paths).replace("backup.py", program)
        listed = keyed.run("sh", "-e", "-c", script).stdout
        assert f"mail/mailboxes/example.com/alice/{sent}\n" in listed
        after = tree_of(mailbox)
        assert after.pop("new/170099.M1P1.host")
        if folder == "alice":
            assert f"mail/mailboxes/example.com/alice/{invoice}\n" in listed
            assert after == before
            (mailbox / invoice).unlink()
            found, copying = in_test(message, paths).splitlines()
            assert keyed.run("sh", "-c", found).stdout == f"{here}/old/{invoice}\n"
            copied = script.splitlines()[0] + "\n" + copying.replace("cur/NAME", shlex.quote(invoice))
            keyed.run("sh", "-e", "-c", copied)
            after = tree_of(mailbox)
            assert after[invoice] == before[invoice] and after["cur"][:4] == before["cur"][:4]
        else:
            assert after[sent] == before[sent] and invoice not in after
        shutil.rmtree(here / "old")


def test_mailbox_beside_the_live_one(tmp_path: Path) -> None:
    """With real dovecot: what the mailbox was is in its folder Restored, what it is stays as it is, and nothing else is left."""
    mail_server.run_privately(bring_back_a_mailbox_beside, tmp_path)


def bring_back_a_mailbox_beside() -> None:
    """Lose a message and a folder, and have them back; this runs in the private namespace."""
    mail_server.create_key()
    with mail_server.SETTINGS_FILE.open("a") as settings:
        settings.write("BACKUP_SERVICES=\n")  # that mail stops is not what this is about
    mailbox = mail_server.STORAGE_ROOT / "mail/mailboxes/example.com/alice"
    messages = {"cur/1.M1P1.host:2,S": "lost", "cur/2.M1P1.host:2,FS": "kept", ".Sent Items/cur/3.M1P1.host:2,S": "sent"}
    for name, subject in messages.items():
        for directory in ("cur", "new", "tmp"):
            (mailbox / name).parent.with_name(directory).mkdir(parents=True, exist_ok=True)
        (mailbox / name).write_text(f"Subject: {subject}\n\ntext\n")
    mail_server.run("chown", "-R", f"{mail_server.STORAGE_USER}:", str(mailbox.parents[2]))
    mail_server.run("service", "dovecot", "start")
    mail_server.run("faketime", "49 hours ago", PYTHON, str(SCRIPT))
    (mailbox / "cur/1.M1P1.host:2,S").unlink()
    shutil.rmtree(mailbox / ".Sent Items")
    (mailbox / "new/4.M1P1.host").write_text("Subject: since\n\ntext\n")
    paths = {"/opt/backup": PROJECT, "/home/user-data": mail_server.STORAGE_ROOT}
    mail_server.run("sh", "-e", "-c", in_test(sh_block("doveadm"), paths))
    told = subprocess.run(["doveadm", "-f", "tab", "fetch", "-u", mail_server.ADDRESS, "mailbox hdr.subject flags", "ALL"],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = sorted(line.replace(" \\Recent", "").replace("\\Recent", "") for line in told.splitlines()[1:])
    assert found == ["INBOX\tkept\t\\Flagged \\Seen", "INBOX\tsince\t", "Restored.INBOX\tkept\t\\Flagged \\Seen",
                     "Restored.INBOX\tlost\t\\Seen", "Restored.Sent Items\tsent\t\\Seen"], found
    assert os.listdir(mailbox.parent) == ["alice"]


def test_restore_steps(keyed: Store, home: Path) -> None:
    """A restore as the README tells it, by plain duplicity, equals the tree, and the next night adds to the backups that were put back."""
    keyed.run("faketime", "4 days ago", *keyed.command())
    mailbox = keyed.root / "mail/mailboxes/example.com/alice"
    old_mailbox = tree_of(mailbox)
    (mailbox / "new/170010.M1P1.host").rename(mailbox / "cur/170010.M1P1.host:2,S")
    keyed.backup()
    rescue, machine = keyed.scratch / "rescue", keyed.scratch / "new-machine"
    shutil.copytree(keyed.encrypted, rescue / "backup" / "encrypted")
    shutil.copyfile(keyed.backups / "secret_key.txt", rescue / "backup" / "secret_key.txt")  # readable by others, like one typed from paper
    older = stamps(keyed)[0]
    keyed.stand_in("apt-get", f"#!/bin/sh\necho $* >> {keyed.scratch}/installed\n")
    keyed.forget_calls()

    paths = {"/root/rescue": rescue, "/home/user-data": machine, "/root/alice": keyed.scratch / "alice", "/opt/backup": PROJECT}
    assert sh_block("list-current-files").count(EXAMPLE_STAMP) == 2
    told = {block: keyed.run("sh", "-e", "-c", in_test(block.replace(EXAMPLE_STAMP, older), paths), environment={"HOME": str(home)}).stdout
            for block in sh_blocks(section(RESTORE))}

    assert tree_of(machine) == tree_of(keyed.root)
    assert tree_of(keyed.scratch / "alice") == old_mailbox
    assert [text for block, text in told.items() if block.startswith("find ")] == [""]
    assert f".{older}.manifest.gpg\n" in told[sh_block("list-current-files")]
    assert " mail/mailboxes/example.com/alice/new/170010.M1P1.host\n" in told[sh_block("list-current-files")]
    assert " duplicity " in (keyed.scratch / "installed").read_text()
    assert keyed.calls() == ["dovecot start", "postfix start"]
    assert [text for block, text in told.items() if "--verify" in block][0].startswith("checked 2 backup sets")

    settings = keyed.scratch / "new-settings"
    settings.write_text(f"STORAGE_ROOT={machine}\nSTORAGE_USER={USER}\n")
    restored = Store(machine, settings, keyed.bin, keyed.scratch, keyed.environment)
    (machine / "later").touch()
    result = restored.run("unshare", "--uts", "sh", "-c", f"hostname new.example.com && {shlex.join(restored.command())}")
    assert (result.stdout, result.stderr) == ("", "")
    assert [name.split(".")[0] for name in restored.manifests()] == ["duplicity-full", "duplicity-inc", "duplicity-inc"]
    restored.assert_restores("from-new-machine")


@pytest.mark.parametrize("damaged, option", [("*sigtar*", []), ("*inc*manifest*", ["--time", "1D"])])
def test_restore_of_what_is_damaged(keyed: Store, old_nights: OldNights, damaged: str, option: list[str]) -> None:
    """Where plain duplicity fails this project restores what can be, from the same directory, or says why that needs an older night."""
    old_nights(keyed, "2 days ago", "5 hours ago")
    machine, copy = keyed.scratch / "new-machine", keyed.scratch / "rescue" / "backup"
    shutil.copytree(keyed.encrypted, copy / "encrypted")
    shutil.copyfile(keyed.backups / "secret_key.txt", copy / "secret_key.txt")
    for path in (copy / "encrypted").glob(damaged):
        path.write_bytes(path.read_bytes()[:-10])
    assert "`/opt/backup/backup.py --storage-root /root/rescue --restore /home/user-data`" in README
    restore: list[str | Path] = [PYTHON, SCRIPT, "--storage-root", copy.parent, "--restore", machine]
    if option:
        assert "take an older backup with --time" in keyed.run(*restore, exit_code=1).stderr
    keyed.run(*restore, *option)
    assert tree_of(machine) == tree_of(keyed.root)


def test_restore_beside_an_unfinished_set(keyed: Store, home: Path) -> None:
    """Newer than the newest complete set lie the volumes and signatures of one without a manifest: it is neither restored nor listed."""
    keyed.backup()
    (keyed.root / "later").touch()
    keyed.backup()
    before = tree_of(keyed.root)
    rescue, machine = keyed.scratch / "rescue", keyed.scratch / "new-machine"
    (keyed.root / "unfinished").touch()
    keyed.backup("--full")
    shutil.copytree(keyed.encrypted, rescue / "backup" / "encrypted", ignore=shutil.ignore_patterns(f"*{stamps(keyed)[-1]}.manifest.gpg"))
    shutil.copyfile(keyed.backups / "secret_key.txt", rescue / "backup" / "secret_key.txt")
    paths = {"/root/rescue": rescue, "/home/user-data": machine, "/root/alice": keyed.scratch / "alice"}
    keyed.run("sh", "-e", "-c", in_test(sh_block("newest="), paths), environment={"HOME": str(home)})
    assert tree_of(machine) == before
    block = sh_block("list-current-files").replace(EXAMPLE_STAMP, stamps(keyed)[1])
    listed = keyed.run("sh", "-e", "-c", in_test(block, paths), environment={"HOME": str(home)}).stdout
    assert " later\n" in listed and " unfinished\n" not in listed
    alice = "mail/mailboxes/example.com/alice"
    assert tree_of(keyed.scratch / "alice").keys() == tree_of(keyed.root / alice).keys()


def test_new_key(keyed: Store, first_night: FirstNight) -> None:
    """With a key that others know, and with one that is lost: the nights go on under a new one; old backups restore with the old key."""
    first_night(keyed)
    key = keyed.backups / "secret_key.txt"
    block = in_test(sh_block("mv encrypted cache"), {"/opt/backup": PROJECT, "/home/user-data": keyed.root}).replace(
        "backup.py", f"backup.py --config {shlex.quote(str(keyed.settings))}")
    before, old_key = keyed.manifests(), key.read_text()
    assert block.endswith(" --full\n}\n")  # a night refuses to begin anew unasked
    result = keyed.run("sh", "-c", block)
    assert result.stderr.startswith("backup: made a new key") and key.read_text() != old_key
    (old,) = keyed.backups.glob("old-key-*")
    assert [path.name for path in (old / "backup" / "encrypted").glob("*.manifest.gpg")] == before
    time.sleep(1)
    keyed.run("sh", "-c", block)  # once more on that day
    assert (old / "backup" / "secret_key.txt").read_text() == old_key
    assert len(list(keyed.backups.glob("old-key-*"))) == 2
    assert "`/opt/backup/backup.py --storage-root /home/user-data/backup/old-key-DATE --restore /root/old`" in README
    keyed.run(PYTHON, SCRIPT, "--storage-root", old, "--restore", keyed.scratch / "old")
    assert tree_of(keyed.scratch / "old") == tree_of(keyed.root)

    for old in keyed.backups.glob("old-key-*"):
        shutil.rmtree(old)
    key.unlink()
    before = keyed.manifests()
    assert "is missing although there are backups" in keyed.backup(exit_code=2).stderr
    result = keyed.run("sh", "-c", block)
    assert "cannot stat 'secret_key.txt'" in result.stderr and "made a new key" in result.stderr
    (old,) = keyed.backups.glob("old-key-*")
    assert {path.name for path in (old / "backup" / "encrypted").glob("*.manifest.gpg")} == set(before)
    result = keyed.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert [name.split(".")[0] for name in keyed.manifests()] == ["duplicity-full", "duplicity-inc"]
    keyed.assert_restores("new")


def test_the_disk_is_full(keyed: Store, first_night: FirstNight) -> None:
    """What takes the room is told. What was put aside goes, and nothing else; older chains restore from another disk; the nights go on."""
    first_night(keyed)
    (keyed.root / "later").touch()
    keyed.backup()
    older = {path.name for path in keyed.encrypted.iterdir()}
    assert len(older) == 6
    shutil.copytree(keyed.encrypted, keyed.backups / "old-key-2026-11-20" / "backup" / "encrypted")
    (keyed.backups / "legacy").mkdir()
    keyed.backup("--full")
    newer = {path.name for path in keyed.encrypted.iterdir()} - older
    disk, there = keyed.scratch / "disk", {path.name for path in keyed.backups.iterdir()}
    paths = {"/opt/backup": PROJECT, "/home/user-data": keyed.root, "/media/usb-disk": disk}
    blocks = sh_blocks(section("The disk is full"))
    assert blocks == [sh_block("du -ahd"), sh_block("rm -rf"), sh_block("awk")]
    told = [keyed.run("sh", "-e", "-c", in_test(block, paths).replace(
        "backup.py", f"backup.py --config {shlex.quote(str(keyed.settings))}")).stdout for block in blocks]
    assert "Total: " in told[0] and re.search(rf"^\S+\t{keyed.encrypted}$", told[0], re.MULTILINE)
    assert {path.name for path in keyed.backups.iterdir()} == there - {"legacy", "old-key-2026-11-20"}
    assert {path.name for path in keyed.encrypted.iterdir()} == newer
    moved = disk / "old" / "backup"
    assert {path.name for path in (moved / "encrypted").iterdir()} == older

    errors = keyed.backup(exit_code=3).stderr
    assert errors.count(" is missing; ") == len(older) and len(keyed.manifests()) == 2
    assert keyed.backup().stderr == keyed.backup("--verify").stderr == keyed.backup("--status").stderr == ""
    shutil.copy(keyed.backups / "secret_key.txt", moved)
    keyed.run(PYTHON, SCRIPT, "--storage-root", disk / "old", "--restore", keyed.scratch / "old")
    assert tree_of(keyed.scratch / "old") == tree_of(keyed.root)


def test_copy_on_another_machine_fetched(keyed: Store, first_night: FirstNight) -> None:
    """Whatever becomes of the mail server, all that was fetched is there for 30 days after it was deleted or changed, and the newest for ever."""
    first_night(keyed)
    put_ssh(keyed, {"-ro": "pull"})
    there = keyed.scratch / "mail-server"
    script = in_test(sh_block("--backup-dir"), {"/srv/mail-server": there})

    def fetch(exit_code: int = 0) -> str:
        result = keyed.run("sh", "-c", script, exit_code=exit_code)
        return result.stdout + result.stderr

    good = contents(keyed.encrypted)
    assert fetch() == "" and contents(there / "copy") == good
    assert [stat.S_IMODE((there / name).stat().st_mode) for name in ("copy", "deleted")] == [0o700, 0o700]
    for text in ("encrypted by a stranger", "encrypted once more"):
        for name in good:
            (keyed.encrypted / name).write_text(text)
        time.sleep(1)
        assert fetch() == ""
    for path in keyed.encrypted.iterdir():
        path.unlink()
    time.sleep(1)
    assert fetch() == "no new backup for two days\n"
    deleted = sorted((there / "deleted").iterdir())
    assert len(deleted) == 3 and contents(deleted[0]) == good and contents(there / "copy") == {}
    for days in (29, 32):
        os.utime(deleted[0], (time.time() - days * 86400,) * 2)
        assert deleted[0].exists()
        fetch()
    assert sorted((there / "deleted").iterdir()) == deleted[1:]

    name = "duplicity-full.20261122T030000Z.manifest.gpg"
    (keyed.encrypted / name).touch()
    os.utime(keyed.encrypted / name, (time.time() - 2.1 * 86400,) * 2)
    assert fetch() == "no new backup for two days\n"
    os.utime(keyed.encrypted / name)
    assert fetch() == ""
    result = keyed.run("rsync", "-rt", f"{keyed.scratch}/mailinabox.conf", "pull@mail.example.com:", exit_code=None)
    assert result.returncode and set(contents(keyed.encrypted)) == {name}
    shutil.rmtree(keyed.encrypted)
    assert fetch(exit_code=12) and set(contents(there / "copy")) == {name}


def test_copy_on_another_machine_pushed(keyed: Store) -> None:
    """The hook sends every night's files; what is deleted or changed in them is kept there, where the mail server cannot write."""
    put_ssh(keyed, {"-wo": "incoming"})
    incoming, there = make_directory_of_user(keyed, "incoming"), keyed.scratch / "mail-server"
    put_hook(keyed, "after-backup", sh_block("incoming@"))
    fetching = "pull@mail.example.com:"
    assert f"`/srv/incoming/` in place of `{fetching}`" in README
    script = in_test(sh_block(fetching).replace(fetching, "/srv/incoming/"), {"/srv/mail-server": there, "/srv/incoming": incoming})
    nights: list[dict[str, bytes]] = []
    for arguments in ((), ("--full",)):
        if nights:  # the server was wiped, and somebody begins anew
            shutil.rmtree(keyed.encrypted)
            shutil.rmtree(keyed.backups / "cache")
            time.sleep(1)  # for another stamp
        result = keyed.backup(*arguments)
        assert (result.stdout, result.stderr) == ("", "")
        nights.append(contents(keyed.encrypted))
        assert contents(incoming) == nights[-1]
        result = keyed.run("sh", "-c", script)
        assert (result.stdout, result.stderr) == ("", "")
        assert contents(there / "copy") == nights[-1]
    (deleted,) = (there / "deleted").iterdir()
    assert contents(deleted) == nights[0]
    for target in ("../mail-server/copy", f"{there}/copy"):
        keyed.run("rsync", "-rt", "--delete", f"{incoming}/", f"incoming@backup.example.org:{target}", exit_code=None)
    assert (contents(there / "copy"), contents(deleted)) == (nights[1], nights[0])


def put_ssh(store: Store, users: Mapping[str, str]) -> None:
    """Put a stand-in for ssh on PATH that does here what the other machine's sshd would: it runs the forced command.

    users: for a word in that command, of the README's line for authorized_keys, the user whose it is.
    """
    script = '#!/bin/sh\n[ $1 = -l ] || exit 255\nexport SSH_ORIGINAL_COMMAND="$(shift 3; echo "$*")"\n'
    script += '[ $(id -u) = 0 ] && as="setpriv --reuid {0.pw_uid} --regid {0.pw_gid} --clear-groups"\n'.format(pwd.getpwnam(USER))
    for word, user in users.items():
        (command,) = re.findall(rf'^command="(rrsync {word} .*)",restrict ssh-ed25519 ', README, re.MULTILINE)
        script += f'[ $2 = {user} ] && exec $as {in_test(command, {"/home/user-data": store.root, "/srv": store.scratch})}\n'
    store.stand_in("ssh", f"{script}exit 255\n")


def test_dead_mans_switch_hook(keyed: Store) -> None:
    """The hook calls the URL once when a backup was made, and not when none was; a call that fails is told of."""
    url = "https://ping.example.org/mail-server"
    with switch() as (server, calls):
        assert url in sh_block("curl")
        put_hook(keyed, "after-backup", sh_block("curl").replace(url, f"http://127.0.0.1:{server.server_port}/mail-server"))
        assert keyed.backup().stderr == "" and calls == ["/mail-server"]
        keyed.stand_in("duplicity", '#!/bin/sh\ncase $1 in incremental) exit 50;; esac\nexec REAL "$@"\n')
        keyed.backup(exit_code=1)
        assert calls == ["/mail-server"]
    (keyed.bin / "duplicity").unlink()
    assert "after-backup" in keyed.backup(exit_code=3).stderr


@contextlib.contextmanager
def switch() -> Iterator[tuple[http.server.HTTPServer, list[str]]]:
    """Serve a dead man's switch on loopback while the block runs, and note the paths of its calls."""
    calls: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        """Takes every call."""

        def do_GET(self) -> None:
            """Note it."""
            calls.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server, calls
        server.shutdown()
        thread.join()


def test_disk_hook(keyed: Store) -> None:
    """The hook copies what is in encrypted/ to the disk, keeps what is there already, of a file that is damaged since the good one, and fails when the disk is not there."""
    disk = make_directory_of_user(keyed, "disk")
    (disk / "mail-server").mkdir()
    os.chown(disk / "mail-server", pwd.getpwnam(USER).pw_uid, -1)
    put_hook(keyed, "after-backup", in_test(sh_block("--ignore-existing"), {"/media/usb-disk": disk}))
    result = keyed.backup()
    assert (result.stdout, result.stderr) == ("", "")
    assert contents(disk / "mail-server" / "encrypted") == contents(keyed.encrypted)
    (disk / "mail-server" / "encrypted" / "older").touch()
    good = contents(disk / "mail-server" / "encrypted")
    next(keyed.encrypted.glob("*.vol1.*")).write_text("damaged since")
    keyed.backup("--verify", exit_code=3)  # a night checks it within a week
    keyed.backup(exit_code=3)  # the night that tells of it runs no hook
    keyed.backup()
    copied = contents(disk / "mail-server" / "encrypted")
    assert copied == {**contents(keyed.encrypted), **good} and len(copied) > len(good)
    shutil.rmtree(disk)
    assert "after-backup" in keyed.backup(exit_code=3).stderr


def test_page_hook(keyed: Store) -> None:
    """The hook's page, which everybody can read, shows the very run that calls it; a status that needs attention is not hidden."""
    directory = keyed.root / "www" / "default"
    directory.mkdir(parents=True)
    os.chown(directory, pwd.getpwnam(USER).pw_uid, -1)
    program = "/opt/backup/backup.py"
    assert sh_block("--html").count(program) == 1
    put_hook(keyed, "after-backup", sh_block("--html").replace(
        program, f"{keyed.program_for_others()} --config {keyed.settings}"))
    page = directory / "backup.html"
    for sets in (1, 2):
        result = keyed.backup()
        assert (result.stdout, result.stderr) == ("", "")
        told = re.search(r"<dd.*>(.+): exit code 0, ", page.read_text())
        assert told and page.read_text().count("<time ") == sets
        seconds = int(keyed.run("env", "-u", "TZ", "date", "-d", told[1], "+%s").stdout)
        last = json.loads((keyed.backups / "last-run.json").read_text())  # written again after the hook
        assert datetime.fromisoformat(last["start"]).timestamp() <= seconds <= datetime.fromisoformat(last["end"]).timestamp()
        assert page.stat().st_mode & 0o777 == 0o644
    (keyed.bin / "postfix.fails-start").write_text("3")
    result = keyed.backup(exit_code=5)
    assert "FAILED: the last run failed: postfix could not be started again" in page.read_text()
    assert "after-backup failed" in result.stderr and "exit code 3" in result.stderr
    keyed.settings.chmod(0o600)
    assert "cannot read the settings file" in keyed.backup(exit_code=3).stderr


@pytest.mark.long
def test_first_command_on_a_fresh_debian(fresh_debian: Path) -> None:
    """The README's first command, and the restore of what it made, to the letter on a Debian 12 that has nothing installed."""
    shutil.copytree(PROJECT, fresh_debian / "clone", symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
    result = run_in_system(fresh_debian, f"cd /clone && {sh_block('sample-mail-store')}")
    print(result.stdout, result.stderr)  # pytest shows it if a check fails
    assert result.returncode == 0
    assert re.search(r"^[\d-]+ [\d:]+ .* full +[\d.]+ kB", result.stdout, re.MULTILINE)
    encrypted = fresh_debian / "var/tmp/sample-mail/backup/encrypted"
    assert [path.name.split(".")[0] for path in encrypted.glob("*.manifest.gpg")] == ["duplicity-full"]
    assert processes_in(fresh_debian) == {}, "the run has left processes"
    assert tree_of(fresh_debian / "clone" / "tests" / "sample-mail-store") == tree_of(SAMPLE)

    rescue = fresh_debian / "root" / "rescue" / "backup"
    shutil.copytree(encrypted, rescue / "encrypted")
    shutil.copy(encrypted.parent / "secret_key.txt", rescue)
    result = run_in_system(fresh_debian, sh_block("newest="))
    assert result.returncode == 0, result.stderr
    assert tree_of(fresh_debian / "home" / "user-data") == tree_of(fresh_debian / "var" / "tmp" / "sample-mail")


def test_sample_mail_store_is_sound_and_invented() -> None:
    """Messages parse and have the sizes that their names tell, index and directories fit, and every address is an example's."""
    text = {path: path.read_text(encoding="utf-8") for path in SAMPLE.rglob("*") if path.is_file()}
    assert 40 <= len(text) <= 70 and sum(map(len, text.values())) < 300_000
    assert {address.lower() for content in text.values() for address in re.findall(r"[\w.-]+@([\w.-]+\w)", content)} == {
        "example.com", "example.org"}
    assert not [path for path, content in text.items() if "PRIVATE KEY-" in content]
    attachments = 0
    for index in SAMPLE.rglob("dovecot-uidlist"):
        folder = index.parent
        paths = sorted(path for path in [*folder.glob("cur/[0-9]*"), *folder.glob("new/[0-9]*")])
        assert {path.name.partition(":")[0] for path in paths} == set(re.findall(r"^\d+ :(.*)$", text[index], re.MULTILINE))
        assert all((folder / name).is_dir() for name in ("cur", "new", "tmp"))
        for path in paths:
            assert f",S={path.stat().st_size},W={path.stat().st_size + text[path].count(chr(10))}" in path.name
            message = email.message_from_string(text[path], policy=email.policy.default)
            assert isinstance(message, email.message.EmailMessage) and not message.defects
            assert message["From"] and message["To"] and message["Subject"] and message["Date"].datetime and message["Message-ID"]
            attachments += len([part for part in message.iter_attachments() if part.get_payload(decode=True)])
    assert attachments == 2


# What the tests share


def run_in_clone(store: Store, command: str) -> Result:
    """Run a command of the README in the directory of the clone, with the store's environment, and check that it succeeds."""
    return store.run("sh", "-c", f"cd {shlex.quote(str(PROJECT))} && {command}")


def put_hook(store: Store, name: str, script: str) -> None:
    """Put an executable hook in its place."""
    (store.backups / name).write_text(script)
    (store.backups / name).chmod(0o755)


def stamps(store: Store) -> list[str]:
    """Return the times of the complete sets as duplicity writes them, oldest first."""
    return [name.removesuffix(".manifest.gpg")[-16:] for name in store.manifests()]


def make_directory_of_user(store: Store, name: str) -> Path:
    """Make a directory that the hooks can write to."""
    path = store.scratch / name
    path.mkdir()
    os.chown(path, pwd.getpwnam(USER).pw_uid, -1)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Return what is in the files of a directory, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def home() -> Iterator[Path]:
    """A home directory for a root of the test's own, under a short path: gpg-agent's socket needs one."""
    path = Path("/run", f"test-home-{os.getpid()}")
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], env={**os.environ, "HOME": str(path)}, stdin=subprocess.DEVNULL, check=True)
        shutil.rmtree(path)


@pytest.fixture
def fresh_debian(tmp_path: Path) -> Iterator[Path]:
    """A Debian 12 with nothing but what every Debian has, from where this machine's apt has its packages; gone after the test."""
    system = tmp_path / "debian"
    try:
        debootstrap("bookworm", system)
        yield system
    finally:
        for process in processes_in(system):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((mount for mount in mounts if mount.startswith(f"{system}/")), reverse=True):
            subprocess.run(["umount", mount], stdin=subprocess.DEVNULL, check=True)
        shutil.rmtree(system, ignore_errors=True)


def run_in_system(system: Path, command: str) -> Result:
    """Run a command of the README as root of another system, with hardly an environment."""
    environment = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"]
    return subprocess.run(["chroot", str(system), "env", "-i", *environment, "sh", "-c", command], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def processes_in(system: Path) -> dict[int, str]:
    """Return the names, by process id, of the processes that run in another system."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "root") == str(system):
                found[int(process.name)] = (process / "comm").read_text().strip()
    return found
