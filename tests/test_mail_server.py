"""With real dovecot, postfix, duplicity and gpg, the tree while mail was stopped is restored."""
import contextlib
import email
import imaplib
import itertools
import os
import secrets
import shlex
import signal
import smtplib
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from private_mail_server import (
    BACKUP_DIRECTORY, BACKUP_PROGRAM, IMAP_PORT, KEY_FILE, SETTINGS_FILE, SHARED_DIRECTORY,
    SMTP_PORT, STORAGE_ROOT, Mail, PortWatcher, create_key, describe_tree, imap_messages,
    manifests, open_inbox, run, run_privately, running_commands, send_message, serve_mail_of,
    start_services, subjects, submit_message, wait_until)

RESTART_SECONDS = 15
RUN_MARK = "STARTED_BY_THE_KILLED_RUN"


def test_full_and_incremental_restore_what_was_there(tmp_path: Path) -> None:
    """A full and then an incremental backup restore the tree while mail was stopped.

    They do so byte for byte, and dovecot reads it.
    """
    run_privately(back_up_and_restore_twice, tmp_path)


def test_mail_that_arrives_during_the_backup(tmp_path: Path) -> None:
    """While mail keeps arriving, the backup is the tree of the moment when mail was stopped.

    No message is lost.
    """
    run_privately(back_up_while_mail_arrives, tmp_path)


def test_sigkill_while_dovecot_stops(tmp_path: Path) -> None:
    """Killed while dovecot is being stopped, a run leaves nothing, and the next run is good.

    Here and below it dies by SIGKILL, and mail comes back by itself.
    """
    run_privately(kill_while_dovecot_stops, tmp_path)


def test_sigkill_while_mail_is_down(tmp_path: Path) -> None:
    """Killed when both services have stopped, a run leaves nothing, and the next run is good."""
    run_privately(kill_while_mail_is_down, tmp_path)


def test_sigkill_while_duplicity_runs(tmp_path: Path) -> None:
    """Killed while duplicity reads the tree, a run leaves nothing, and the next run is good.

    Mail may not have been down.
    """
    run_privately(kill_while_duplicity_runs, tmp_path)


# Scenarios: these run in the private namespace.

def back_up_and_restore_twice() -> None:
    """A full backup; then new mail, a changed flag, a deletion and an incremental one."""
    start_services()
    create_key()
    create_other_user_data()
    for subject in ("kept", "read later", "deleted later"):
        send_message(subject)
    with open_inbox(readonly=False):
        pass  # this moves the messages from new/ to cur/
    send_message("not seen yet")

    back_up_and_restore("full")

    with open_inbox(readonly=False) as imap:
        imap.store("2", "+FLAGS", r"(\Seen)")
        imap.store("3", "+FLAGS", r"(\Deleted)")
        imap.expunge()
    send_message("new mail")
    messages = back_up_and_restore("inc")

    found = [(subject, br"\Seen" in message.flags)
             for subject, message in zip(subjects(messages), messages)]
    assert found == [
        ("kept", False), ("read later", True), ("not seen yet", False), ("new mail", False)], found


def back_up_while_mail_arrives() -> None:
    """Two backups, while a client sends a message every 20 ms and another reads by IMAP.

    The first is a full one, the other incremental.
    """
    start_services()
    create_key()
    send_message("message before the backup")
    accepted: dict[str, float] = {}
    seen: dict[str, float] = {}
    finished = threading.Event()

    def keep_sending() -> None:
        for number in itertools.count():
            if finished.wait(0.02):
                return
            with contextlib.suppress(OSError, smtplib.SMTPException):
                submit_message(f"message {number}")
                accepted[f"message {number}"] = time.time()

    def keep_reading() -> None:
        while not finished.wait(0.1):
            with contextlib.suppress(OSError, imaplib.IMAP4.error):
                asked = time.time()
                for subject in subjects(imap_messages()):
                    seen.setdefault(subject, asked)

    clients = [threading.Thread(target=client) for client in (keep_sending, keep_reading)]
    for client in clients:
        client.start()
    try:
        wait_until(lambda: len(seen) > 5, "mail flows")
        for kind in ("full", "inc"):
            before = set(seen)
            restored = back_up_and_compare(kind)
            stopped = (SHARED_DIRECTORY / f"{kind}-tree-service" / "stopped").stat().st_mtime
            messages = [path for place in ("cur", "new") for path in restored.rglob(f"{place}/*")]
            inside = {email.message_from_bytes(path.read_bytes())["Subject"] for path in messages}
            confirmed = {subject for subject, at in seen.items() if at < stopped}
            assert before <= confirmed <= inside, confirmed - inside
            gap = min(at for at in accepted.values() if at > stopped + 0.5) - stopped
            assert gap < RESTART_SECONDS
            print(f"{kind}: {len(confirmed)} messages seen before the stop, all inside;",
                  f"{gap:.1f} s without mail")
    finally:
        finished.set()
        for client in clients:
            client.join()
    run("postqueue", "-f")  # what dovecot could not take has to wait for minutes otherwise
    wait_until(lambda: set(accepted) <= set(subjects(imap_messages())),
               "every message that postfix accepted is there")


