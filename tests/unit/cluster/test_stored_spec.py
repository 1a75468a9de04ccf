"""Specs in the storage: found by their address, and read only when they are what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cat_cluster.cluster.stored_spec import load_job, spec_address, store_spec
from cat_cluster.errors import SpecError
from cat_cluster.runs.progress import RunProgress
from cat_cluster.runs.run import Expectation, Run
from cat_cluster.spec.job import load_spec
from cat_cluster.store import open_store
from jobs import train

SPEC = """\
name: tea
adapters:
- id: cup
  concepts:
  - {token: sks, class_noun: Täßchen, images: s3://bucket/cups}
"""


def test_a_stored_spec_is_the_spec_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(SPEC)
    store = open_store((tmp_path / "a store").as_uri())
    address = store_spec(SPEC, store)
    assert store_spec(SPEC, store) == address == spec_address(SPEC, store.url)
    assert len(store.list("specs/")) == 1
    assert load_job(address) == load_job(str(file)) == load_spec(file)


def test_a_spec_that_is_not_there_or_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(tmp_path / "store")
    address = spec_address(SPEC, store.url)
    with pytest.raises(SpecError, match=r"is not the address of a stored spec, which ends with /specs/<sha256>\.yaml"):
        load_job("s3://bucket/prod/specs/0a.yaml")
    with pytest.raises(SpecError, match=r"has no such spec.*--upload"):
        load_job(address)
    store_spec(SPEC, store)
    store.put(store.list("specs/")[0], SPEC.replace("tea", "ink").encode())
    with pytest.raises(SpecError, match=r"damaged.*another digest"):
        load_job(address)
    assert train.main([address]) == 1
    assert "damaged" in capsys.readouterr().out


def test_what_is_wrong_in_a_stored_spec_is_said_of_its_address(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    for text, wrong in (
        (SPEC.replace("token", "tokne"), r"2 fields cannot be.*\(line 5\)"),
        ("- tea", "must hold keys"),
    ):
        address = store_spec(text, store)
        with pytest.raises(SpecError, match=f"(?s)^{re.escape(address)}: {wrong}"):
            load_job(address)


def test_a_driver_that_fails_before_its_record_ends_the_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # it fails for want of photos, not of a folder
    store = open_store((tmp_path / "store").as_uri())
    spec = tmp_path / "spec.yaml"
    (tmp_path / "none").mkdir()
    spec.write_text(f"storage: {store.url}\n{SPEC.replace('s3://bucket/cups', str(tmp_path / 'none'))}")
    run = Run(store, "run-0123456789ab")
    for attempt in (1, 2):
        run.expect(Expectation(job="RayJob tea", look="kubectl", after=run.last_attempt()))
        assert run.awaited() is not None
        assert train.main([str(spec), "--expected", run.run_id]) == 1
        assert run.awaited() is None
        progress = run.progress()
        assert (progress.state, progress.attempt) == ("failed", attempt)
        assert str(tmp_path / "none") in str(progress.reason)


def test_a_driver_that_nobody_waits_for_leaves_the_record_of_another(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    spec = tmp_path / "spec.yaml"
    (tmp_path / "none").mkdir()
    spec.write_text(f"storage: {store.url}\n{SPEC.replace('s3://bucket/cups', str(tmp_path / 'none'))}")
    run = Run(store, "run-0123456789ab")
    assert train.main([str(spec), "--expected", run.run_id]) == 1
    assert run.last_record() is None
    begun = RunProgress.begin(run.run_id, load_spec(spec), state="running", attempt=run.claim().number)
    run.write_progress(begun)
    run.expect(Expectation(job="RayJob tea", look="kubectl"))
    assert train.main([str(spec), "--expected", run.run_id]) == 1
    assert run.progress() == begun
    assert run.last_attempt() == 1
