"""The demo: teach the embedded base three particular objects with plain LoRA and with CAT, and compare what each did.

Each object has an adapter of its own. One object is measured closely; at the end each method's three are summed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rich.table import Table

from cat_cluster.cli.demo_serving import StackRow, draw_stacks, draw_together, serving
from cat_cluster.cluster.driver import run_on_ray
from cat_cluster.errors import CatClusterError
from cat_cluster.evaluation.recognition import DESIGN_FILE
from cat_cluster.evaluation.report import METHOD_LABELS, MethodResult, ReportFiles, ReportInput, write_report
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.models.device import choose_device
from cat_cluster.models.pocket import world
from cat_cluster.models.pocket_xl.captions import with_article
from cat_cluster.models.subjects import DrawnSubject, PicturedSubject, Subject
from cat_cluster.pipeline.job import AdapterResult, JobListener
from cat_cluster.pipeline.published_adapters import evaluate_published
from cat_cluster.registry import Reference, Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import open_store

METHODS = ("lora", "cat")
PHOTOS = 6
SPEC = {
    "name": "demo",
    "training": {"steps": 480},
    "cluster": {"workers": 2, "max_pack": 6},
    "evaluation": {"images_per_prompt": 3, "steps": 20},
    "storage": "registry",
}
SHOWN = ("kps", "base_drift", "identity_similarity", "identity_gain", "diversity_ratio")


@dataclass(frozen=True)
class Lesson:
    """What the demo teaches an embedded base: token -> the name of a concept; the first one is measured closely.

    subjects: what the concepts' photos show, by name; those without a token are for the example specs of jobs/specs.
    """

    base: str
    title: str
    tokens: Mapping[str, str]
    subjects: Mapping[str, Subject]

    @property
    def measured(self) -> str:
        """The concept that is measured closely."""
        return next(iter(self.tokens.values()))

    def prompts(self, concept: str) -> tuple[str, str]:
        """Return a prompt with a concept's token and the same without it."""
        noun = self.subjects[concept].noun
        token = next(token for token, name in self.tokens.items() if name == concept)
        return f"a picture of a {token} {noun} in snow", f"a picture of {with_article(noun)} in snow"


LESSONS = {
    "pocket": Lesson(
        "pocket",
        "Pocket-SD",
        {"sks": "striped-cup", "zwx": "clown-fish", "ohwx": "candy-house"},
        {name: DrawnSubject(design) for name, design in world.CONCEPTS.items()},
    ),
    "pocket-xl": Lesson(
        "pocket-xl",
        "Pocket-XL",
        {"sks": "fluent-teddy-bear", "zwx": "fluent-rocket", "ohwx": "fluent-owl"},
        {name: PicturedSubject(name) for name in ("fluent-teddy-bear", "fluent-rocket", "fluent-owl")},
    ),
}


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's report and registry are, and the evaluations behind them."""

    files: ReportFiles
    storage: Path
    lora: Evaluation
    cat: Evaluation

    def table(self) -> Table:
        """The headline numbers for the terminal."""
        table = Table(title="The same photos, steps and seeds; only the CAT term differs", min_width=60)
        for heading in ("", "LoRA", "CAT", "better"):
            table.add_column(heading, justify="left" if heading in ("", "better") else "right")
        for metric in SHOWN:
            lora, cat = self.lora.metrics[metric], self.cat.metrics[metric]
            better = "lower" if metric == "base_drift" else "near 1" if metric == "diversity_ratio" else "higher"
            table.add_row(metric, *(f"{value:.3f}" for value in (lora, cat) if value is not None), better)
        decoys = (one.judges[0].leaks.decoy_gain for one in (self.lora, self.cat))
        table.add_row("identity gain by a decoy word", *(f"{value:.3f}" for value in decoys), "near 0")
        return table


