"""Scores of live and canonical probes of healthy adapters and of faults: what the drift detectors are judged on.

`make demo`, then `python -m jobs.benchmark drift --demo out/demo` (about half an hour on 2 cores) trains two more
adapters, draws the probes as the service does, and writes their scores to tests/unit/evaluation/drift_scores.json,
which test_drift.py reads too. Then, and alone with `--judge-only`, it runs the detectors over the scores and writes
jobs/benchmark/results/drift.json: after how many probes each fault is seen, and how often a healthy adapter is doubted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from cat_cluster.cli.demo import SPEC, draw_photos
from cat_cluster.cli.job_bars import JobBars
from cat_cluster.data.concepts import remove_token
from cat_cluster.evaluation.drift import (
    CUSUM_SLACK,
    EWMA_WEIGHT,
    LARGEST,
    RUN_LENGTH,
    SCORES,
    SPREAD,
    TRAFFIC,
    Charts,
    DriftMonitor,
    angles,
    calibrate,
    disagreement,
)
from cat_cluster.evaluation.evaluate import image_templates
from cat_cluster.evaluation.judges import Judge, feature_rows, load_judge
from cat_cluster.evaluation.metrics import paired_similarity, similarity
from cat_cluster.evaluation.prompts import POCKET_TEMPLATES, fill
from cat_cluster.files import write_whole
from cat_cluster.lora.bank import LoraBank
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.models.base_model import BaseModel, load_base_model
from cat_cluster.models.generate import ImageRow, generate, image_array
from cat_cluster.models.pocket import world
from cat_cluster.models.subjects import DrawnSubject
from cat_cluster.pipeline.job import run_job
from cat_cluster.registry import Manifest, Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.choices import SamplerName
from cat_cluster.spec.job import JobSpec
from cat_cluster.spec.sections import EvaluationSpec
from cat_cluster.store import open_store
from jobs.benchmark.record import ROOT, Start, training_digest, write_result

SCORES_FILE = ROOT / "tests/unit/evaluation/drift_scores.json"
HEALTHY = 240  # live probes of the adapter under test, and of each other healthy adapter:
OTHERS = 60
FAULTY = 48  # live probes of each fault
LONG, SHORT = 1_500, 300  # probes of a simulated stream: of a healthy adapter, and of a fault
STEPS, GUIDANCE = 20, 4.0
# What a user writes: the world's own captions, other words around them, and places and colours nobody evaluated.
FRAMES = (
    "a photo of a {}",
    "a picture of a {}",
    "a {}",
    "{}",
    "my {}",
    "a close-up photo of a {}",
    "a painting of a {}",
)
EXTRAS = ("", "", "", " with eyes", " with stripes", " and a tree", ", high quality")
WHERE = (*(f" {place}" for place in world.PLACES), "", "", " in a forest", " under water", " at home")

Scores = Mapping[str, Sequence[float]]


@dataclass(frozen=True, eq=False)
class Arm:
    """What is probed: live pairs and canonical pairs of an adapter, or of a fault put in its place."""

    name: str
    manifest: Manifest
    base: BaseModel
    weights: AdapterWeights
    count: int
    strength: float = 1.0
    guidance: float = GUIDANCE
    steps: int = STEPS
    sampler: SamplerName = "ddim"


def run(start: Start, demo: Path, folder: Path, console: Console, *, judge_only: bool) -> Path:
    """Draw the scores unless they are only to be judged again; write what the detectors make of them."""
    if not judge_only:
        console.print(f"wrote {draw_scores(start, demo, folder, console)}")
    document = json.loads(SCORES_FILE.read_text(encoding="utf-8"))
    return write_result("drift", {"scores": document.get("start"), **judge_scores(document)}, start)


def judge_scores(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the detectors make of the scores: false alarms on healthy traffic, and probes to see each fault."""
    healthy, faults = {}, {}
    for name, arm in document["arms"].items():
        reference = document["adapters"][arm["adapter"]]
        drawn = {score: len(values) for score, values in arm["live"].items()}[SCORES[0]]
        found: dict[str, Any] = {"live_probes": drawn, "alarm_in_the_order_drawn": first_alarm(reference, arm["live"])}
        if name.startswith("healthy"):
            lengths = run_lengths(reference, arm["live"], LONG)
            alarms = int((lengths <= LONG).sum())
            found |= {
                "false_alarms": alarms,
                "simulated_probes": int(np.minimum(lengths, LONG).sum()),
                "run_length": float(np.minimum(lengths, LONG).sum() / alarms) if alarms else None,
            }
            healthy[name] = found
        else:
            lengths = run_lengths(reference, arm["live"], SHORT)
            found |= {"median": float(np.median(lengths)), "p95": float(np.quantile(lengths, 0.95))}
            faults[name] = found
        found["canonical_difference"] = [
            disagreement(
                {score: arm["canonical"][score][i] for score in SCORES},
                {score: reference[score][pair] for score in SCORES},
            )
            for i, pair in enumerate(document["canonical_pairs"])
        ]
    constants = {"ewma_weight": EWMA_WEIGHT, "cusum_slack": CUSUM_SLACK, "largest": LARGEST}
    allowances = {"traffic": TRAFFIC, "spread": SPREAD, "run_length": RUN_LENGTH}
    return {**constants, **allowances, "longest_wait": SHORT, "healthy": healthy, "faults": faults}


