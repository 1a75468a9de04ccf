"""Every optional setting of a training step has its effect: through the command line, on a tiny base."""

from __future__ import annotations

from pathlib import Path

from tests.support.tiny_jobs import CommandLine, adapter, published_weights, relative_change, write_spec

OPTIONS = {
    "reference": {},
    "pool": {"teacher": "pool", "pool_size": 2},
    "high": {"alpha_schedule": "high_noise"},
    "low": {"alpha_schedule": "low_noise"},
    "budget": {"drift_budget": 1.0e-6},
    "fraction": {"cat_fraction": 0.5},
    "upper": {"blocks": "up"},
    "calls": {"joint_rows": False},
}


def test_each_option_changes_what_it_should_and_nothing_else(
    command: CommandLine, tiny_base_folder: Path, photos: Path, tmp_path: Path
) -> None:
    common = {"draw_key": "options", "steps": 8, "rows_per_concept": 2, "cat_fraction": 1.0, "learning_rate": 0.02}
    spec = write_spec(
        tmp_path / "spec.yaml",
        tiny_base_folder,
        [{**adapter(name, photos), "training": option} for name, option in OPTIONS.items()],
        training=common,
        evaluation={"enabled": False},
    )
    storage = tmp_path / "storage"
    finished = command("train", "--in-process", spec, "--storage", storage, "--json")
    assert finished.code == 0, finished.err
    weights = {name: published_weights(storage, name) for name in OPTIONS}
    digests = {name: one.digest() for name, one in weights.items()}
    assert len(set(digests.values())) == len(OPTIONS), "an option had no effect, not even on the rounding"
    everywhere = set(weights["reference"].layers)
    assert set(weights["upper"].layers) == {name for name in everywhere if name.startswith("up_blocks.")}
    # Two calls instead of one are the same loss: only the order of sums may differ.
    assert relative_change(weights["calls"], weights["reference"]) <= 1e-3