def run_demo(out: Path, settings: Settings, listener: JobListener, base: str = "pocket") -> DemoResult:
    """Draw photos of the concepts, train LoRA and CAT on each in one pack, measure, publish, stack and report.

    Training runs on a Ray of this machine with two workers.
    Running it again reuses what is published and writes the report anew. Raises CatClusterError when an adapter fails.
    """
    lesson = LESSONS[base]
    spec_path = write_spec(out, lesson)
    job = load_spec(spec_path)
    store = open_store(out / "registry")
    names = ", ".join(lesson.tokens.values())
    listener.message(f"Drew {PHOTOS} photos each of what the base has never seen ({names}): {out / 'photos'}")
    results = run_on_ray(job, store.url, settings, listener)
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        raise CatClusterError(f"adapter {failed[0].adapter_id} failed: {failed[0].reason}")
    registry, device = Registry(store), choose_device(settings.device)
    methods = []
    for result in results:
        if result.adapter_id not in _adapters_of(lesson.measured).values():
            continue
        evaluation = result.evaluation or evaluate_published(
            registry, Reference(result.adapter_id, result.revision), device, listener, {}
        )
        methods.append(_method_result(result, evaluation))
    listener.message("Starting the service, and asking for adapters, stacks of them and the base at once")
    with serving(out / "registry", out / "serve.log", base) as service:
        served = draw_together(service, list(_adapters_of(lesson.measured).values()), *lesson.prompts(lesson.measured))
        taught = lesson.tokens.values()
        adapters = {METHOD_LABELS[method]: [_adapters_of(name)[method] for name in taught] for method in METHODS}
        stacks = draw_stacks(service, adapters, _stack_rows(out, lesson))
    title = f"CAT against plain LoRA on {lesson.title}"
    files = write_report(out, ReportInput(title, base, tuple(methods), served=served, stacks=stacks))
    return DemoResult(files, out / "registry", methods[0].evaluation, methods[1].evaluation)


def write_spec(out: Path, lesson: Lesson) -> Path:
    """Write the demo's photos with captions and its job spec, as a user would have them, and return the spec's path."""
    tokens = {name: token for token, name in lesson.tokens.items()}
    for name, subject in lesson.subjects.items():
        draw_photos(out / "photos" / name, subject, tokens[name] if name == lesson.measured else None)
    adapters = []
    for name, token in tokens.items():
        concept = {"token": token, "class_noun": lesson.subjects[name].noun, "images": f"photos/{name}"}
        # LoRA and CAT have equal draws (one draw key) and settings: the CAT term is the only difference. The other
        # concepts have one row in a step and are not measured, so that two cores need less than six minutes.
        is_measured = name == lesson.measured
        training = {"draw_key": name} if is_measured else {"draw_key": name, "rows_per_concept": 1}
        for method, adapter in _adapters_of(name).items():
            settings = {"training": dict(training), "evaluation": {"enabled": is_measured}}
            adapters.append({"id": adapter, "method": method, "concepts": [dict(concept)], **settings})
    path = out / "spec.yaml"
    spec = {**SPEC, "base": lesson.base, "adapters": adapters}
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return path


def draw_photos(folder: Path, subject: Subject, token: str | None) -> None:
    """Draw the photos of a subject, with captions where a token is given, and what they show beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, (photo, place) in enumerate(subject.photos(PHOTOS, seed=0)):
        Image.fromarray(photo).save(folder / f"{n}.png")
        if token is not None:
            caption = f"a photo of a {token} {subject.noun} {place}\n"
            (folder / f"{n}.txt").write_text(caption, encoding="utf-8")
    (folder / DESIGN_FILE).write_text(json.dumps(subject.to_json(), indent=2) + "\n", encoding="utf-8")


def _adapters_of(concept: str) -> dict[str, str]:
    """Return method -> the adapter of a concept."""
    return dict(zip(METHODS, (f"{concept}-lora", concept), strict=True))


def _stack_rows(out: Path, lesson: Lesson) -> list[StackRow]:
    """Return the prompts with tokens, a concept each, and below them those without."""
    rows = []
    for arm in (0, 1):
        for place, name in enumerate(lesson.tokens.values()):
            photo = np.asarray(Image.open(out / "photos" / name / "0.png").convert("RGB"))
            rows.append(StackRow(lesson.prompts(name)[arm], place, photo))
    return rows


def _method_result(result: AdapterResult, evaluation: Evaluation) -> MethodResult:
    manifest = result.manifest
    assert manifest is not None  # every outcome but "failed" has one
    return MethodResult(
        method=manifest.method,
        evaluation=evaluation,
        history=manifest.training["history"],
        facts={"adapter": manifest.name, "rank": str(manifest.rank), "steps": str(manifest.training["steps"])},
    )