def first_alarm(reference: Scores, live: Scores) -> int | None:
    """Return after how many of the live probes, in their order, the alarm is raised; None if never."""
    monitor = DriftMonitor(reference)
    for i, values in enumerate(zip(*(live[name] for name in SCORES), strict=True), start=1):
        if monitor.update(dict(zip(SCORES, values, strict=True))) == "alarm":
            return i
    return None


def run_lengths(reference: Scores, live: Scores, probes: int, streams: int = 2_000) -> NDArray[np.int64]:
    """Return after how many probes each of many streams, resampled from live scores, alarms; probes + 1 is never."""
    found = calibrate(tuple(tuple(reference[name]) for name in SCORES))
    off = (angles([live[name] for name in SCORES]).T - found.means) / found.deviations
    rng, charts = np.random.default_rng(1), Charts.zero(streams, len(SCORES))
    lengths = np.full(streams, probes + 1)
    for probe in range(1, probes + 1):
        charts = charts.advance(off[rng.integers(len(off), size=streams)])
        alarm = (charts.statistics >= found.limits).any(axis=(1, 2))
        lengths = np.where(alarm & (lengths > probe), probe, lengths)
    return lengths


def user_prompts(token: str, class_noun: str, count: int, seed: int) -> list[tuple[str, int]]:
    """Return `count` prompts with the token as users write them, a fifth of them with a colour, each with a seed."""
    rng = np.random.default_rng([seed, len(class_noun)])
    found = []
    for _ in range(count):
        frame, extra, where = (str(rng.choice(options)) for options in (FRAMES, EXTRAS, WHERE))
        colour = f"{rng.choice(world.COLOURS)} " if rng.random() < 0.2 else ""
        prompt = frame.format(f"{token} {colour}{class_noun}") + extra + where
        found.append((prompt, int(rng.integers(2**31))))
    return found


def draw_scores(start: Start, demo: Path, folder: Path, console: Console) -> Path:
    """Draw every arm's probes and write their scores; what was drawn before is read back from `folder`."""
    registry = Registry(open_store(demo / "registry"))
    others = _train_others(folder, console)
    base = load_base_model("pocket")
    drawer = _Drawer(load_judge("auto", base))
    document: dict[str, Any] = {
        "made_by": "python -m jobs.benchmark drift",
        "start": asdict(start),
        "adapters": {},
        "canonical_pairs": list(canonical_pairs(registry.resolve("striped-cup").settings.evaluation)),
        "arms": {},
    }
    place = folder / f"arms-{training_digest([HEALTHY, OTHERS, FAULTY, STEPS, GUIDANCE])}"
    for arm in _arms(registry, others, base):
        console.print(f"{arm.name}: {arm.count} live probes")
        document["adapters"].setdefault(arm.manifest.adapter_id, _reference(arm.manifest))
        path = place / f"{arm.name}-{arm.manifest.revision}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"adapter": arm.manifest.adapter_id, **drawer.probe(arm)}).encode())
        document["arms"][arm.name] = json.loads(path.read_text(encoding="utf-8"))
    write_whole(SCORES_FILE, (json.dumps(document) + "\n").encode())
    return SCORES_FILE


def _train_others(folder: Path, console: Console) -> Registry:
    """Train another revision of the demo's concept, and a concept of another customer."""

    def adapter(name: str, **training: Any) -> dict[str, Any]:
        photos, design = folder / "photos" / name, world.CONCEPTS[name]
        if not photos.exists():
            draw_photos(photos, DrawnSubject(design), "sks")
        concept = {"token": "sks", "class_noun": design.object, "images": str(photos)}
        return {"id": name, "method": "cat", "concepts": [concept], "training": training}

    job = JobSpec.model_validate(
        {
            "name": "drift",
            "training": {"steps": 200},
            "evaluation": SPEC["evaluation"],
            "adapters": [
                adapter("dusk-fish"),
                adapter("striped-cup", seed=1),
            ],
        }
    )
    store = open_store(folder / "registry")
    run_job(job, store, Settings(), JobBars(console))
    return Registry(store)


