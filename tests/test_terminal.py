"""On a terminal a run shows its steps as they happen, each with its time, and how far it has come; elsewhere it is silent."""

import os
import re
import shlex

from conftest import FirstNight, Store

# Waits until the line of progress has been drawn twice, while duplicity reads or writes.
SLOW = """#!/bin/sh
case $1 in full|restore) sleep 2.3;; esac
exec REAL "$@"
"""


def on_terminal(store: Store, *arguments: str, exit_code: int = 0) -> list[str]:
    """Run backup.py on a terminal of its own. Returns what was to be seen: lines, and of a line that was redrawn each state."""
    command = ["script", "--quiet", "--return", "--command", shlex.join(store.command(*arguments)), "/dev/null"]
    shown = store.run(*command, exit_code=exit_code).stdout.replace("\x1b[K", "").replace("\r", "\n")
    assert "\x1b" not in shown
    return [line for line in shown.split("\n") if line]


def test_backup_on_a_terminal(keyed: Store) -> None:
    """The steps in their order, duplicity's bytes of how many, and at last what was made, how big, and how long mail was down."""
    (keyed.root / "big").write_bytes(os.urandom(3_000_000))
    keyed.stand_in("duplicity", SLOW)
    lines = on_terminal(keyed)
    steps = [line.split(" ", 2)[2] for line in lines if re.match(r"backup: \d\d:\d\d:\d\d ", line)]
    assert [step.split()[0] for step in steps] == ["copying", "stopping", "mail", "duplicity", "deleting", "made"], lines
    drawn = [line.strip() for line in lines if not line.startswith("backup: ")]
    assert len(drawn) >= 2 and all(re.fullmatch(r"[\d.]+ \w+ of 3\.0 MB, [\d.]+ \w+/s(, \d+:\d\d left)?", line) for line in drawn), drawn
    assert re.fullmatch(r"made the full backup, 3\.\d MB, in \d+ seconds; mail was down for \d+\.\d seconds", steps[-1])


def test_restore_and_verify_on_a_terminal(keyed: Store, first_night: FirstNight) -> None:
    """They show how far they have come, and leave nothing of that behind what they print."""
    first_night(keyed)
    keyed.stand_in("duplicity", SLOW)
    restored = on_terminal(keyed, "--restore", str(keyed.scratch / "again"))
    assert "restoring everything" in restored[0] and f"restored to {keyed.scratch}/again" in restored[-1]
    assert sum(bool(re.fullmatch(r" +[\d.]+ \w+, [\d.]+ \w+/s", line)) for line in restored) >= 2, restored
    verified = on_terminal(keyed, "--verify")
    assert sum(bool(re.fullmatch(r" +[\d.]+ \w+ of [\d.]+ \w+, [\d.]+ \w+/s(, \d+:\d\d left)?", line)) for line in verified) == 3, verified
    assert verified[-1].startswith("checked 1 backup sets")


def test_steps_of_a_verbose_run(keyed: Store) -> None:
    """With -v the steps and what duplicity says are shown without a terminal, too, and nothing is redrawn, on a terminal either."""
    text = keyed.backup("-v").stderr
    assert "stopping mail" in text and "Backup Statistics" in text and "\r" not in text
    assert all(line.startswith("backup: ") for line in on_terminal(keyed, "-v"))
