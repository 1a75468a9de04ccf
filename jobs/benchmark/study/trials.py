"""Trials: many settings trained on the same concepts, seeds and draws, so that only the setting differs.

A trial is what a user could write in a job spec; it runs through the same workflow, in packs, into a registry of its
own. What the judges saw is kept beside it, so that an interrupted study goes on where it stopped: under a digest of the
settings and of the code, so that no other study's trials are taken for its own.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cat_cluster.cli.demo import draw_photos
from cat_cluster.cli.job_bars import JobBars
from cat_cluster.errors import CatClusterError
from cat_cluster.evaluation.intervals import ConceptFeatures
from cat_cluster.evaluation.recognition import Recognition
from cat_cluster.files import write_whole
from cat_cluster.lora.formats import AdapterWeights
from cat_cluster.models.base_model import BaseModel
from cat_cluster.models.pocket import world
from cat_cluster.models.subjects import DrawnSubject
from cat_cluster.pipeline.job import AdapterResult, run_job
from cat_cluster.registry import Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import JobSpec
from cat_cluster.store import open_store
from jobs.benchmark.record import Start, training_digest

SEEDS_APART = 100  # training seed s is judged on image seeds 1000 + 100 s and on: its pairs are its own
_ARRAYS = ("without_NF", "with_NF", "base_without_NF", "base_with_NF", "photos_MF", "text_NF", "fisher_N")


@dataclass(frozen=True, eq=False)
class Trial:
    """A setting: method and alpha, and fields of the training spec that differ from the study's own."""

    name: str
    method: str = "cat"
    alpha: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaughtConcept:
    """A concept to teach: a design of the pocket world, or a folder of real photos with captions."""

    name: str
    token: str
    class_noun: str
    folder: Path | None = None
    captions: str = "auto"


@dataclass(frozen=True)
class Subject:
    """The concepts of one adapter; several make it a joint one."""

    name: str
    concepts: tuple[TaughtConcept, ...]


@dataclass(frozen=True, eq=False)
class Measured:
    """What became of one adapter: judge name -> token -> features; recognition, curves and its pack's seconds.

    start: when it was trained, and at which commit.
    """

    judges: Mapping[str, Mapping[str, ConceptFeatures]]
    recognition: Mapping[str, Mapping[str, float]]
    leaks: Mapping[str, Any]
    training: Mapping[str, Any]
    start: Start


@dataclass(frozen=True)
class TrialRunner:
    """What all trials of a study share. training and evaluation: spec fields; max_pack: adapters in one forward."""

    start: Start
    folder: Path
    training: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    max_pack: int = 8

    def run(
        self, trials: Sequence[Trial], subjects: Sequence[Subject], seeds: Sequence[int], console: Console
    ) -> dict[tuple[str, str, int], Measured]:
        """Train and measure every trial on every subject and seed; returns {(trial, subject, seed): measured}.

        Raises CatClusterError when an adapter fails. What an earlier call measured is read back.
        """
        # Trials of one subject and seed ride together: they share the base's images and the judges' heads.
        cells = [(trial, subject, seed) for subject in subjects for seed in seeds for trial in trials]
        missing = [cell for cell in cells if not self._path(*cell).exists()]
        if missing:
            paths = {_adapter_id(*cell): self._path(*cell) for cell in missing}
            self._train(missing, _SavingBars(console, paths, self.start))
        return {
            (trial.name, subject.name, seed): _read(self._path(trial, subject, seed)) for trial, subject, seed in cells
        }

    def weights(
        self, trial: Trial, subjects: Sequence[Subject], seed: int, base: BaseModel, console: Console
    ) -> dict[str, AdapterWeights]:
        """Train a trial on every subject; returns subject -> weights. Those of an earlier call are read back.

        Raises CatClusterError when an adapter fails.
        """
        registry = Registry(open_store(self._place / "registry"))
        found = {}
        for subject, result in zip(
            subjects, self._train([(trial, subject, seed) for subject in subjects], JobBars(console)), strict=True
        ):
            assert result.manifest is not None  # every outcome but "failed" has one
            found[subject.name] = registry.load_weights(
                result.manifest, base_fingerprints=base.fingerprints, unet=base.unet
            )
        return found

    def _train(self, cells: Sequence[tuple[Trial, Subject, int]], bars: JobBars) -> list[AdapterResult]:
        job = JobSpec.model_validate(self._job(cells))
        with bars:
            results = run_job(job, open_store(self._place / "registry"), Settings(), bars)
        failed = [result for result in results if result.outcome == "failed"]
        if failed:
            raise CatClusterError(f"{failed[0].adapter_id} failed: {failed[0].reason}")
        return list(results)

    @cached_property
    def _place(self) -> Path:
        """Where trials of these settings and this code are kept."""
        return self.folder / training_digest([self.training, self.evaluation])

    def _path(self, trial: Trial, subject: Subject, seed: int) -> Path:
        name = _adapter_id(trial, subject, seed)
        photos = [_content(concept.folder) for concept in subject.concepts if concept.folder is not None]
        settings = json.dumps([self._adapter(trial, subject, seed), photos], sort_keys=True)
        return self._place / "measured" / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.npz"

    def _job(self, cells: Sequence[tuple[Trial, Subject, int]]) -> dict[str, Any]:
        return {
            "name": self.folder.name,
            "adapters": [self._adapter(*cell) for cell in cells],
            "training": dict(self.training),
            "evaluation": dict(self.evaluation),
            "cluster": {"max_pack": self.max_pack, "checkpoint_every": 200},
        }

    def _adapter(self, trial: Trial, subject: Subject, seed: int) -> dict[str, Any]:
        alpha = {} if trial.alpha is None else {"alpha": trial.alpha}
        return {
            "id": _adapter_id(trial, subject, seed),
            "method": trial.method,
            "concepts": [{**self._concept(concept), **alpha} for concept in subject.concepts],
            "training": {**trial.training, "seed": seed, "draw_key": subject.name},
            "evaluation": {"seed": 1000 + SEEDS_APART * seed},
        }

    def _concept(self, concept: TaughtConcept) -> dict[str, Any]:
        folder = concept.folder
        if folder is None:
            folder = self._place / "photos" / f"{concept.name}-{concept.token}"
            if not folder.exists():
                draw_photos(folder, DrawnSubject(world.CONCEPTS[concept.name]), concept.token)
        return {
            "token": concept.token,
            "class_noun": concept.class_noun,
            "images": str(folder),
            "captions": concept.captions,
        }


