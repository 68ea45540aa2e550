"""Services come back: after success, failure, signals and SIGKILL of the script alike.

Each comes in its order, and every one even when one fails.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import utils
from conftest import PYTHON, Store, long

STOPS = ["dovecot stop", "postfix stop"]
STARTS = ["dovecot start", "postfix start"]

# Waits for the test in the middle of a full backup, then goes on.
WAITING = """#!/bin/sh
case $1 in full) touch {scratch}/reached; exec sleep 300;; esac
exec REAL "$@"
"""


@pytest.fixture
def direct(keyed: Store) -> Iterator[Store]:
    """A store of which no copy can be made: mail is down while duplicity runs.

    Another file system is mounted in it.
    """
    place = keyed.root / "mail" / "other-disk"
    place.mkdir()
    keyed.run("mount", "-t", "tmpfs", "-o", "size=1M", "none", place)
    (place / "message").write_text("on another disk")
    yield keyed
    keyed.run("umount", "--lazy", place)


def wait_for(condition: Callable[[], object], seconds: float = 15) -> None:
    """Wait until something is so; fail after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def start_and_reach(
    store: Store, action: str = "duplicity", *through: str
) -> "subprocess.Popen[str]":
    """Start a backup and return when it is amid duplicity, or an action of `service`.

    through: a command to put before it.
    """
    if action == "duplicity":
        store.stand_in("duplicity", WAITING.format(scratch=store.scratch))
    process = subprocess.Popen(
        [*through, *store.command()], env=store.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if action == "duplicity":
        wait_for((store.scratch / "reached").exists)
    else:
        wait_for(lambda: action in store.calls())
    return process


def hold(store: Store, action: str) -> Path:
    """Have an action of `service`, such as "postfix stop", wait until a file is gone.

    Returns that file. There is none for duplicity.
    """
    path = store.bin / ".waits-".join(action.split())
    if action != "duplicity":
        path.touch()
    return path


def processes_of(store: Store) -> list[str]:
    """Return the command lines of processes that have to do with the store."""
    found = []
    listed = os.fsencode(store.stopped_list)
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            try:
                line = os.fsdecode((directory / "cmdline").read_bytes().replace(b"\0", b" "))
                environment = (directory / "environ").read_bytes()
                inside = os.readlink(directory / "cwd").startswith(str(store.backups))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if inside or str(store.scratch) in line or listed in environment:
                found.append(line)
    return found


def programs_of(store: Store) -> list[str]:
    """Return the same without gpg's agents, which end by themselves."""
    return [line for line in processes_of(store) if "gpg-agent" not in line]


def is_over(store: Store) -> bool:
    """Return whether services run again, and nothing else of the store."""
    return store.running() == ["dovecot", "postfix"] and processes_of(store) == []


def assert_good_night(store: Store) -> None:
    """Check that a night which did not go well left nothing, and that the next restores equal."""
    wait_for(lambda: is_over(store))
    (store.bin / "duplicity").unlink(missing_ok=True)
    store.backup()
    assert not store.stopped_list.exists()
    assert not (store.backups / "tmp").exists()
    store.assert_restores()


@pytest.mark.parametrize("number, action", [
    (signal.SIGTERM, "duplicity"), (signal.SIGHUP, "postfix stop"),
    (signal.SIGINT, "dovecot start"), long(signal.SIGINT, "duplicity"),
    long(signal.SIGHUP, "duplicity"), long(signal.SIGINT, "postfix status"),
    long(signal.SIGTERM, "dovecot stop")])
def test_signals_end_the_run_in_good_order(
    keyed: Store, number: signal.Signals, action: str
) -> None:
    """Whenever the signal comes, the script exits with 128+n; the next run is good.

    Services are started and duplicity is gone by then.
    """
    held = hold(keyed, action)
    process = start_and_reach(keyed, action)
    process.send_signal(number)
    time.sleep(0.2)  # the threads of a process share out what comes at once: it has no order
    process.send_signal(signal.SIGTERM)  # impatience changes nothing
    held.unlink(missing_ok=True)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"ended by {number.name}" in errors and "Traceback" not in errors
    if action in STOPS:
        assert errors.startswith("backup: mail is back after ")
    assert keyed.running() == ["dovecot", "postfix"] and processes_of(keyed) == []
    if action == "duplicity":
        assert keyed.last_run()["exit_code"] == 128 + number
        assert list(keyed.encrypted.iterdir()) == []
    assert_good_night(keyed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ended_while_mail_is_down(direct: Store, number: signal.Signals) -> None:
    """The same while duplicity reads the tree itself, and for SIGKILL."""
    process = start_and_reach(direct)
    assert direct.running() == []
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (128 + number if number != signal.SIGKILL else -number)
    wait_for(lambda: is_over(direct), seconds=5)
    assert direct.calls("stop", "start") == STOPS + STARTS
    assert_good_night(direct)


@pytest.mark.parametrize(
    "action", ["duplicity", "dovecot start", *map(
        long, ["postfix stop", "dovecot stop", "postfix start"])])
def test_services_come_back_after_sigkill(keyed: Store, action: str) -> None:
    """The script dies by SIGKILL at any moment: services come back by themselves.

    They do so after a stop that is under way, never before it.
    """
    held = hold(keyed, action)
    process = start_and_reach(keyed, action)
    process.kill()
    process.wait()
    held.unlink(missing_ok=True)
    process.communicate()
    wait_for(lambda: is_over(keyed), seconds=5)
    assert keyed.calls("stop", "start") == STOPS + STARTS
    assert_good_night(keyed)


def keeper_of(process: "subprocess.Popen[str]") -> int:
    """Return the process id of a script's keeper."""
    answer = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "utils.py"], capture_output=True, text=True)
    return int(answer.stdout)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGPIPE, long(signal.SIGINT), long(signal.SIGHUP)])
