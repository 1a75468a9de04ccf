"""Tables of `k8s status`: the jobs of a namespace, and the pods of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cat_cluster.cluster.kuberay.obstacles.states import JobState, PodState

_WIDEST = 10_000  # characters


def jobs_table(jobs: Sequence[JobState]) -> Table:
    """Return a row for each job."""
    table = _table("job", "run", "state", "pods", "age", "queue")
    for one in jobs:
        _add(table, one.job, one.run or "-", one.state, pods_text(one), age_text(one.age), one.queue or "-")
    return table


def pods_table(pods: Sequence[PodState]) -> Table:
    """Return a row for each pod."""
    table = _table("pod", "node", "phase", "restarts", "requests")
    for one in pods:
        requests = ", ".join(f"{name} {amount}" for name, amount in one.requests.items())
        _add(table, one.pod, one.node or "-", one.phase, str(one.restarts), requests or "-")
    return table


def print_table(table: Table) -> None:
    """Print a table on stdout as wide as it is: a narrow terminal wraps its lines, and a pipe gets all of it."""
    console = Console(emoji=False)
    width = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    Console(emoji=False, width=max(width, console.width)).print(table)


def pods_text(job: JobState) -> str:
    """Return how many pods of a job are ready, of how many."""
    return "-" if job.pods_asked is None else f"{job.pods_ready}/{job.pods_asked}"


def age_text(seconds: float) -> str:
    """Return an age in its largest unit, as kubectl does: 45s, 3m, 7h, 12d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))  # Text: what a cluster says is no markup
