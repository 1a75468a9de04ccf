"""What a person sees of a running job."""

from __future__ import annotations

import io

from rich.console import Console

from cat_cluster.cli.job_bars import JobBars
from cat_cluster.pipeline.job import AdapterResult
from cat_cluster.training.loss_curves import ConceptLoss
from cat_cluster.training.step_report import StepReport


def test_images_are_drawn_or_made_to_measure() -> None:
    for given, word in ((("draw",), "draw"), ((), "measure")):
        screen = io.StringIO()
        with JobBars(Console(file=screen, width=140), *given) as listener:
            listener.images("mug", 3, 4)
        assert f"{word:<8}mug" in screen.getvalue()


def test_progress_shows_steps_losses_per_token_and_outcomes() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=140, force_terminal=False)
    with JobBars(console) as listener:
        listener.started({"mug": 10, "tea": 20}, 2)
        for step in range(1, 11):
            losses = {
                "mug": {"sks": ConceptLoss(0.25, 0.002)},
                "tea": {"zwx": ConceptLoss(0.5, None), "ohwx": ConceptLoss(0.125, None)},
            }
            if step > 5:
                del losses["tea"]
            dropped = {"tea": "gradient not finite at step 5"} if step > 5 else {}
            done = {"mug": step, "tea": 10 + step}
            listener.step(StepReport(done, {"mug": 10, "tea": 20}, 0.1, 8, losses, dropped))
        listener.images("mug", 3, 4)
        listener.finished(AdapterResult("mug", "r-0123456789ab", "published"))
        listener.finished(AdapterResult("tea", "r-ba9876543210", "failed", reason="gradient [x] not finite"))
    text = screen.getvalue()
    assert "2 adapters train together" in text
    assert "sks identity 0.2500 cat 0.00200" in text
    assert "10/10" in text
    assert "15/20" in text
    assert "3/4" in text
    assert "dropped: gradient not finite at step 5" in text
    assert "published mug r-0123456789ab" in text
    assert "failed tea: gradient [x] not finite" in text