def test_keeper_is_deaf_to_signals(direct: Store, number: signal.Signals) -> None:
    """No signal but SIGKILL disturbs the keeper, and what it starts is not deaf."""
    service, ignored = direct.bin / "service", direct.scratch / "ignored"
    service.write_text(service.read_text().replace("/bin/sh", "/bin/bash").replace(  # dash unblocks
        "case $2 in", f"""\
if [ "$2" = start ]; then grep -E "Sig(Ign|Blk)" /proc/self/status >> {ignored}; fi
case $2 in"""))
    process = start_and_reach(direct)
    os.kill(keeper_of(process), number)
    time.sleep(0.2)
    assert direct.running() == []
    process.terminate()
    process.communicate()
    assert direct.running() == ["dovecot", "postfix"]
    deaf_to = sum(1 << signal_number - 1 for signal_number in (1, 2, 13, 15, 20))
    for line in ignored.read_text().splitlines():
        assert int(line.split()[1], 16) & deaf_to == 0


@pytest.mark.parametrize("held", [True, False])
def test_script_that_is_held_while_mail_is_down(direct: Store, held: bool) -> None:
    """As by a disk that does not answer: mail comes back without it, and there is no backup.

    As long as duplicity gets on mail stays down.
    """
    go, reached = direct.scratch / "go", direct.scratch / "reached"
    direct.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) touch {reached}; while [ ! -e {go} ]; do sleep 0.05; done;; esac
exec REAL "$@"
""")
    program = direct.changed_program("STALLED_SECONDS = 600", "STALLED_SECONDS = 2")
    process = subprocess.Popen(
        [PYTHON, program, *direct.command()[2:]], env=direct.environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(reached.exists)
    if held:
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: direct.running() == ["dovecot", "postfix"])
    else:
        time.sleep(4)
        assert direct.running() == []
    go.touch()
    process.send_signal(signal.SIGCONT)
    errors = process.communicate()[1]
    assert direct.running() == ["dovecot", "postfix"] and direct.calls("start") == STARTS
    assert process.returncode == (1 if held else 0)
    assert ("in 2 seconds nothing had come of the backup" in errors) == held
    assert len(direct.manifests()) == (0 if held else 1)


def test_services_do_not_inherit_a_low_priority(keyed: Store) -> None:
    """Cron lines often begin with nice and ionice, which are not meant for mail."""
    service, told = keyed.bin / "service", keyed.scratch / "told"
    service.write_text(service.read_text().replace("case $2 in", f"""\