def runs(*words: str) -> bool:
    """Return whether a process of the run has all of these in its command line."""
    return any(all(word in command for word in words) for command in running_commands(RUN_MARK))


def kill_while_dovecot_stops() -> None:
    """Kill the program while `service dovecot stop` is under way, which takes a second or two."""
    kill_and_back_up_again(lambda watcher: runs("service dovecot stop"))


def kill_while_mail_is_down() -> None:
    """Kill the program when both have stopped."""
    ports = (IMAP_PORT, SMTP_PORT)
    kill_and_back_up_again(lambda watcher: all(watcher.has_been_down(port) for port in ports))


def kill_while_duplicity_runs() -> None:
    """Kill the program while duplicity makes the backup, whether mail is down for it or not."""
    # On a busy machine it would be done with less before it is looked for.
    (STORAGE_ROOT / "large").write_bytes(os.urandom(30_000_000))
    kill_and_back_up_again(lambda watcher: runs("duplicity", " full "))


def kill_and_back_up_again(moment: Callable[[PortWatcher], bool]) -> None:
    """Kill a run as soon as `moment` holds, then make a backup after all.

    Between them all that must come back or end is waited for.
    """
    start_services()
    create_key()
    send_message("before the kill")
    with PortWatcher() as watcher:
        environment = {**os.environ, "PATH": service_that_can_be_seen(), RUN_MARK: "1"}
        backup = subprocess.Popen(backup_command(), stdin=subprocess.DEVNULL, env=environment)
        wait_until(lambda: moment(watcher) or backup.poll() is not None, "the moment to kill it")
        backup.kill()
        assert backup.wait() == -signal.SIGKILL, f"ended with {backup.returncode} before that"
        print("Running after the kill:", *running_commands(RUN_MARK), sep="\n", flush=True)
        restarted = [[True, False, True]] * 2
        wait_until(lambda: [watcher.states(port) for port in (SMTP_PORT, IMAP_PORT)] == restarted,
                   "both ports have been closed and are open again", RESTART_SECONDS)
        wait_until(lambda: not left_by_killed_run(),
                   "nothing of the run is left running", RESTART_SECONDS)
    assert not manifests(), "the killed run went on and completed its set"
    send_message("after the kill")
    back_up_and_restore("full")
    assert not running_commands(RUN_MARK), running_commands(RUN_MARK)


def left_by_killed_run() -> list[str]:
    """Return what of the killed run still runs.

    gpg's agent is left out: that is for the next run to end.
    """
    commands = running_commands(RUN_MARK)
    return [command for command in commands if not command.startswith("gpg-agent ")]


# What the scenarios are made of.

def create_other_user_data() -> None:
    """Add what a mail server's user data holds beside mail, and what is easily lost.

    That is modes, links, empty directories and odd names.
    """
    certificates = STORAGE_ROOT / "ssl"
    certificates.mkdir(mode=0o700)
    private_key = certificates / "ssl_private_key.pem"
    private_key.touch(mode=0o600)
    private_key.write_bytes(secrets.token_bytes(3000))
    (certificates / "ssl_certificate.pem").symlink_to("example.com-2026.pem")
    (STORAGE_ROOT / "www" / "empty directory").mkdir(parents=True)
    (STORAGE_ROOT / "www" / "Grüße [1]*.html").write_text("<p>Grüße</p>\n")
    Path(os.fsdecode(bytes(STORAGE_ROOT) + b"/www/name in Latin-1: \xe4")).touch()
    os.mkfifo(STORAGE_ROOT / "www" / "fifo", 0o620)


