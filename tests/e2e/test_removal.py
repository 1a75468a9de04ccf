"""The order of removal, which leaves nothing."""

from __future__ import annotations

from tests.support.kubernetes import CLIENTS, STRANGERS, command, documented, shell


def test_all_of_it_is_removed() -> None:
    """Removing all of it, by its commands, leaves no object of the namespace"""
    script = "\n".join(line for line in documented("**Removing all of it.**")[0].splitlines() if "helm" not in line)
    with shell(script, seconds=900) as done:
        assert done.returncode == 0, done.stderr
    assert command("kubectl", "get", "namespace", "cat-cluster").returncode != 0
    command("kubectl", "delete", "namespace", CLIENTS, STRANGERS, "--ignore-not-found", "--wait=false")
