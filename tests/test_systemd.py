"""With systemd, on Debian 12 and 13, mail really stops, and comes back whatever is done.

Each release is a machine of the tests' own with systemd as process 1, see systemd_machine.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import tree_of
from private_mail_server import IMAP_PORT, wait_until
from systemd_machine import (
    BACKUP, UNITS, PROJECT, STORAGE_ROOT, Machine, machine_of, system_for_tests)

pytestmark = pytest.mark.long

PORTS_SECONDS = 20  # within which mail must be back

# Imported by Python at its start, in the script alone it writes down the states of the services
# when the second pass begins, which is when both ports are closed, and then waits if it is told to.
SECOND_PASS = """\
import os, subprocess, sys, time

def closed():
    with open("/proc/net/tcp") as tcp, open("/proc/net/tcp6") as tcp6:
        lines = tcp.readlines()[1:] + tcp6.readlines()[1:]
    listening = {line.split()[1][-4:] for line in lines if line.split()[3] == "0A"}
    return not listening & {"0019", "008F"}

def on_event(event, arguments):
    if event == "os.scandir" and not os.path.exists("/tmp/states") and closed():
        with open("/tmp/states", "w") as stream:
            units = ["dovecot.socket", "dovecot.service", "postfix.service", "postfix@-.service"]
            subprocess.run(["systemctl", "is-active", *units], stdout=stream)
        while os.path.exists("/tmp/hold"):
            time.sleep(0.05)

if sys.orig_argv[1:2] == ["/opt/backup/backup.py"]:
    sys.addaudithook(on_event)
"""
# Takes all the memory that the control group of a unit may have, until a process in it has died.
HOG = """\
import os, sys
group, victim = sys.argv[1:]
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
taken = []
while os.path.exists("/proc/" + victim) and len(taken) < 1000:
    taken.append(b"x" * 1000000)
"""


def prepare(machine: Machine) -> None:
    """Put what the tests need into a machine."""
    (machine.home / "second-pass").mkdir()
    (machine.home / "second-pass/sitecustomize.py").write_text(SECOND_PASS)
    (machine.home / "hog.py").write_text(HOG)


@pytest.fixture(scope="module", params=UNITS)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine of each release, with mail running."""
    place = tmp_path_factory.mktemp(request.param)
    with machine_of(request.param, place) as running:
        prepare(running)
        yield running


@pytest.fixture(scope="module", params=UNITS)
def limited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """The same where systemd can limit the memory of a unit."""
    place = tmp_path_factory.mktemp(f"{request.param}-limited")
    with machine_of(request.param, place, legacy=True) as running:
        prepare(running)
        yield running


def start_run(machine: Machine, *properties: str) -> None:
    """Start a night in a unit of its own that writes down what it sees in its second pass.

    The unit is named run-of-backup.
    """
    options = [f"--property={text}" for text in ("TimeoutStopSec=1", *properties)]
    machine.run("rm", "-f", "/tmp/states")
    machine.run("systemd-run", "--quiet", "--collect", "--unit=run-of-backup", *options,
                "--setenv=PYTHONPATH=/home/second-pass", BACKUP)


def wait_for_end(machine: Machine) -> None:
    """Wait until the run and its keeper have ended."""
    wait_until(lambda: machine.state("run-of-backup") not in ("active", "deactivating"),
               "the run ends")
    wait_until(lambda: not machine.succeeds("pgrep -f '[u]tils.py'"), "the keeper ends")


def states_in_second_pass(machine: Machine) -> list[str]:
    """Return how dovecot.socket and the services of dovecot, postfix and postfix@- were then."""
    wait_until(lambda: machine.succeeds(MOMENTS["second pass"][2]), "the second pass")
    return machine.run("cat", "/tmp/states").split()


def leavings(machine: Machine) -> str:
    """Return what a run left in a machine: lists, homes of gpg, scopes, keepers and agents."""
    return machine.shell("""
        ls -d /run/backup-* 2>/dev/null || true
        systemctl list-units --all --plain --no-legend 'run-*.scope'
        pgrep --list-full -f '[u]tils.py|[g]pg-agent' || true""")


def assert_good_next_night(machine: Machine) -> None:
    """Check that a further night is good, leaves nothing behind, and restores equal to the tree."""
    root = machine.home / "user-data"
    (root / "mail" / "newest").write_bytes(os.urandom(100))
    machine.back_up()
    assert leavings(machine) == ""
    restored = machine.home / f"restored-{time.time()}"
    machine.back_up("--restore", f"/home/{restored.name}")
    assert tree_of(restored) == tree_of(root)
    assert machine.greetings() == ["* OK", "220 "]