if [ "$2" = start ]; then nice >> {told}; ionice -p $$ >> {told}; fi
case $2 in"""))
    keyed.run("nice", "-n", "10", "ionice", "-c", "idle", *keyed.command())
    assert told.read_text() == "0\nnone: prio 0\n" * 2


def test_script_starts_services_if_the_keeper_dies(direct: Store) -> None:
    """The keeper is killed while mail is stopped: the script starts it, and the backup counts."""
    direct.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) pkill -KILL -f "utils.py {direct.stopped_list}" || exit 99;; esac
exec REAL "$@"
""")
    direct.backup()
    assert direct.calls("stop", "start") == STOPS + STARTS and not direct.stopped_list.exists()
    direct.assert_restores()


def test_keeper_dies_while_it_stops_a_service(keyed: Store) -> None:
    """The stop goes on, and what it ends after it was started is started again: exit 1."""
    held = hold(keyed, "dovecot stop")
    process = start_and_reach(keyed, "dovecot stop")
    os.kill(keeper_of(process), signal.SIGKILL)
    time.sleep(1)
    held.unlink()
    assert "stops and starts services died" in process.communicate()[1]
    assert process.returncode == 1
    wait_for(lambda: processes_of(keyed) == [])
    assert keyed.running() == ["dovecot", "postfix"]
    assert keyed.calls("stop", "start") == ["dovecot stop", *STARTS, "dovecot start"]


def test_next_run_starts_services_if_script_and_keeper_die(direct: Store) -> None:
    """Both are killed while mail is stopped: the next run says so and starts the services first."""
    process = start_and_reach(direct)
    os.kill(keeper_of(process), signal.SIGKILL)
    process.kill()
    process.communicate()
    wait_for(lambda: processes_of(direct) == [])
    assert direct.running() == []
    assert direct.stopped_list.read_text().split() == ["dovecot", "postfix"]
    (direct.bin / "duplicity").unlink()
    direct.forget_calls()
    result = direct.backup()
    assert "which an earlier run left stopped" in result.stderr
    assert direct.calls("stop", "start") == STARTS + STOPS + STARTS
    direct.assert_restores()


def test_service_that_is_not_running_is_left_alone(keyed: Store) -> None:
    """What was not running is neither stopped nor started.

    With nothing running there is no downtime at all.
    """
    (keyed.bin / "postfix.running").unlink()
    keyed.backup()
    assert keyed.calls("stop", "start") == ["dovecot stop", "dovecot start"]
    assert keyed.running() == ["dovecot"]
    (keyed.bin / "dovecot.running").unlink()
    keyed.forget_calls()
    keyed.backup()
    assert keyed.calls("stop", "start") == []
    assert keyed.last_run()["downtime_seconds"] == 0


def test_services_setting(keyed: Store) -> None:
    """BACKUP_SERVICES lists them in the order in which they stop and start."""
    keyed.settings.write_text(keyed.settings.read_text() + "BACKUP_SERVICES=solr dovecot postfix\n")
    (keyed.bin / "solr.running").touch()
    keyed.backup()
    assert keyed.calls("stop", "start") == ["solr stop", *STOPS, "solr start", *STARTS]


def test_service_that_the_system_does_not_know(keyed: Store) -> None:
    """A misspelt one is named and the backup made, exit 3; of the default any may be missing.

    It is what Debian's own `service` does not recognize, or where the exit code is 4. That
    costs no call more.
    """
    service = keyed.bin / "service"
    service.write_text(service.read_text().replace("case $2 in", """\
case $1 in
dovecot) if [ -e no-dovecot ]; then exec /usr/sbin/service no-such-service "$2"; fi;;
postfix) ;;
odd) exit 4;;
*) exec /usr/sbin/service "$@";;
esac
case $2 in"""))
    (keyed.bin / "no-dovecot").touch()
    assert keyed.backup().stderr == "" and keyed.calls("stop") == ["postfix stop"]
    (keyed.bin / "no-dovecot").unlink()
    keyed.forget_calls()
    keyed.settings.write_text(
        keyed.settings.read_text() + "BACKUP_SERVICES=dovecot postfixx odd postfix\n")
    told = "BACKUP_SERVICES names postfixx and odd, which is no service of this system"
    assert told in keyed.backup(exit_code=3).stderr
    assert told in keyed.last_run()["message"]
    assert keyed.calls("stop", "start") == STOPS + STARTS
    assert len(keyed.calls("status")) == 6 and len(keyed.manifests()) == 2


