"""What a person sees of runs: tables of their status, and live bars of one that is followed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cat_cluster.cli.bars import Bars, loss_text
from cat_cluster.runs.progress import ENDED_ADAPTER, AdapterProgress, RunProgress, is_alive
from cat_cluster.runs.services import PlacedAdapter, ServiceRecord

_COLOURS = {"failed": "red", "stopped": "red", "rejected": "yellow"}
_STAGES = {"waiting": "wait", "training": "train", "evaluating": "measure", "failed": "failed"}
_SHOWN_METRICS = ("kps", "identity_gain", "base_drift")


def state_text(progress: RunProgress) -> str:
    """Return the run's state, and for how long a driver that should be at work has been silent."""
    if progress.state != "running" or is_alive(progress):
        return progress.state
    return f"running, silent for {progress.silent_seconds():.0f} s"


def runs_table(runs: Sequence[RunProgress]) -> Table:
    """Return a table of runs, one row each."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("run", "name", "state", "attempt", "started (UTC)", "adapters ended"):
        table.add_column(heading, no_wrap=heading in ("run", "started (UTC)"), overflow="fold")
    for run in runs:
        ended = sum(adapter.state in ENDED_ADAPTER for adapter in run.adapters)
        started = run.started[:16].replace("T", " ")
        state = _coloured(run.state, state_text(run))
        table.add_row(run.run_id, escape(run.name), state, str(run.attempt), started, f"{ended} of {len(run.adapters)}")
    return table


def adapters_table(progress: RunProgress) -> Table:
    """Return a table of a run's adapters: state, step, losses, and the metrics or what went wrong."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("adapter", "state", "step", "losses", "result"):
        table.add_column(heading, overflow="fold")
    for adapter in progress.adapters:
        metrics = ", ".join(
            f"{name} {value:.3f}" for name in _SHOWN_METRICS if (value := adapter.metrics.get(name)) is not None
        )
        result = [escape(part) for part in (adapter.revision, adapter.reason, metrics) if part]
        state = _coloured(adapter.state, adapter.state)
        table.add_row(
            adapter.id, state, f"{adapter.step}/{adapter.steps}", _losses_text(adapter) or "-", "; ".join(result) or "-"
        )
    return table


def services_table(services: Sequence[ServiceRecord]) -> Table:
    """Return a table of training services, one row for each group: its slots, and the adapters that share a forward."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("service", "heard of", "waiting", "group", "slots taken", "base", "adapters"):
        table.add_column(heading, overflow="fold")
    for service in services:
        heard = f"{max(0.0, service.silent_seconds()):.0f} s ago"
        own = [escape(service.name), heard if service.is_alive() else f"[red]{heard}[/red]", str(service.waiting)]
        for group in service.groups:
            base = "-" if group.base is None else f"{escape(group.base)}, {group.resolution} px"
            taken = f"{len(group.adapters)} of {group.slots}"
            table.add_row(*own, str(group.number), taken, base, _placed_text(group.adapters))
            own = ["", "", ""]
        if service.measuring or not service.groups:
            table.add_row(*own, "measuring" if service.measuring else "-", "-", "-", _placed_text(service.measuring))
    return table


def _placed_text(adapters: Sequence[PlacedAdapter]) -> str:
    return ", ".join(f"{one.adapter} ({one.run_id})" for one in adapters) or "-"


class RunBars(Bars):
    """A Watcher that draws one progress bar per adapter, and a line when one ends. A context manager."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._ended: set[str] = set()
        self._state: tuple[str, int] | None = None

    def show(self, progress: RunProgress) -> None:
        """Move the bars to where the run stands."""
        self._ended &= {adapter.id for adapter in progress.adapters if adapter.state in ENDED_ADAPTER}
        for adapter in progress.adapters:
            if adapter.state in ENDED_ADAPTER and adapter.id not in self._ended:
                self._ended.add(adapter.id)
                self.console.print(_end_line(adapter))
            if adapter.state != "waiting":
                stage, detail = _STAGES.get(adapter.state, "done"), _losses_text(adapter)
                self.move(adapter.id, stage, adapter.id, completed=adapter.step, total=adapter.steps, detail=detail)
        state = (progress.state, progress.attempt)
        if state != self._state:
            self._state = state
            reason = f": {escape(progress.reason)}" if progress.reason else ""
            self.console.print(
                f"{progress.run_id} {_coloured(progress.state, progress.state)}, attempt {progress.attempt}{reason}",
                soft_wrap=True,
            )


def _end_line(adapter: AdapterProgress) -> str:
    rest = f": {escape(adapter.reason)}" if adapter.reason else f" {adapter.revision or ''}"
    return f"{_coloured(adapter.state, adapter.state)} {adapter.id}{rest}"


def _losses_text(adapter: AdapterProgress) -> str:
    return "  ".join(loss_text(token, loss.identity, loss.cat) for token, loss in adapter.losses.items())


def _coloured(state: str, text: str) -> str:
    colour = _COLOURS.get(state, "green")
    return f"[{colour}]{escape(text)}[/{colour}]"