def last_run(machine: Machine) -> dict[str, object]:
    """Return how the last run went."""
    content = json.loads(machine.run("cat", f"{STORAGE_ROOT}/backup/last-run.json"))
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("restarting", [False, True])
def test_second_pass_waits_for_the_daemons(machine: Machine, restarting: bool) -> None:
    """However slow postfix stops, its queue is still in the second pass.

    So it is even if somebody else restarts it.
    """
    machine.drop_in(machine.postfix, "slow", "ExecStopPost=/bin/sleep 3")
    try:
        if restarting:
            machine.run("systemctl", "restart", "--no-block", machine.postfix)
            wait_until(lambda: machine.state(machine.postfix) == "deactivating",
                       "the restart is under way")
        start_run(machine)
        assert set(states_in_second_pass(machine)) <= {"inactive", "failed", "unknown"}
        wait_for_end(machine)
    finally:
        machine.remove_drop_in(machine.postfix, "slow")
    assert last_run(machine)["exit_code"] == 0
    assert_good_next_night(machine)


def test_postfix_that_does_not_start(machine: Machine) -> None:
    """Exit 5 and its name, each night; when it is mended the next night brings it back."""
    machine.shell("cp /etc/postfix/main.cf /tmp; "
                  "echo 'inet_interfaces = 203.0.113.9' >> /etc/postfix/main.cf")
    try:
        for _ in range(2):
            told = machine.back_up(exit_code=5)
            assert f"{machine.postfix} could not be started again" in told, told
            assert IMAP_PORT in machine.ports() and machine.state(machine.postfix) == "failed"
            assert last_run(machine)["exit_code"] == 5
            assert machine.postfix in machine.run("sh", "-c", "cat /run/backup-stopped-*")
    finally:
        machine.shell("cp /tmp/main.cf /etc/postfix/main.cf")
    assert "which an earlier run left stopped" in machine.back_up()
    machine.wait_for_ports(1)
    assert_good_next_night(machine)


def test_service_that_is_not_running(machine: Machine) -> None:
    """It stays so, and the other one comes back; a misspelt one is named, exit 3."""
    machine.run("systemctl", "stop", "postfix")
    machine.shell("echo BACKUP_SERVICES=postfix dovecott dovecot >> /etc/mailinabox.conf")
    try:
        told = machine.back_up(exit_code=3)
        assert "dovecott, which is no service of this system" in told
        assert machine.state(machine.postfix) == "inactive"
        assert machine.state("dovecot") == "active"
    finally:
        machine.shell("sed -i /BACKUP_SERVICES/d /etc/mailinabox.conf")
        machine.run("systemctl", "start", "postfix")
    machine.wait_for_ports(PORTS_SECONDS)


def add_unit(machine: Machine, name: str, text: str) -> None:
    """Add a unit to a machine."""
    path = f"/etc/systemd/system/{name}"
    machine.shell(f"printf '%b' '{text}\\n' > '{path}'; systemctl daemon-reload")


def remove_unit(machine: Machine, name: str) -> None:
    """Stop it and take it back."""
    path = f"/etc/systemd/system/{name}"
    machine.shell(f"systemctl stop '{name}'; rm '{path}'; systemctl daemon-reload")


def test_units_that_go_down_with_dovecot(machine: Machine) -> None:
    """A timer and services that need it run again afterwards, whatever their names.

    Jobs of theirs that are under way are not begun anew.
    """
    needs = "[Unit]\\nRequires=dovecot.service\\nAfter=dovecot.service\\n"
    job = "[Service]\\nType=oneshot\\nExecStart=/bin/sleep 300"
    add_unit(machine, "purge.service", f"{needs}{job}")
    add_unit(machine, "purge.timer", f"{needs}[Timer]\\nOnCalendar=2100-01-01")
    daemon = "[Service]\\nExecStart=/bin/sleep 1000"
    add_unit(machine, "filter.service", f"{needs}{daemon}")
    fetched = "fetch@alice\\x40example.com.service"
    add_unit(machine, "fetch@.service", f"{needs}{daemon}")
    add_unit(machine, "index.service", f"{needs}{daemon}")
    add_unit(machine, "index.timer", "[Timer]\\nOnCalendar=2100-01-01")
    machine.shell(f"systemctl start purge.timer index.timer filter index '{fetched}'; "
                  "systemctl start --no-block purge.service")
    try:
        wait_until(lambda: machine.state("purge.service") == "activating", "the job is under way")
        machine.back_up()
        for unit in ("dovecot", "purge.timer", "filter.service", fetched):
            assert machine.state(unit) == "active", unit
        assert machine.state("purge.service") == "failed"  # it was ended with dovecot
        assert machine.state("index.service") == "inactive"
        assert_good_next_night(machine)
    finally:
        machine.shell(f"systemctl stop '{fetched}'; rm /etc/systemd/system/fetch@.service")
        for unit in ("purge.timer", "purge.service", "filter.service", "index.timer",
                     "index.service"):
            remove_unit(machine, unit)