@pytest.mark.parametrize("times", [1, 2])
def test_start_is_tried_three_times(keyed: Store, times: int) -> None:
    """A start that fails once or twice succeeds at last: exit 0."""
    (keyed.bin / "dovecot.fails-start").write_text(str(times))
    assert keyed.backup().stderr == ""
    assert keyed.calls("start").count("dovecot start") == times + 1
    assert keyed.running() == ["dovecot", "postfix"]


def test_one_service_that_does_not_start_keeps_no_other_down(keyed: Store) -> None:
    """Exit 5 with the service's own words, with the backup made and the other service running.

    The next run starts it.
    """
    (keyed.bin / "dovecot.fails-start").write_text("3")
    result = keyed.backup(exit_code=5)
    assert "dovecot could not be started again" in result.stderr
    assert "dovecot will not start" in result.stderr
    assert keyed.running() == ["postfix"]
    assert keyed.stopped_list.read_text().split() == ["dovecot"]
    content = keyed.last_run()
    assert content["exit_code"] == 5
    assert "dovecot could not be started again" in content["message"]
    keyed.assert_restores()
    assert "left stopped" in keyed.backup().stderr
    assert keyed.running() == ["dovecot", "postfix"] and not keyed.stopped_list.exists()


def test_service_that_does_not_start_comes_before_any_other_exit_code(keyed: Store) -> None:
    """duplicity fails and so does a start: both are told, exit 5."""
    keyed.stand_in("duplicity", '#!/bin/sh\ncase $1 in full) exit 53;; esac\nexec REAL "$@"\n')
    (keyed.bin / "postfix.fails-start").write_text("9")
    result = keyed.backup(exit_code=5)
    assert "the disk is full" in result.stderr
    assert "postfix could not be started again" in result.stderr


@pytest.mark.parametrize("service", ["postfix", "dovecot"])
def test_stop_that_fails(keyed: Store, service: str) -> None:
    """No backup without a stop: everything is started again, exit 1."""
    (keyed.bin / f"{service}.fails-stop").write_text("9")
    result = keyed.backup(exit_code=1)
    assert f"service {service} stop ended with exit code 7" in result.stderr
    assert f"{service} will not stop" in result.stderr
    assert keyed.running() == ["dovecot", "postfix"] and keyed.manifests() == []
    assert not keyed.stopped_list.exists()


def test_list_in_run_that_cannot_be_written(keyed: Store) -> None:
    """Nothing is stopped that a death would leave down, exit 1."""
    in_the_way = keyed.stopped_list.with_name(f".{keyed.stopped_list.name}.new")
    in_the_way.mkdir()
    try:
        result = keyed.backup(exit_code=1)
    finally:
        in_the_way.rmdir()
    assert f"cannot write {keyed.stopped_list}: " in result.stderr
    assert keyed.calls("stop") == [] and keyed.running() == ["dovecot", "postfix"]


def run_impatiently(store: Store) -> str:
    """Run a copy of the program that gives a service one second, and return what it said.

    It must exit 1.
    """
    program = store.changed_program("SERVICE_SECONDS = 120", "SERVICE_SECONDS = 1")
    return store.run(PYTHON, program, "--config", store.settings, exit_code=1).stderr


def test_stop_that_hangs(keyed: Store) -> None:
    """A stop that hangs is ended after its time; everything is started again, exit 1."""
    (keyed.bin / "postfix.hangs-stop").touch()
    assert "no answer within 1 seconds" in run_impatiently(keyed)
    assert keyed.running() == ["dovecot", "postfix"] and keyed.manifests() == []
    wait_for(lambda: processes_of(keyed) == [])


