"""On a terminal a run shows its steps as they happen, and how far it has come.

Each has its time. Elsewhere it is silent.
"""

import os
import pty
import re
import shlex
import signal
import subprocess
import termios
import time

from conftest import FirstNight, Store
from test_services import wait_for

# Waits until the line of progress has been drawn twice, while duplicity reads.
SLOW = """#!/bin/sh
case $1 in full) sleep 2.3;; esac
exec REAL "$@"
"""


def on_terminal(store: Store, *arguments: str, exit_code: int = 0) -> list[str]:
    """Run backup.py on a terminal of its own, and return the lines that were to be seen.

    Of a line that was redrawn it is each state.
    """
    command = shlex.join(store.command(*arguments))
    result = store.run(
        "script", "--quiet", "--return", "--command", command, "/dev/null", exit_code=exit_code)
    shown = result.stdout.replace("\x1b[K", "").replace("\r", "\n")
    assert "\x1b" not in shown
    return [line for line in shown.split("\n") if line]


def test_backup_on_a_terminal(keyed: Store) -> None:
    """The steps come in their order, duplicity's bytes of how many, and at last what was made.

    It is told how big that is, and how long mail was down.
    """
    (keyed.root / "big").write_bytes(os.urandom(3_000_000))
    keyed.stand_in("duplicity", SLOW)
    lines = on_terminal(keyed)
    steps = [line.split(" ", 2)[2] for line in lines if re.match(r"backup: \d\d:\d\d:\d\d ", line)]
    assert [step.split()[0] for step in steps] == [
        "copying", "stopping", "mail", "duplicity", "checking", "deleting", "deleting",
        "made"], lines
    drawn = [line.strip() for line in lines if not line.startswith("backup: ")]
    progress = re.compile(r"[\d.]+ \w+ of 3\.0 MB")
    assert len(drawn) >= 2 and all(progress.fullmatch(line) for line in drawn), drawn
    made = r"made the full backup, 3\.\d MB; mail was down for \d+\.\d seconds"
    assert re.fullmatch(made, steps[-1])


def test_verify_on_a_terminal(keyed: Store, first_night: FirstNight) -> None:
    """It shows how far it has come, and leaves nothing of that behind."""
    first_night(keyed)
    verified = on_terminal(keyed, "--verify")
    progress = re.compile(r" +[\d.]+ \w+ of [\d.]+ \w+")
    assert len([line for line in verified if progress.fullmatch(line)]) == 3, verified
    assert verified[-1].startswith("checked 1 backup sets")


def test_steps_of_a_verbose_run(keyed: Store) -> None:
    """With -v the steps and what duplicity says are shown without a terminal, too.

    Nothing is redrawn, on a terminal either.
    """
    text = keyed.backup("-v").stderr
    assert "stopping mail" in text and "Backup Statistics" in text and "\r" not in text
    assert all(line.startswith("backup: ") for line in on_terminal(keyed, "-v"))


def direct(store: Store) -> list[str]:
    """Return a command that runs a night in which duplicity reads the tree, mail being down."""
    (store.root / "elsewhere").mkdir()
    store.stand_in("duplicity", SLOW)
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"',
            str(store.root / "elsewhere"), *store.command()]


def test_terminal_that_takes_nothing(keyed: Store) -> None:
    """Ctrl-S, or a stalled connection: mail comes back, and the run ends all the same."""
    master, slave = pty.openpty()
    termios.tcflow(slave, termios.TCOOFF)
    subprocess.run(direct(keyed), env=keyed.environment, stdin=subprocess.DEVNULL,
                   stdout=slave, stderr=slave, timeout=60, check=True)
    assert keyed.last_run()["source"] == "direct" and keyed.running() == ["dovecot", "postfix"]
    with subprocess.Popen(keyed.command("--verify"), env=keyed.environment, stdout=slave) as verify:
        time.sleep(2)
        verify.terminate()
        try:
            assert verify.wait(10) == -signal.SIGTERM
        finally:
            verify.kill()
    os.close(slave)
    os.close(master)


def test_suspended_while_mail_is_down(keyed: Store) -> None:
    """Ctrl-Z does nothing: mail is not down until somebody types fg.

    Not even while a program is being started, which would be suspended, and the run wait for it.
    """
    command, go_on = direct(keyed), keyed.scratch / "go-on"
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) while [ ! -e {go_on} ]; do sleep 0.05; done;; esac
exec REAL "$@"
""")
    with subprocess.Popen(command, env=keyed.environment, preexec_fn=os.setpgrp) as process:
        wait_for(lambda: keyed.calls("stop") != [], seconds=30)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            os.killpg(process.pid, signal.SIGTSTP)
        go_on.touch()
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert keyed.running() == ["dovecot", "postfix"]