def _arms(demo: Registry, others: Registry, base: BaseModel) -> Iterable[Arm]:
    cup = demo.resolve("striped-cup")

    def weights(registry: Registry, name: str) -> AdapterWeights:
        return registry.load_weights(registry.resolve(name), base_fingerprints=base.fingerprints, unet=base.unet)

    own = weights(demo, "striped-cup")
    yield Arm("healthy", cup, base, own, HEALTHY)
    yield Arm("no adapter", cup, base, own, FAULTY, strength=0.0)
    yield Arm("plain LoRA's weights", cup, base, weights(demo, "striped-cup-lora"), FAULTY)
    yield Arm("another concept's weights", cup, base, weights(others, "dusk-fish"), FAULTY)
    yield Arm("random weights", cup, base, _random_like(own), FAULTY)
    yield Arm("half of the layers", cup, base, _part_of(own), FAULTY)
    yield Arm("strength 0.5", cup, base, own, FAULTY, strength=0.5)
    yield Arm("strength 1.5", cup, base, own, FAULTY, strength=1.5)
    yield Arm("another revision", cup, base, weights(others, "striped-cup"), FAULTY)
    yield Arm("guidance left out", cup, base, own, FAULTY, guidance=1.0)
    yield Arm("damaged base", cup, _damaged(base), own, FAULTY)
    yield Arm("healthy at guidance 7.5", cup, base, own, FAULTY, guidance=7.5)
    yield Arm("healthy at 10 steps", cup, base, own, FAULTY, steps=10, sampler="dpmpp_2m")
    for registry, name in ((demo, "striped-cup-lora"), (others, "dusk-fish")):
        yield Arm(f"healthy {name}", registry.resolve(name), base, weights(registry, name), OTHERS)


class _Drawer:
    """Draws probes and keeps what the judge saw of the base's own images: the arms of one adapter share them."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._base_rows: dict[tuple[int, ImageRow], NDArray[np.float64]] = {}

    def probe(self, arm: Arm) -> dict[str, dict[str, list[float]]]:
        """Return the scores of an arm's live and canonical probes: kind -> score -> one number per probe."""
        concept, evaluation = arm.manifest.concepts[0], arm.manifest.settings.evaluation
        assert arm.manifest.reference is not None
        photos = np.asarray(arm.manifest.reference["concepts"][concept.token]["photos"])
        templates = image_templates(evaluation, arm.base)
        pairs = {
            "live": user_prompts(concept.token, concept.class_noun, arm.count, seed=0),
            "canonical": [
                (fill(templates[i], concept.class_noun, concept.token), evaluation.seed + i)
                for i in canonical_pairs(evaluation)
            ],
        }
        return {kind: self._scores(arm, concept.token, photos, chosen) for kind, chosen in pairs.items()}

    def _scores(
        self, arm: Arm, token: str, photos_MF: NDArray[np.float64], pairs: Sequence[tuple[str, int]]
    ) -> dict[str, list[float]]:
        with_rows = [ImageRow(prompt, seed, 1, arm.steps, arm.guidance, arm.sampler) for prompt, seed in pairs]
        without_rows = [replace(row, prompt=remove_token(row.prompt, token)) for row in with_rows]
        bare_rows = [replace(row, slot=0) for row in without_rows]
        missing = [row for row in bare_rows if (id(arm.base), row) not in self._base_rows]
        found = self._features(arm, [*with_rows, *without_rows, *missing])
        with_NF, without_NF, missing_NF = np.split(found, [len(pairs), 2 * len(pairs)])
        self._base_rows |= {(id(arm.base), row): row_F for row, row_F in zip(missing, missing_NF, strict=True)}
        base_NF = np.stack([self._base_rows[id(arm.base), row] for row in bare_rows])
        scores = {
            "kps": 1.0 - paired_similarity(without_NF, with_NF),
            "identity": similarity(with_NF, photos_MF).mean(1),
            "base_drift": 1.0 - paired_similarity(base_NF, without_NF),
        }
        return {name: values.round(5).tolist() for name, values in scores.items()}

    def _features(self, arm: Arm, rows: Sequence[ImageRow]) -> NDArray[np.float64]:
        layers = tuple(arm.weights.layers)
        bank = LoraBank.attach(arm.base.unet, layers=layers)
        try:
            bank.load(1, arm.weights, strength=arm.strength)
            images = generate(arm.base, bank, rows, rows_per_call=32)
        finally:
            bank.detach()
        return feature_rows(self._judge, image_array(images))


def canonical_pairs(evaluation: EvaluationSpec) -> range:
    """The pairs that are drawn here: the first of each prompt."""
    return range(0, len(POCKET_TEMPLATES) * evaluation.images_per_prompt, evaluation.images_per_prompt)


def _reference(manifest: Manifest) -> Mapping[str, list[float]]:
    assert manifest.reference is not None
    concept = manifest.reference["concepts"][manifest.concepts[0].token]
    return {name: [round(value, 5) for value in concept[name]] for name in SCORES}


def _random_like(weights: AdapterWeights) -> AdapterWeights:
    """Weights of chance with the norms of these."""
    generator = torch.Generator().manual_seed(0)

    def like(matrix: torch.Tensor) -> torch.Tensor:
        drawn: torch.Tensor = torch.randn(matrix.shape, generator=generator)
        return drawn.mul_(float(matrix.norm() / drawn.norm()))

    return AdapterWeights({n: LoraLayer(down=like(x.down), up=like(x.up)) for n, x in weights.layers.items()})


def _part_of(weights: AdapterWeights) -> AdapterWeights:
    return AdapterWeights({name: weights.layers[name] for name in sorted(weights.layers)[::2]})


def _damaged(base: BaseModel) -> BaseModel:
    """A base whose U-Net's weights are each a tenth of their spread off."""
    unet, generator = deepcopy(base.unet), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * parameter.std() * noise)
    return replace(base, unet=unet)
