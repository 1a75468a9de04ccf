"""What a result is stamped with: the code as it was when measuring began."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cat_cluster.errors import CatClusterError
from jobs.benchmark import record
from jobs.benchmark.record import Start, begin, training_digest
from jobs.benchmark.study.trials import Trial, TrialRunner, pocket_subject


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a file of training code, in the place of this one."""
    code = tmp_path / "cat_cluster" / "training" / "step.py"
    code.parent.mkdir(parents=True)
    code.write_text("LOSS = 1\n")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    return code


def test_a_result_names_the_commit_at_which_measuring_began(tree: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree.parent, capture_output=True, text=True, check=True)
    start = begin()
    assert (start.commit, start.dirty) == (head.stdout.strip(), False)
    assert start.measured.endswith("+00:00")


def test_uncommitted_changes_are_refused_unless_allowed(tree: Path, tmp_path: Path) -> None:
    tree.write_text("LOSS = 2\n")
    with pytest.raises(CatClusterError, match=r"uncommitted changes.*--allow-dirty"):
        begin()
    assert begin(allow_dirty=True).dirty
    for path in (tmp_path / ".git").rglob("HEAD"):
        path.unlink()
    with pytest.raises(CatClusterError, match="is no git checkout"):
        begin()
    assert begin(allow_dirty=True).commit == "unknown"


def test_other_settings_and_other_code_have_another_digest(tree: Path) -> None:
    before = training_digest({"steps": 1})
    assert training_digest({"steps": 1}) == before
    assert training_digest({"steps": 2}) != before
    tree.write_text("LOSS = 2\n")
    assert training_digest({"steps": 1}) != before


def test_a_kept_trial_is_found_by_its_settings_and_code_not_by_its_name(tree: Path, tmp_path: Path) -> None:
    start, subject = Start("2026-11-25T06:03:30+00:00", "3e80859", dirty=False), pocket_subject("striped-cup")

    def place(trial: Trial, training: dict[str, int], images: int = 1) -> Path:
        return TrialRunner(start, tmp_path / "kept", training, {"images_per_prompt": images})._path(trial, subject, 0)

    cat = Trial("cat", alpha=5.0)
    first = place(cat, {"steps": 3})
    assert place(Trial("cat", alpha=5.0), {"steps": 3}) == first
    others = [
        place(Trial("cat", alpha=1.0), {"steps": 3}),
        place(Trial("cat", alpha=5.0, training={"rank": 2}), {"steps": 3}),
        place(cat, {"steps": 4}),
        place(cat, {"steps": 3}, images=2),
    ]
    tree.write_text("LOSS = 2\n")
    others.append(place(cat, {"steps": 3}))
    assert len({first, *others}) == 6