@pytest.mark.parametrize("needs, kind", [
    ("Requires", "simple"), ("Requires", "oneshot"), ("Before", "oneshot")])
def test_unit_of_the_backup_that_needs_dovecot(machine: Machine, needs: str, kind: str) -> None:
    """It would end itself, or dovecot would wait for its end: exit 1, mail runs."""
    add_unit(machine, "nightly-backup.service", f"[Unit]\\n{needs}=dovecot.service\\n"
             f"[Service]\\nType={kind}\\nExecStart={BACKUP}")
    try:
        machine.run("systemctl", "start", "nightly-backup", exit_code=None)
        wait_until(lambda: machine.state("nightly-backup") == "failed", "the run ends")
        assert "nightly-backup.service, in which this runs" in str(last_run(machine)["message"])
        assert machine.greetings() == ["* OK", "220 "]
    finally:
        remove_unit(machine, "nightly-backup.service")
    assert_good_next_night(machine)


def test_service_that_could_not_be_started_again(machine: Machine) -> None:
    """What has been masked since it was started is not stopped: exit 1, and mail runs on."""
    machine.run("systemctl", "mask", "--runtime", "dovecot.service")
    try:
        told = machine.back_up(exit_code=1)
        assert "dovecot.service runs and could not be started again, for it is masked" in told
        assert machine.greetings() == ["* OK", "220 "]
    finally:
        machine.run("systemctl", "unmask", "--runtime", "dovecot.service")
    assert_good_next_night(machine)


def test_service_that_somebody_starts(machine: Machine) -> None:
    """What starts dovecot while it is to be down is told of, exit 3."""
    machine.run("touch", "/tmp/hold")
    try:
        start_run(machine)
        states_in_second_pass(machine)
        machine.run("systemctl", "start", "dovecot")
    finally:
        machine.run("rm", "/tmp/hold")
    wait_for_end(machine)
    assert last_run(machine)["exit_code"] == 3
    assert "dovecot.service is active" in str(last_run(machine)["message"])
    assert_good_next_night(machine)


