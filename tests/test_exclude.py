"""BACKUP_EXCLUDE: what it names, and nothing else, is left out of every backup."""

import os
import shlex

from conftest import Store, tree_of
from test_copy import disk_at

MAILBOX = "mail/mailboxes/example.com/alice"
EXCLUDED = [f"{MAILBOX}/.Sent Items", f"{MAILBOX}/cur/170001.M1P1.host,S=20:2,S", f"{MAILBOX}/tmp",
            "www/st*r", "www/br[a-z]", "www/back\\slash", "www/caf\udcff", "www/cache", "archive"]
KEPT = ["www/star", "www/bra", "www/backslash", "www/cache\n", "www/cached", f"{MAILBOX}/.Sent"]


def assert_left_out(store: Store, source: str) -> None:
    """Check that the newest backup has all but what is excluded."""
    assert store.last_run()["source"] == source
    expected = {path: entry for path, entry in tree_of(store.root).items() if not any(
        f"{path}/".startswith(f"{name}/") for name in EXCLUDED)}
    assert tree_of(store.restore(source)) == expected
    assert all(f"{name}/below" in expected for name in KEPT)


def test_what_is_excluded(keyed: Store) -> None:
    """Names are literal, with spaces, glob characters or bytes; --compare does not miss them.

    A disk inside STORAGE_ROOT that is left out keeps mail down no longer.
    """
    for name in [*EXCLUDED[:1], *EXCLUDED[3:], *KEPT]:
        (keyed.root / name).mkdir(parents=True, exist_ok=True)
        below = keyed.root / name / "below"
        below.write_text(name.encode(errors="replace").decode())
        os.utime(below, (below.stat().st_mtime - 60,) * 2)  # what is just written bears another
    setting = shlex.join([*EXCLUDED, "no/such"])
    with keyed.settings.open("ab") as stream:
        stream.write(b"BACKUP_EXCLUDE=" + os.fsencode(setting) + b"\n")
    with disk_at(keyed, keyed.root / "archive", "4M"):
        keyed.backup()
        assert_left_out(keyed, "copy")
        assert keyed.backup("--verify", "--compare").stderr == ""
        status = keyed.backup("--status").stdout
        assert f"Left out: {MAILBOX}/.Sent Items, " in status and "no/such (not found)" in status
        assert "archive (not found)" not in status
        assert f"leave out {EXCLUDED[3]}\n" in keyed.backup("--dry-run").stdout
        with disk_at(keyed, keyed.root / "other", "4M"):
            keyed.backup("--full")
            assert_left_out(keyed, "direct")
