"""The command line: help, version, dry run, messages, and never a traceback."""

import logging
import os
import re
import shlex
import signal
import subprocess

import pytest

import backup
import utils
from conftest import Store, tree_of

RECORDING = '#!/bin/sh\necho "duplicity $*" >> "$(dirname "$0")/calls"\nexec REAL "$@"\n'


def test_help_is_complete_and_fits_80_columns(store: Store) -> None:
    """Every option, examples, all exit codes and the files."""
    text = store.backup("--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    for option in ("--full", "--dry-run", "--status", "--json", "--html", "--config",
                   "--storage-root", "-v", "--verbose", "--version", "--help"):
        assert option in text
    for code in ("0", "1", "2", "3", "4", "5", r"128\+n"):
        assert re.search(rf"^  {code}\s", text, re.MULTILINE)
    assert "examples:" in text


def test_version(store: Store) -> None:
    """On standard output, exit 0."""
    assert re.fullmatch(r"backup\.py \d+\.\d+\n", store.backup("--version").stdout)


@pytest.mark.parametrize("arguments", [
    ["--no-such-option"], ["--json"], ["--html"], ["--list", "--html"],
    ["--status", "--json", "--html"], ["--status", "--full"], ["--status", "--dry-run"],
    ["extra"], ["--ful"], ["--config"],
])
def test_wrong_usage(store: Store, arguments: list[str]) -> None:
    """Exit 2, one sentence, nothing touched."""
    result = store.backup(*arguments, exit_code=2)
    assert result.stderr.startswith("backup: ") and result.stderr.count("\n") == 1
    assert "--help" in result.stderr
    assert not store.backups.exists()


def test_dry_run_touches_nothing_and_tells_the_truth(store: Store) -> None:
    """It names what stops, and the duplicity commands that the run after it executes."""
    before = tree_of(store.root, without="nothing")
    store.stand_in("duplicity", RECORDING)
    first = store.backup("--dry-run")
    assert tree_of(store.root, without="nothing") == before and first.stderr == ""
    assert "there is no complete backup yet" in first.stdout
    store.put_key()
    store.backup()
    store.forget_calls()
    before = tree_of(store.root, without="nothing")
    plan = store.backup("--dry-run").stdout
    assert tree_of(store.root, without="nothing") == before
    assert (store.backups / "secret_key.txt").read_text().strip() not in plan
    assert "stop and start dovecot\nstop and start postfix\n" in plan
    store.forget_calls()
    store.backup()
    done = [re.sub(r"--log-fd=\d+", "--log-fd=LOG", call) for call in store.calls()
            if call.startswith("duplicity") and "--version" not in call]
    planned = [re.sub(r"^run setpriv --pdeathsig KILL ", "", line)
               for line in plan.splitlines() if line.startswith("run ")]
    assert planned == done and len(done) == 3


def test_dry_run_of_a_full(keyed: Store) -> None:
    """--full shows in the plan, and what a dead run left is listed."""
    keyed.encrypted.mkdir()
    dead = keyed.encrypted / "duplicity-full.20260101T030000Z.vol1.difftar.gpg"
    dead.touch()
    plan = keyed.backup("--dry-run", "--full").stdout
    assert "make a full backup: it was asked for" in plan
    assert str(dead) in plan and dead.exists()


def test_dry_run_refuses_as_a_run_would(keyed: Store) -> None:
    """The key that a run would refuse is refused."""
    (keyed.backups / "secret_key.txt").chmod(0o644)
    assert "chmod 600" in keyed.backup("--dry-run", exit_code=2).stderr


def test_verbose_streams_what_duplicity_says(keyed: Store) -> None:
    """As prefixed lines on standard error."""
    result = keyed.backup("-v")
    assert result.stdout == ""
    assert "backup: SourceFiles" in result.stderr and "duplicity full" in result.stderr
    assert all(line.startswith("backup: ") for line in result.stderr.splitlines())


def test_standard_error_that_is_gone_does_not_end_a_backup(store: Store) -> None:
    """The first run has something to say, and nobody to say it to."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(store.command("-v"), env=store.environment,
                             stdin=subprocess.DEVNULL, stderr=writing, stdout=writing)
    os.close(writing)
    assert process.returncode == 0 and len(store.manifests()) == 1


def test_standard_output_that_is_gone(store: Store) -> None:
    """`backup.py --status | head -0` ends without a traceback."""
    command = shlex.join(store.command("--status", "--json"))
    result = store.run("bash", "-c", f"set -o pipefail; {command} | true", exit_code=None)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_closed_standard_streams(keyed: Store) -> None:
    """cron and others may close them all."""
    keyed.run("sh", "-c", f"exec {shlex.join(keyed.command())} <&- >&- 2>&-")
    assert len(keyed.manifests()) == 1


def test_operating_system_errors_are_sentences() -> None:
    """An error that nothing foresaw names its path and is no traceback."""
    failure = backup.failure_of(PermissionError(13, "Permission denied", "/some/path"))
    assert str(failure).startswith("/some/path: Permission denied") and failure.exit_code == 1
    assert str(backup.failure_of(OSError("odd"))).startswith("odd")


def test_names_are_shown_safely() -> None:
    """Control characters, line breaks, odd bytes and what cannot be printed are escapes."""
    assert utils.printable("é a\n\x1b[31m\udcff\u202e\x7f") == "é a\\n\\x1b[31m\\xff\\u202e\\x7f"


def test_main_can_be_called_in_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a control panel would see of a wrong call."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    handlers = list(logging.getLogger("backup").handlers)
    try:
        assert backup.main(["--config", "/no/such"]) == 2
    finally:
        logging.getLogger("backup").handlers = handlers
    assert "backup: cannot read the settings file /no/such" in capsys.readouterr().err


def test_dry_run_before_the_first_run(store: Store) -> None:
    """The room of the disk that backup/ will be on counts, and no other."""
    script = 'mount -t tmpfs -o size=100M none /run && exec "$@"'
    plan = store.run("unshare", "--mount", "sh", "-c", script, "sh", *store.command("--dry-run"))
    assert " snapshot/tree " in plan.stdout
