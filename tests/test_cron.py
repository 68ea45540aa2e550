"""The README's line in /etc/cron.d, run by the real cron, makes a complete backup.

cron mails what needs attention, no more.
"""
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from private_mail_server import (
    BACKUP_DIRECTORY, BACKUP_PROGRAM, create_key, imap_messages, manifests,
    mount_private_directories, run, run_privately, running_commands, send_message, start_services,
    wait_until)
from test_readme import sh_block

MAIL_DIRECTORY = Path("/run/sent-by-cron")
PRINTED = "printed by the job beside it"
SENDMAIL = f"""\
#!/bin/sh
exec cat > "$(mktemp --tmpdir={MAIL_DIRECTORY})"
"""


def test_nightly_run_under_cron_is_silent(tmp_path: Path) -> None:
    """The README's line, due every minute, makes a backup.

    Only what the job beside it prints is mailed, and then a hook's failure.
    """
    run_privately(back_up_under_cron, tmp_path)


def back_up_under_cron() -> None:
    """Have cron run the program, with real mail services, and look at what is mailed."""
    start_services()
    create_key()
    send_message("some mail")
    prepare_cron()
    run_cron(lambda: bool(mails()) and bool(manifests() or unexpected_mails()),
             "a complete backup")
    assert not unexpected_mails(), "\n".join(unexpected_mails())
    assert manifests(), "the backup printed nothing and is not complete"
    assert len(imap_messages()) == 1, imap_messages()
    hook = BACKUP_DIRECTORY / "after-backup"
    hook.write_text("#!/bin/sh\necho no such disk; exit 1\n")
    hook.chmod(0o755)
    run_cron(lambda: any("no such disk" in mail for mail in unexpected_mails()),
             "the hook's failure is mailed")
    assert all("To: admin@example.com" in mail for mail in mails() if mail), mails()


def prepare_cron() -> None:
    """Leave cron no other job than ours, and have what is sent kept in a directory."""
    MAIL_DIRECTORY.mkdir()
    stand_in = Path("/run/sendmail")
    stand_in.write_text(SENDMAIL)
    stand_in.chmod(0o755)
    run("mount", "--bind", str(stand_in), "/usr/sbin/sendmail")
    Path("/etc/crontab").write_text("")
    mount_private_directories("/etc/cron.d", "/var/spool/cron")
    crontabs = Path("/var/spool/cron/crontabs")
    crontabs.mkdir()
    crontabs.chmod(0o1730)
    shutil.chown(crontabs, group="crontab")
    script = sh_block("* * *") + sh_block("MAILTO")  # as they stand there
    subprocess.run(["sh", "-e", "-c", script], check=True)
    line = Path("/etc/cron.d/backup").read_text()
    due = re.sub(r"^\d+ \d+ ", "* * ", line, flags=re.MULTILINE)
    due = due.replace("/opt/backup/backup.py", shlex.quote(str(BACKUP_PROGRAM)))
    assert due.count("* * * * * root") == 1
    Path("/etc/cron.d/backup").write_text(f"{due}* * * * * root echo {PRINTED}\n")


def run_cron(until: Callable[[], bool], what: str) -> None:
    """Have cron run until something is so and all is mailed.

    Its clock's next minute begins in two or three seconds; what it starts goes by the machine's
    clock.
    """
    ahead = 57 - int(time.time()) % 60
    # As the command faketime does it, but that would be its parent. Its jobs do not inherit it.
    library = "/usr/$LIB/faketime/libfaketime.so.1"
    environment = {**os.environ, "LD_PRELOAD": library, "FAKETIME": f"{ahead:+}s"}
    cron = subprocess.Popen(
        ["cron", "-f", "-L", "15"], env=environment, stdin=subprocess.DEVNULL)
    try:
        wait_until(until, what, seconds=180)
        wait_until(cron_is_idle, "cron has mailed all there is to mail", seconds=180)
    finally:
        cron.terminate()
        cron.wait()


def cron_is_idle() -> bool:
    """Return whether cron itself is the only process of its name.

    Each job has one, named CRON, until its output has been mailed.
    """
    names = [Path(command.partition(" ")[0]).name for command in running_commands()]
    return [name.lower() for name in names].count("cron") == 1


def mails() -> list[str]:
    """Return what was mailed."""
    return [path.read_text() for path in MAIL_DIRECTORY.iterdir()]


def unexpected_mails() -> list[str]:
    """Return what was mailed beside the output of the job that is there to be mailed."""
    return [mail for mail in mails() if mail and PRINTED not in mail]
