"""Hooks: run as STORAGE_USER, with the settings at hand, and never a danger to the backup."""

import grp
import os
import pwd
import stat
import subprocess
from pathlib import Path

import pytest

import backup
from conftest import PYTHON, USER, FirstNight, Store
from test_services import processes_of, wait_for

HOOKS = ["before-backup", "after-backup"]


def put_hook(store: Store, name: str, text: str, mode: int = 0o755) -> Path:
    """Put a hook in backup/ and return its path."""
    path = store.backups / name
    path.write_text(text)
    path.chmod(mode)
    return path


def output_of(store: Store) -> Path:
    """Return a file that any user may write to."""
    path = store.scratch / "output"
    path.touch()
    path.chmod(0o666)
    return path


def test_identity_and_environment(keyed: Store) -> None:
    """uid, gid and supplementary groups are the user's, whose shell is nologin.

    The environment is the settings, PATH, HOME and USER.
    """
    output, user = output_of(keyed), pwd.getpwnam(USER)
    assert user.pw_shell.endswith("nologin")
    keyed.settings.write_text(keyed.settings.read_text() + "PRIMARY_HOSTNAME=box.example.com\n")
    put_hook(keyed, "before-backup", f"""#!/bin/sh
exec > {output}
id -u; id -g; id -G; umask; pwd; env -0 | tr '\\0' '\\n'
""")
    assert keyed.backup(environment={"SECRET_OF_ROOT": "1"}).stderr == ""
    uid, gid, groups, umask, directory, *environment = output.read_text().splitlines()
    assert (int(uid), int(gid)) == (user.pw_uid, user.pw_gid)
    assert {int(group) for group in groups.split()} == set(os.getgrouplist(USER, user.pw_gid))
    assert umask == "0022" and directory == "/"
    values = dict(line.split("=", 1) for line in environment)
    assert "/usr/sbin" in values.pop("PATH")
    assert {key: value for key, value in values.items()
            if key not in ("PWD", "OLDPWD", "SHLVL", "_")} == {
        "STORAGE_ROOT": str(keyed.root), "STORAGE_USER": USER, "HOME": user.pw_dir,
        "PRIMARY_HOSTNAME": "box.example.com", "USER": USER}


def test_supplementary_groups(keyed: Store) -> None:
    """A user with groups beyond its own has them in the hook.

    The machine's own /etc/group is not touched: this runs privately.
    """
    output = output_of(keyed)
    put_hook(keyed, "after-backup", f"#!/bin/sh\nid -Gn > {output}\n")
    group = keyed.scratch / "group"
    with group.open("w") as stream:
        for entry in grp.getgrall():
            members = [*entry.gr_mem, USER] if entry.gr_name == "games" else entry.gr_mem
            stream.write(f"{entry.gr_name}:x:{entry.gr_gid}:{','.join(members)}\n")
    script = 'mount --bind "$0" /etc/group && exec "$@"'
    answer = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, group,
         *keyed.command()],
        env=keyed.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if "Operation not permitted" in answer.stderr and os.environ.get("CI") != "true":
        pytest.skip(f"private namespaces are not allowed: {answer.stderr}")
    assert answer.returncode == 0, answer.stderr
    assert "games" in output.read_text().split()


TALKATIVE = "#!/bin/sh\nfor number in $(seq 40); do echo line $number; done; exit 42\n"


def put_wrong_hook(store: Store, name: str, wrong: str) -> None:
    """Put a hook in backup/ that fails, or that cannot be run."""
    if wrong == "directory":
        (store.backups / name).mkdir()
    elif wrong == "dangling link":
        (store.backups / name).symlink_to("/nowhere")
    else:
        put_hook(store, name, wrong if wrong.startswith(("#!", "\x7f")) else "#!/bin/sh\n",
                 {"not executable": 0o644, "root only": 0o700}.get(wrong, 0o755))


@pytest.mark.parametrize("wrong", [  # the one before and the one after the backup
    {TALKATIVE: "exit code 42", "#!/bin/sh\nkill -9 $$\n": "signal 9"},
    {"#!/no/such/interpreter\n": "not found", "\x7fELF broken": "exit code 126"},
    {"directory": "Permission denied", "not executable": "Permission denied"},
    {"root only": "Permission denied", "dangling link": "not found"},
], ids=["fail", "broken", "no-files", "not-theirs"])
def test_failing_hooks(keyed: Store, wrong: dict[str, str]) -> None:
    """Each is told with its last lines and its end, exit 3; the backup is made all the same."""
    for name, hook in zip(HOOKS, wrong):
        put_wrong_hook(keyed, name, hook)
    errors = keyed.backup(exit_code=3).stderr
    parts = errors.partition(f"the hook {keyed.backups / 'after-backup'} failed")
    assert f"the hook {keyed.backups / 'before-backup'} failed" in parts[0] and parts[1]
    for part, told in zip(parts[::2], wrong.values()):
        assert told in part, errors
    if TALKATIVE in wrong:
        assert "line 40" in errors and "line 16\n" in errors and "line 15\n" not in errors
    assert len(keyed.manifests()) == 1 and keyed.running() == ["dovecot", "postfix"]
    content = keyed.last_run()
    assert content["exit_code"] == 3
    assert all(f"{name} failed" in content["message"] for name in HOOKS)