def test_socket_that_would_wake_dovecot(machine: Machine) -> None:
    """Clients that knock at dovecot.socket all the time do not start dovecot before its time.

    They are served again afterwards.
    """
    listen = "\\n[Socket]\\nListenStream=\\nListenStream=127.0.0.1:143"
    machine.drop_in("dovecot.socket", "local", listen)
    machine.shell("systemctl stop dovecot; systemctl start dovecot.socket dovecot")
    knock = "(: <> /dev/tcp/127.0.0.1/143) 2>/dev/null; sleep 0.02"
    knocking = subprocess.Popen(
        machine.command("bash", "-c", f"for ((i = 0; i < 3000; i++)); do {knock}; done"),
        stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        assert machine.state("dovecot.socket") == machine.state("dovecot") == "active"
        start_run(machine)
        assert states_in_second_pass(machine)[:2] == ["inactive", "inactive"]
        wait_for_end(machine)
        assert last_run(machine)["exit_code"] == 0
        assert machine.state("dovecot.socket") == machine.state("dovecot") == "active"
        assert_good_next_night(machine)
    finally:
        os.killpg(knocking.pid, 9)
        knocking.wait()
        machine.shell("systemctl stop dovecot.socket dovecot")
        machine.remove_drop_in("dovecot.socket", "local")
        machine.shell("systemctl start dovecot")


# The moments at which a run is killed: a setting of a unit that makes them long enough to be met,
# and a command that succeeds when they have come.
MOMENTS = {
    "stop": ("POSTFIX", "ExecStopPost=/bin/sleep 1",
             "systemctl is-active POSTFIX | grep -qx deactivating"),
    "second pass": ("", "", "[ $(wc -l < /tmp/states) = 4 ]"),
    "starts": ("dovecot.service", "ExecStartPre=/bin/sleep 1",
               "systemctl is-active dovecot | grep -qx activating"),
    "duplicity": ("", "", "pgrep -f '^/usr/bin/python3.*duplicity (full|incremental)'"),
}


def main_process(machine: Machine) -> str:
    """Return the process id of the script, in its machine."""
    shown = machine.run("systemctl", "show", "--value", "--property=MainPID", "run-of-backup")
    return shown.strip()


# The ways in which its group, or it alone, is killed.
WAYS: dict[str, Callable[[Machine], object]] = {
    "kill": lambda machine: machine.run("systemctl", "kill", "-s", "KILL", "run-of-backup"),
    "stop": lambda machine: machine.run("systemctl", "stop", "run-of-backup"),
    "cgroup.kill": lambda machine: machine.shell(
        "echo 1 > /sys/fs/cgroup/system.slice/run-of-backup.service/cgroup.kill"),
    "script": lambda machine: machine.run("kill", "-KILL", main_process(machine)),
}


def survive(
    machine: Machine, moment: str, kill: Callable[[Machine], object], *properties: str
) -> None:
    """Kill a run at a moment, and check that mail is back and the next night good."""
    unit, drop_in, has_come = (text.replace("POSTFIX", machine.postfix) for text in MOMENTS[moment])
    if unit:
        machine.drop_in(unit, "moment", drop_in)
    if moment == "second pass":
        machine.run("touch", "/tmp/hold")
    (machine.home / "user-data/mail/new").write_bytes(os.urandom(100))
    try:
        start_run(machine, *properties)
        wait_until(lambda: machine.succeeds(has_come), f"the {moment}")
        kill(machine)
        machine.wait_for_ports(PORTS_SECONDS)
        wait_for_end(machine)
    finally:
        machine.run("rm", "-f", "/tmp/hold")
        if unit:
            machine.remove_drop_in(unit, "moment")
    assert machine.greetings() == ["* OK", "220 "]
    assert_good_next_night(machine)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run(machine: Machine, moment: str, way: str) -> None:
    """Mail is back within 20 seconds, by itself, and the next night is good."""
    survive(machine, moment, WAYS[way])


@pytest.mark.parametrize("moment", MOMENTS)
def test_run_that_needs_more_memory_than_it_may_have(limited: Machine, moment: str) -> None:
    """The kernel kills what is in the run's group: the same."""
    def exhaust(machine: Machine) -> None:
        group = "/sys/fs/cgroup/memory/system.slice/run-of-backup.service"
        script = main_process(machine)
        machine.run("python3", "/home/hog.py", group, script, exit_code=None)
        assert not machine.succeeds(f"[ -e /proc/{script} ]")

    survive(limited, moment, exhaust, "MemoryMax=100M", "OOMScoreAdjust=1000")


def test_no_scope(machine: Machine) -> None:
    """Where no scope can be had the keeper is in the run's own group, and the night is good.

    -v says so.
    """
    machine.shell("mkdir -p /tmp/bin; "
                  "printf '#!/bin/sh\\necho no scope here; exit 1\\n' > /tmp/bin/systemd-run; "
                  "chmod 755 /tmp/bin/systemd-run")
    told = machine.run("systemd-run", "--quiet", "--wait", "--pipe", "--collect",
                       "--setenv=PATH=/tmp/bin:/usr/bin:/bin", BACKUP, "-v")
    assert "mail stays down if this run's control group is killed" in told
    assert "no scope here" in told
    assert_good_next_night(machine)


@pytest.mark.parametrize("release", UNITS)
def test_shutdown_while_mail_is_down(tmp_path: Path, release: str) -> None:
    """It waits for the keeper no longer than the 10 seconds that its scope has."""
    with machine_of(release, tmp_path) as machine:
        prepare(machine)
        machine.run("touch", "/tmp/hold")
        start_run(machine)
        states_in_second_pass(machine)
        machine.run("systemctl", "poweroff", exit_code=None)
        wait_until(machine.is_over, "the machine is off", 30)


def test_test_command_leaves_the_machine_as_it_was(tmp_path: Path) -> None:
    """`tests/run` where systemd runs and mail is served: no unit is in another state afterwards."""
    program = tmp_path / "clone"
    subprocess.run(["cp", "-r", PROJECT, program], check=True)
    place = tmp_path / "machine"
    place.mkdir()
    with machine_of("bookworm", place, program, system=system_for_tests("bookworm")) as machine:
        before = machine.states()
        assert before["dovecot.service"] == before["postfix@-.service"] == "active"
        told = machine.run(
            "/opt/backup/tests/run", "/opt/backup/tests/test_services.py",
            "/opt/backup/tests/test_night.py", "/opt/backup/tests/test_mail_server.py")
        assert " passed" in told
        assert machine.states() == before
        assert leavings(machine) == ""