def test_service_that_does_not_answer_is_not_taken_for_stopped(keyed: Store) -> None:
    """Whether it runs cannot be told: nothing is stopped, exit 1."""
    (keyed.bin / "dovecot.hangs-status").touch()
    assert "it cannot be told whether dovecot runs" in run_impatiently(keyed)
    assert keyed.manifests() == [] and keyed.calls("stop", "start") == []


def test_sighup_that_was_ignored_stays_ignored(keyed: Store) -> None:
    """Under nohup the end of the terminal does not end the backup."""
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in full) touch {keyed.scratch}/reached; sleep 1;; esac
exec REAL "$@"
""")
    process = subprocess.Popen(
        ["nohup", *keyed.command()], env=keyed.environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for((keyed.scratch / "reached").exists)
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.returncode == 0 and len(keyed.manifests()) == 1


def test_nothing_that_a_parent_leaves_is_relied_on(keyed: Store) -> None:
    """SIGCHLD ignored by a parent hides no child's failure, and a blocked SIGTERM ends the run."""
    (keyed.backups / "before-backup").write_text("#!/bin/sh\nexit 7\n")
    (keyed.backups / "before-backup").chmod(0o755)
    process = start_and_reach(
        keyed, "duplicity", "env", "--ignore-signal=CHLD", "--block-signal=TERM")
    process.terminate()
    try:
        _, errors = process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "before-backup failed" in errors and "exit code 7" in errors


def test_downtime_ends_before_pruning(keyed: Store) -> None:
    """Mail does not wait for remove-older-than and cleanup."""
    runs = f"[ -e {keyed.bin}/dovecot.running ] && [ -e {keyed.bin}/postfix.running ]"
    keyed.stand_in("duplicity", f"""#!/bin/sh
case $1 in remove-older-than|cleanup) {runs} || exit 99;; esac
exec REAL "$@"
""")
    keyed.backup()


def test_start_that_exits_well_but_starts_nothing(keyed: Store) -> None:
    """An exit code of 0 is not believed: the status tells, exit 5.

    So it is with `service postfix start` and a broken main.cf.
    """
    script = (keyed.bin / "service").read_text()
    (keyed.bin / "service").write_text(script.replace(
        'start) touch "$1.running";;', 'start) [ "$1" = postfix ] || touch "$1.running";;'))
    result = keyed.backup(exit_code=5)
    assert "postfix could not be started again" in result.stderr and keyed.running() == ["dovecot"]
    starts = keyed.calls("start")
    assert starts.count("postfix start") == 3 and starts.count("dovecot start") == 1
    assert keyed.stopped_list.read_text().split() == ["postfix"]
    (keyed.bin / "service").write_text(script)
    keyed.backup()
    assert keyed.running() == ["dovecot", "postfix"]


def test_service_that_never_starts_again(keyed: Store) -> None:
    """Every night tries it, and says so with exit 5, until it starts."""
    (keyed.bin / "postfix.fails-start").write_text("15")
    program = keyed.changed_program("time.sleep(min(attempt, 1))", "time.sleep(min(attempt, 0.1))")
    for night in range(3):
        result = keyed.run(PYTHON, program, "--config", keyed.settings, exit_code=5)
        assert "postfix could not be started again" in result.stderr
        assert keyed.running() == ["dovecot"]
        assert keyed.stopped_list.read_text().split() == ["postfix"]
        assert keyed.last_run()["exit_code"] == 5
    keyed.backup()
    assert keyed.running() == ["dovecot", "postfix"] and not keyed.stopped_list.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_signal_while_a_stop_is_under_way(keyed: Store, fails: bool) -> None:
    """The keeper ends its stop, well or not, and starts each service once; exit 143."""
    held = hold(keyed, "postfix stop")
    if fails:
        (keyed.bin / "postfix.fails-stop").write_text("1")
    process = start_and_reach(keyed, "postfix stop")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # nothing tells that it has come
    held.unlink()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in errors
    assert keyed.last_run()["exit_code"] == 143
    assert keyed.calls("start") == STARTS and keyed.running() == ["dovecot", "postfix"]
    assert_good_night(keyed)


