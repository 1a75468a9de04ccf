"""What a person sees of runs in the store."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

from rich.console import Console, RenderableType

from cat_cluster.cli.run_status import RunBars, adapters_table, runs_table, services_table, state_text
from cat_cluster.runs.progress import AdapterProgress, RunProgress, TokenLoss
from cat_cluster.runs.services import GroupRecord, PlacedAdapter, ServiceRecord

NOW = datetime.now(UTC)
RUN = RunProgress(
    run_id="run-0123456789ab",
    name="spring [sale]",
    state="running",
    attempt=2,
    started=NOW.isoformat(),
    updated=NOW.isoformat(),
    adapters=(AdapterProgress(id="cup", steps=10), AdapterProgress(id="tea", steps=10)),
)


def shown(what: RenderableType) -> str:
    screen = io.StringIO()
    Console(file=screen, width=160).print(what)
    return screen.getvalue()


def test_a_run_whose_driver_is_silent_looks_like_it() -> None:
    now = datetime.now(UTC)  # not the module's, which is minutes old in a long run of tests
    silent = RUN.changed(updated=(now - timedelta(minutes=5)).isoformat())
    assert state_text(RUN.changed(updated=now.isoformat())) == "running"
    assert state_text(silent).startswith("running, silent for 30")
    assert state_text(silent.changed(state="failed")) == "failed"
    text = shown(runs_table([RUN, silent.with_adapter("cup", state="failed")]))
    assert text.count("spring [sale]") == 2
    assert "0 of 2" in text
    assert "1 of 2" in text


def test_adapters_show_losses_metrics_and_reasons() -> None:
    losses = {"[sks]": TokenLoss(identity=0.25, cat=0.002), "zwx": TokenLoss(identity=None)}
    run = RUN.with_adapter("cup", state="training", step=3, losses=losses)
    run = run.with_adapter("tea", state="rejected", revision="r-0123456789ab", reason="kps [0]", metrics={"kps": 0.01})
    text = shown(adapters_table(run))
    for part in ("3/10", "[sks] identity 0.2500 cat 0.00200", "zwx identity -", "r-0123456789ab; kps [0]; kps 0.010"):
        assert part in text


def test_bars_move_and_each_end_is_told_once() -> None:
    screen = io.StringIO()
    with RunBars(Console(file=screen, width=160, force_terminal=False)) as bars:
        bars.show(RUN.changed(state="waiting"))
        run = RUN.with_adapter("cup", state="training", step=4, losses={"sks": TokenLoss(identity=0.5)})
        bars.show(run)
        bars.message("no answer [yet]")
        run = run.with_adapter("cup", state="published", step=10, revision="r-0123456789ab")
        run = run.with_adapter("tea", state="failed", step=7, reason="gradient [x] not finite")
        bars.show(run)
        bars.show(run)
        bars.show(run.changed(state="failed", reason="one adapter failed"))
    text = screen.getvalue()
    for part in (
        "run-0123456789ab waiting, attempt 2",
        "run-0123456789ab failed, attempt 2: one adapter failed",
        "no answer [yet]",
        "published cup r-0123456789ab",
        "failed tea: gradient [x] not finite",
    ):
        assert text.count(part) == 1, text
    assert "10/10" in text
    assert "7/10" in text


def test_what_ended_in_one_try_is_told_again_when_the_next_one_ends_it() -> None:
    screen = io.StringIO()
    with RunBars(Console(file=screen, width=160, force_terminal=False)) as bars:
        bars.show(RUN.with_adapter("cup", state="failed", reason="lost worker"))
        bars.show(RUN.changed(attempt=3))
        bars.show(RUN.changed(attempt=3).with_adapter("cup", state="published", revision="r-0123456789ab"))
    text = screen.getvalue()
    assert text.count("failed cup: lost worker") == text.count("published cup r-0123456789ab") == 1


def test_a_message_with_a_command_is_not_broken_into_lines() -> None:
    screen = io.StringIO()
    with RunBars(Console(file=screen, width=40, force_terminal=False)) as bars:
        bars.message("`kubectl -n cat-cluster describe rayjob single-94f11b30` shows how it stands")
    assert "`kubectl -n cat-cluster describe rayjob single-94f11b30` shows" in screen.getvalue()


def test_services_are_shown_group_by_group() -> None:
    cup = PlacedAdapter(run_id="run-000000000001", adapter="cup", steps=40)
    mug = PlacedAdapter(run_id="run-000000000002", adapter="mug", steps=40)
    groups = (
        GroupRecord(number=0, slots=4, base="[pocket]", resolution=64, adapters=(cup, mug)),
        GroupRecord(number=1, slots=2),
    )
    heard = (NOW - timedelta(seconds=90)).isoformat()
    night = ServiceRecord(
        name="night", host="a", started=heard, updated=heard, workers=2, groups=groups, measuring=(cup,), waiting=7
    )
    day = ServiceRecord(name="day", host="a", started=heard, updated=heard, workers=1)
    lines = [" ".join(line.split()) for line in shown(services_table([night, day])).splitlines() if "run-" in line]
    assert lines[0].startswith("night")
    assert lines[0].endswith("7 0 2 of 4 [pocket], 64 px cup (run-000000000001), mug (run-000000000002)")
    assert lines[1] == "measuring - - cup (run-000000000001)"
    assert "day" in shown(services_table([day]))
