"""Training curves as a PNG: identity loss and CAT loss over the steps, one line per method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"LoRA": "#d97706", "CAT": "#0f8b7e"}
_OTHER_COLOUR = "#7c5cd6"
_GREY = "#808a95"  # legible on white and on near-black: the picture's ground is transparent
_TERMS = (("identity", "Identity loss"), ("cat", "CAT loss"))


def method_colour(label: str) -> str:
    """The colour of a method, the same wherever a report shows it."""
    return _COLOURS.get(label, _OTHER_COLOUR)


def draw_curves(token: str, histories: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes | None:
    """Return the curves of one token as PNG, or None where no method kept a history of it.

    Each history is {"steps": [...], token: {"identity": [...], "cat": [...]}}; cat may be None where it was not
    trained. Faint lines are the recorded means, full ones a running mean over nine of them.
    """
    known = [(label, history) for label, history in histories if history.get("steps") and token in history]
    if not known:
        return None
    figure = Figure(figsize=(9.6, 3.1), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (term, title) in zip(figure.subplots(1, 2), _TERMS, strict=True):
        for label, history in known:
            values = history[token].get(term) or []
            points = [(s, v) for s, v in zip(history["steps"], values, strict=False) if v is not None]
            if points:
                steps, losses = np.array(points, dtype=np.float64).T
                axes.plot(steps, losses, color=method_colour(label), linewidth=0.8, alpha=0.3)
                axes.plot(steps, _running_mean(losses), color=method_colour(label), linewidth=2, label=label)
        _style(axes, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return buffer.getvalue()


def _running_mean(values: np.ndarray[Any, Any], width: int = 9) -> np.ndarray[Any, Any]:
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_GREY, fontweight="bold")
    axes.set_xlabel("step", color=_GREY, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_GREY, labelsize=8)
    axes.grid(axis="y", color=_GREY, alpha=0.2, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GREY)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=_GREY)
    else:
        axes.text(0.5, 0.5, "not part of this training", color=_GREY, ha="center", transform=axes.transAxes)