class _SavingBars(JobBars):
    """Shows progress, and keeps what the judges saw of each adapter as soon as it is published."""

    def __init__(self, console: Console, paths: Mapping[str, Path], start: Start) -> None:
        super().__init__(console)
        self._paths, self._start = paths, start

    def finished(self, result: AdapterResult) -> None:
        super().finished(result)
        if result.evaluation is not None and result.manifest is not None:
            _write(self._paths[result.adapter_id], result, self._start)


def pocket_subject(name: str, token: str = "sks") -> Subject:
    """Return a subject of one design of the pocket world."""
    return Subject(name, (TaughtConcept(name, token, world.CONCEPTS[name].object),))


def _adapter_id(trial: Trial, subject: Subject, seed: int) -> str:
    return f"{trial.name}-{subject.name}-s{seed}"


def starts_of(cells: Iterable[Measured]) -> list[dict[str, Any]]:
    """Return when and at which commits these adapters were trained, each start once, in order of time."""
    return [asdict(start) for start in sorted({cell.start for cell in cells}, key=lambda start: start.measured)]


def _content(folder: Path) -> str:
    """Return the digest of a folder's files, by name and content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = [path.name.encode() + hashlib.sha256(path.read_bytes()).digest() for path in files]
    return hashlib.sha256(b"".join(named)).hexdigest()


def _write(path: Path, result: AdapterResult, start: Start) -> None:
    evaluation, manifest = result.evaluation, result.manifest
    assert evaluation is not None
    assert manifest is not None
    arrays: dict[str, Any] = {}
    for judge in evaluation.judges:
        for concept in judge.concepts:
            for name in _ARRAYS:
                value = getattr(concept, name)
                if value is not None:
                    arrays[f"{judge.name}/{concept.token}/{name}"] = value
    record = {
        "recognition": {t: f.to_json() for t, f in evaluation.recognition.items() if isinstance(f, Recognition)},
        "leaks": {judge.name: judge.leaks.to_json() for judge in evaluation.judges},
        "training": dict(manifest.training),
        "start": asdict(start),
    }
    buffer = io.BytesIO()
    np.savez(buffer, record=json.dumps(record), **arrays)
    write_whole(path, buffer.getvalue())


def _read(path: Path) -> Measured:
    with np.load(path) as stored:
        record = json.loads(str(stored["record"]))
        found: dict[str, dict[str, Any]] = {}
        for key in stored.files:
            if key != "record":
                judge, token, name = key.split("/")
                found.setdefault(judge, {}).setdefault(token, {})[name] = stored[key]
    judges = {
        judge: {token: _features(token, arrays) for token, arrays in tokens.items()} for judge, tokens in found.items()
    }
    return Measured(judges, record["recognition"], record["leaks"], record["training"], Start(**record["start"]))


def _features(token: str, arrays: Mapping[str, Any]) -> ConceptFeatures:
    return ConceptFeatures(
        token=token, text_NF=arrays.get("text_NF"), **{n: arrays[n] for n in _ARRAYS if n != "text_NF"}
    )