def back_up_and_restore(kind: str) -> list[Mail]:
    """Make a backup of this kind, `full` or `inc`, restore and compare it.

    Returns the mail that dovecot reads from it.
    """
    messages = imap_messages()
    restored = back_up_and_compare(kind)
    serve_mail_of(restored)
    restored_messages = imap_messages()
    assert restored_messages == messages, f"{restored_messages} is not {messages}"
    serve_mail_of(STORAGE_ROOT)
    assert imap_messages() == messages
    return restored_messages


def back_up_and_compare(kind: str) -> Path:
    """Make a backup that must be of this kind, `full` or `inc`, and return where it is restored.

    It must be equal to the tree while mail was stopped.
    """
    tree_while_stopped = SHARED_DIRECTORY / f"{kind}-tree"
    restored = SHARED_DIRECTORY / f"{kind}-restored"
    earlier_manifests = manifests()

    output, watcher = back_up(service_that_copies_the_tree(tree_while_stopped))

    assert output == "", output
    for port in (SMTP_PORT, IMAP_PORT):
        assert watcher.states(port) == [True, False, True], watcher.transitions
    new_manifests = manifests() - earlier_manifests
    assert [name.split(".")[0] for name in new_manifests] == [f"duplicity-{kind}"], new_manifests

    restore(restored)
    expected, found = describe_tree(tree_while_stopped), describe_tree(restored)
    different = [f"{name!r}: expected {expected.get(name)}, restored {found.get(name)}"
                 for name in sorted(expected.keys() | found.keys())
                 if expected.get(name) != found.get(name)]
    assert not different, "\n".join(different)
    return restored


def backup_command() -> list[str]:
    """Return the command line of the program under test."""
    return ["/usr/bin/python3", str(BACKUP_PROGRAM), "--config", str(SETTINGS_FILE)]


def back_up(path: str) -> tuple[str, PortWatcher]:
    """Run the program with this PATH while both ports are watched; it must exit 0.

    Returns what it printed and the watcher.
    """
    printed = SHARED_DIRECTORY / "printed"
    with printed.open("wb") as output, PortWatcher() as watcher:
        result = subprocess.run(
            backup_command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**os.environ, "PATH": path})
    text = printed.read_text(errors="replace")
    assert result.returncode == 0, f"exit code {result.returncode}:\n{text}"
    return text, watcher


def service_that_can_be_seen() -> str:
    """Return a PATH with a `service` to be seen at work, with its arguments and the run's mark.

    The real one is replaced at once by a program that has neither.
    """
    directory = SHARED_DIRECTORY / "visible-service"
    directory.mkdir()
    (directory / "service").write_text('#!/bin/sh\n/usr/sbin/service "$@"\nexit $?\n')
    (directory / "service").chmod(0o755)
    return f'{directory}:{os.environ["PATH"]}'


def service_that_copies_the_tree(copy: Path) -> str:
    """Return a PATH with a `service` that copies STORAGE_ROOT before the first start.

    All mail services are stopped still then; after the start dovecot may write to its indexes at
    any moment.
    """
    directory = copy.with_name(f"{copy.name}-service")
    directory.mkdir()
    service = directory / "service"
    stopped, copied = shlex.quote(f"{directory}/stopped"), shlex.quote(str(copy))
    service.write_text(f"""#!/bin/sh
if [ "$2" = stop ] && [ ! -e {stopped} ]; then
    touch {stopped}
fi
if [ "$2" = start ] && [ ! -e {copied} ]; then
    cp -a {shlex.quote(str(STORAGE_ROOT))} {copied}
fi
exec /usr/sbin/service "$@"
""")
    service.chmod(0o755)
    return f'{directory}:{os.environ["PATH"]}'


def restore(destination: Path) -> None:
    """Restore the newest backup with nothing but duplicity, the encrypted files and the key.

    It is done as the README tells it.
    """
    command = ["duplicity", "restore", "--archive-dir", "/run/restore-cache",
               f"file://{BACKUP_DIRECTORY}/encrypted", str(destination)]
    environment = {**os.environ, "PASSPHRASE": KEY_FILE.read_text().splitlines()[0]}
    subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, check=True)
