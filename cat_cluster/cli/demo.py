"""The demo: teach the embedded base one particular object with plain LoRA and with CAT, and compare what each did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from PIL import Image
from rich.table import Table

from cat_cluster.cli.demo_serving import serve_once
from cat_cluster.cluster.driver import run_on_ray
from cat_cluster.errors import CatClusterError
from cat_cluster.evaluation.recognition import DESIGN_FILE
from cat_cluster.evaluation.report import MethodResult, ReportFiles, ReportInput, write_report
from cat_cluster.evaluation.results import Evaluation
from cat_cluster.models.device import choose_device
from cat_cluster.models.pocket import world
from cat_cluster.pipeline.job import AdapterResult, JobListener
from cat_cluster.pipeline.published_adapters import evaluate_published
from cat_cluster.registry import Reference, Registry
from cat_cluster.settings import Settings
from cat_cluster.spec.job import load_spec
from cat_cluster.store import open_store

CONCEPT = "striped-cup"
TOKEN = "sks"
PHOTOS = 6
# LoRA and CAT have equal draws (one draw key), rank, learning rate and steps: the CAT term is the only difference.
SPEC = {
    "name": "demo",
    "base": "pocket",
    "training": {
        "steps": 420,
        "draw_key": CONCEPT,
    },
    "cluster": {"workers": 2, "max_pack": 2},
    "evaluation": {"images_per_prompt": 3, "steps": 20},
    "storage": "registry",
}
SHOWN = ("kps", "base_drift", "identity_similarity", "identity_gain", "diversity_ratio")


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


def run_demo(out: Path, settings: Settings, listener: JobListener) -> DemoResult:
    """Draw a concept's photos, train LoRA and CAT on them in one pack, measure, publish and report into `out`.

    Training runs on a Ray of this machine with two workers.
    Running it again reuses what is published and writes the report anew. Raises CatClusterError when an adapter fails.
    """
    spec_path = write_spec(out)
    job = load_spec(spec_path)
    store = open_store(out / "registry")
    listener.message(f"Drew {PHOTOS} photos of a concept the base has never seen: {out / 'photos' / CONCEPT}")
    results = run_on_ray(job, store.url, settings, listener)
    failed = [result for result in results if result.outcome == "failed"]
    if failed:
        raise CatClusterError(f"adapter {failed[0].adapter_id} failed: {failed[0].reason}")
    registry, device = Registry(store), choose_device(settings.device)
    methods = []
    for result in results:
        evaluation = result.evaluation or evaluate_published(
            registry, Reference(result.adapter_id, result.revision), device, listener, {}
        )
        methods.append(_method_result(result, evaluation))
    listener.message("Starting the service, and asking both adapters and the base at once")
    served = serve_once(
        out / "registry",
        [result.adapter_id for result in results],
        f"a picture of a {TOKEN} cup in snow",
        "a picture of a cup in snow",
        out / "serve.log",
    )
    report = ReportInput(
        title="CAT against plain LoRA on Pocket-SD", base_name="pocket", methods=tuple(methods), served=served
    )
    files = write_report(out, report)
    return DemoResult(files, out / "registry", methods[0].evaluation, methods[1].evaluation)


def write_spec(out: Path) -> Path:
    """Write the demo's photos with captions and its job spec, as a user would have them, and return the spec's path."""
    design = world.CONCEPTS[CONCEPT]
    draw_photos(out / "photos" / CONCEPT, design, TOKEN)
    for name, other in world.CONCEPTS.items():  # for the example specs under jobs/specs; not trained here
        if name != CONCEPT:
            draw_photos(out / "photos" / name, other, None)
    concept = {"token": TOKEN, "class_noun": design.object, "images": f"photos/{CONCEPT}"}
    adapters = [
        {"id": f"{CONCEPT}-lora", "method": "lora", "concepts": [concept]},
        {"id": CONCEPT, "method": "cat", "concepts": [dict(concept)]},
    ]
    path = out / "spec.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "adapters": adapters}, sort_keys=False), encoding="utf-8")
    return path


def draw_photos(folder: Path, design: world.Design, token: str | None) -> None:
    """Draw the photos of a design, with captions where a token is given, and its design beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, (photo, scene) in enumerate(world.photos(design, PHOTOS, seed=0)):
        Image.fromarray(photo).save(folder / f"{n}.png")
        if token is not None:
            caption = f"a photo of a {token} {design.object} {scene.place}\n"
            (folder / f"{n}.txt").write_text(caption, encoding="utf-8")
    (folder / DESIGN_FILE).write_text(json.dumps(asdict(design), indent=2) + "\n", encoding="utf-8")


def _method_result(result: AdapterResult, evaluation: Evaluation) -> MethodResult:
    manifest = result.manifest
    assert manifest is not None  # every outcome but "failed" has one
    return MethodResult(
        method=manifest.method,
        evaluation=evaluation,
        history=manifest.training["history"],
        facts={"adapter": manifest.name, "rank": str(manifest.rank), "steps": str(manifest.training["steps"])},
    )