def test_no_shell_reads_the_path(store: Store) -> None:
    """A STORAGE_ROOT with spaces, quotes and more is no problem for a hook, nor for the rest."""
    root = store.scratch / "it's a \"root\"; $(touch hacked) ü *"
    store.root.rename(root)
    store.root = root
    store.settings.write_text(f"STORAGE_ROOT={root}\nSTORAGE_USER={USER}\n")
    store.put_key()
    output = output_of(store)
    put_hook(store, "before-backup", f"#!/bin/sh\necho \"$0\" > {output}\n")
    assert store.backup().stderr == ""
    assert output.read_text() == f"{root}/backup/before-backup\n"
    store.assert_restores()


def test_what_a_hook_can_read(keyed: Store) -> None:
    """after-backup reads the encrypted files and last-run.json, and neither the key nor cache/."""
    output, home = output_of(keyed), backup.work_of({"STORAGE_ROOT": str(keyed.root)}).gnupg
    put_hook(keyed, "after-backup", f"""#!/bin/sh
cat {keyed.encrypted}/* > /dev/null && echo encrypted >> {output}
grep -q '"exit_code": 0' {keyed.backups}/last-run.json && echo last-run >> {output}
cat {keyed.backups}/secret_key.txt 2> /dev/null && echo key >> {output}
ls {keyed.backups}/cache 2> /dev/null && echo cache >> {output}
ls -d {home} 2> /dev/null >> {output}
exit 0
""")
    keyed.backup()
    assert output.read_text().split() == ["encrypted", "last-run"]


def test_after_backup_runs_only_after_a_backup(keyed: Store) -> None:
    """A run that failed does not call it; before-backup had its turn."""
    output = output_of(keyed)
    for name in HOOKS:
        put_hook(keyed, name, f"#!/bin/sh\necho {name} >> {output}\n")
    keyed.stand_in("duplicity", '#!/bin/sh\ncase $1 in full) exit 50;; esac\nexec REAL "$@"\n')
    keyed.backup(exit_code=1)
    assert output.read_text() == "before-backup\n"


def test_what_a_good_hook_prints_is_silent_unless_verbose(
    keyed: Store, first_night: FirstNight
) -> None:
    """cron mails whatever is printed. Without a `#!` line /bin/sh runs it, as it always was."""
    first_night(keyed)
    script = "echo $0 of $USER\nprintf 'caf\\303\\251 \\377 \\033[31m'\n"
    path = put_hook(keyed, "before-backup", script, 0o750)
    os.chown(path, 0, keyed.root.stat().st_gid)
    put_hook(keyed, "after-backup", "#!/bin/sh\necho all sent\n")
    assert keyed.backup().stderr == ""
    verbose = keyed.backup("-v").stderr
    for told in (f"{path} of {USER}", "café \\xff \\x1b[31m", "all sent"):
        assert f"backup: {told}\n" in verbose
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_hook_that_is_suspended(keyed: Store) -> None:
    """It has a day, then it is ended, and the next night finds no lock: exit 3."""
    mark = output_of(keyed)
    put_hook(keyed, "before-backup", f"#!/bin/sh\nkill -s STOP $$; echo on > {mark}\n")
    program = keyed.changed_program("timeout_seconds=DAY", "timeout_seconds=1")
    impatient = program.with_name("utils.py")
    impatient.write_text(impatient.read_text().replace("ENDING_SECONDS = 10", "ENDING_SECONDS = 1"))
    result = keyed.run(PYTHON, program, "--config", keyed.settings, exit_code=3)
    assert "before-backup failed" in result.stderr and "no answer within 1 sec" in result.stderr
    assert len(keyed.manifests()) == 1 and mark.read_text() == "" and processes_of(keyed) == []


def test_hook_that_leaves_something_running(keyed: Store) -> None:
    """The night does not wait for what a hook leaves in the background."""
    put_hook(keyed, "before-backup", f"#!/bin/sh\nsleep 30.5 & echo $! > {output_of(keyed)}\n")
    program = keyed.changed_program("BACKGROUND_SECONDS = 5", "BACKGROUND_SECONDS = 1")
    assert keyed.run(PYTHON, program, "--config", keyed.settings).stderr == ""
    left = int((keyed.scratch / "output").read_text())
    assert "sleep" in Path(f"/proc/{left}/cmdline").read_text()
    os.kill(left, 15)
    wait_for(lambda: processes_of(keyed) == [])