@pytest.mark.parametrize("wrong", ["key", "setting"])
def test_services_left_stopped_come_back_before_a_refusal(keyed: Store, wrong: str) -> None:
    """A run that is refused starts first what a run that died left stopped, or exits with 5."""
    keyed.backup()
    for exit_code in (5, 2):
        keyed.stopped_list.write_text("dovecot\npostfix\n")
        for name in ("dovecot", "postfix"):
            (keyed.bin / f"{name}.running").unlink(missing_ok=True)
        if exit_code == 5:
            (keyed.bin / "postfix.fails-start").write_text("3")
        if wrong == "key":
            (keyed.backups / "secret_key.txt").chmod(0o644)
        elif wrong == "setting":
            keyed.settings.write_text(f"{keyed.settings.read_text()}BACKUP_KEEP=3\n")
        result = keyed.backup(exit_code=exit_code)
        assert {"key": "chmod 600", "setting": "BACKUP_KEEP is no setting"}[wrong] in result.stderr
        assert keyed.last_run()["exit_code"] == exit_code
    assert keyed.running() == ["dovecot", "postfix"] and not keyed.stopped_list.exists()


# systemd, of which test_systemd has the real one: here its answers are a stand-in's

# Keeps the properties of each unit in a file of its name. UNIT.busy is answered once, before UNIT.
SYSTEMCTL = """#!/bin/sh
cd "${0%/*}/units" || exit 9
echo "$*" >> ../calls
action=$1
while [ "$1" != -- ]; do shift; done
shift
for unit; do
    case $action in
    show)
        if [ -e "$unit.busy" ]; then
            cat "$unit.busy"
            rm "$unit.busy"
        else
            cat "$unit" || exit 1
        fi
        echo;;
    is-active) sed -n s/ActiveState=//p "$unit";;
    stop) [ -e "$unit.stays" ] || sed -i s/ActiveState=.*/ActiveState=inactive/ "$unit";;
    start) [ ! -e "$unit.fails" ] || exit 1; sed -i s/ActiveState=.*/ActiveState=active/ "$unit";;
    esac
done
"""


class Units:
    """The units of a stand-in for systemctl."""

    def __init__(self, place: Path) -> None:
        self.place = place / "units"
        self.place.mkdir()
        for name, text in (("systemctl", SYSTEMCTL), ("systemd-run", "#!/bin/sh\nexit 0\n")):
            (place / name).write_text(text)
            (place / name).chmod(0o755)
        self.manager = utils.Systemd({"PATH": f"{place}:/usr/bin:/bin"})

    def put(self, name: str, state: str = "active", suffix: str = "", **properties: str) -> None:
        """Write down a unit. suffix: of the file's name."""
        told = {"Id": name, "ActiveState": state, "LoadState": "loaded", "Job": "", **properties}
        text = "".join(f"{key}={value}\n" for key, value in told.items())
        (self.place / f"{name}{suffix}").write_text(text)

    def calls(self) -> list[str]:
        """Return the calls that change something."""
        lines = (self.place.parent / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] in ("stop", "start")]


@pytest.fixture
def units(tmp_path: Path) -> Units:
    """A dovecot that runs, with all that may belong to it, and a postfix as on Debian 12."""
    made = Units(tmp_path)
    made.put("dovecot.service", TriggeredBy="dovecot.socket dovecot.timer",
             RequiredBy="filter.service mail.target purge.service")
    made.put("dovecot.socket")
    made.put("filter.service", BoundBy="stopped.service")
    made.put("mail.target", ConsistsOf="web.service")
    made.put("web.service")
    made.put("purge.service", "activating", Type="oneshot")
    made.put("stopped.service", "inactive")
    made.put("postfix.service", ConsistsOf="postfix@-.service")
    made.put("postfix@-.service")
    return made


DOVECOT = "dovecot.socket dovecot.service filter.service web.service"
POSTFIX = "postfix.service postfix@-.service"


def test_units_that_are_stopped(units: Units) -> None:
    """All that goes down with a service and runs, but no target, and no job under way.

    First comes the socket that would start it again.
    """
    assert units.manager.running(["dovecot", "postfix.service"]) == [DOVECOT, POSTFIX]
    for unit in POSTFIX.split():
        units.put(unit, "inactive")
    assert units.manager.running(["postfix"]) == []


def test_units_by_another_name_or_of_a_path(units: Units) -> None:
    """An alias is the service itself, timer or not; what a path would start is no different."""
    text = (units.place / "dovecot.service").read_text()
    (units.place / "imap.service").write_text(text)
    assert units.manager.running(["imap"]) == [DOVECOT]
    units.put("web.service", TriggeredBy="web.path")
    units.put("web.path")
    assert units.manager.running(["web"]) == ["web.path web.service"]


def test_units_stop_and_start_by_service(units: Units) -> None:
    """In one command for each service, in order, both ways."""
    lines = units.manager.running(["dovecot", "postfix"])
    assert units.manager.stop(lines) == "" and units.manager.awake(lines) == ""
    assert units.manager.start(lines) == {}
    assert units.calls() == [
        f"{action} -- {line}" for action in ("stop", "start") for line in lines]


def test_unit_that_does_not_stop(units: Units) -> None:
    """systemctl says well, and the unit is still there: it is not believed."""
    (units.place / "postfix@-.service.stays").touch()
    assert units.manager.stop([DOVECOT, POSTFIX]) == "postfix@-.service is active"


def test_unit_that_does_not_start(units: Units) -> None:
    """Its service is named with what systemctl said; the other one is started all the same."""
    units.manager.stop([DOVECOT, POSTFIX])
    (units.place / "web.service.fails").touch()
    failed = units.manager.start([DOVECOT, POSTFIX])
    assert list(failed) == [DOVECOT] and "ended with exit code 1" in failed[DOVECOT]
    awake = "postfix.service is active, postfix@-.service is active"
    assert units.manager.awake([POSTFIX]) == awake


@pytest.mark.parametrize(
    "properties, kind", [({"LoadState": "masked"}, "masked"), ({"Transient": "yes"}, "transient")])
def test_unit_that_could_not_be_started_again(
    units: Units, properties: dict[str, str], kind: str
) -> None:
    """It is not stopped: no backup is better than no mail."""
    units.put("filter.service", **properties)
    told = f"filter.service runs and could not be started again, for it is {kind}"
    with pytest.raises(utils.Failure, match=told):
        units.manager.running(["dovecot"])


def test_unit_that_the_system_does_not_know(units: Units) -> None:
    """It is noted, and not what is masked: that somebody has switched off, and spelt well."""
    units.put("dovecott.service", "inactive", LoadState="not-found")
    units.put("solr.service", "inactive", LoadState="masked")
    assert units.manager.running(["dovecott", "dovecot", "solr"]) == [DOVECOT]
    assert units.manager.unknown == ["dovecott"]


def test_unit_that_is_busy(units: Units, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is just being stopped is waited for, but not for ever."""
    units.put("dovecot.service", "deactivating", ".busy")
    assert units.manager.running(["dovecot"]) == [DOVECOT]
    units.put("dovecot.service", "inactive", Job="17")
    monkeypatch.setattr(utils, "SERVICE_SECONDS", 1)
    monkeypatch.setattr(utils, "WATCH_SECONDS", 0.1)
    with pytest.raises(utils.Failure, match="dovecot.service is still being started or stopped"):
        units.manager.running(["dovecot"])


def test_answer_that_is_none(units: Units) -> None:
    """Where systemctl fails, or tells something else, nothing is stopped."""
    with pytest.raises(utils.Failure, match="it cannot be told which services run"):
        units.manager.running(["unknown"])
    (units.place / "dovecot.service").write_text("rubbish\n")
    with pytest.raises(utils.Failure, match="it cannot be told which services run"):
        units.manager.running(["dovecot"])


def test_scope(units: Units, caplog: pytest.LogCaptureFixture) -> None:
    """The keeper is started in a scope of its own; where none can be had that is said."""
    assert units.manager.outliving()[:2] == ["systemd-run", "--scope"]
    (units.place.parent / "systemd-run").write_text("#!/bin/sh\nexit 1\n")
    with caplog.at_level("INFO"):
        assert units.manager.outliving() == [] and "mail stays down if" in caplog.text
