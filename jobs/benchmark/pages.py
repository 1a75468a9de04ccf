"""docs/benchmarks, made from the result files alone: pages through templates/, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.benchmark import cluster, figures, service
from jobs.benchmark.record import RESULTS, ROOT, measured_on, read_result
from jobs.benchmark.serving.verdicts import threads_text, verdicts
from jobs.benchmark.study.aims import AIMS, Aim
from jobs.benchmark.study.compare import judges_of, leak_means
from jobs.benchmark.study.specificity import means
from jobs.benchmark.study.stacks import judges_summed

PAGES = ROOT / "docs" / "benchmarks"
STUDY_PARTS = ("single", "joint", "photos")
# What is measured at several sizes: on the pocket base and, on a GPU, on random bases of the releases' sizes.
SIZED = ("serving", "packing", "buckets")
_ON = {
    "": "the pocket base",
    "-gpu": "a GPU, a random base of Stable Diffusion 1.5's size",
    "-sdxl": "a GPU, a random base of Stable Diffusion XL's size",
}
_SHOWN = ("kps", "identity_gain", "identity_similarity", "base_drift", "diversity_ratio", "prompt_similarity")


def write_pages(results: Path = RESULTS, pages: Path = PAGES) -> list[Path]:
    """Write a page for every result that is there, its picture, and the index; return the paths of the pages."""
    pages.mkdir(parents=True, exist_ok=True)
    for name in pictures(results):
        draw_picture(name, pages / name, results)
    texts = page_texts(results)
    for name, text in texts.items():
        (pages / name).write_text(text, encoding="utf-8")
    return [pages / name for name in texts]


def page_texts(results: Path = RESULTS) -> dict[str, str]:
    """Return file name -> Markdown of every page whose results are there."""
    templates = _templates()
    clusters, study = _parts("cluster", cluster.PARTS, results), _parts("study", STUDY_PARTS, results)
    pages = {}
    if clusters:
        pages["cluster.md"] = templates.get_template("cluster.md.j2").render(parts=clusters)
    if services := _parts("service", service.PARTS, results):
        pages["service.md"] = templates.get_template("service.md.j2").render(parts=services)
    if study:
        first = next(iter(study.values()))
        pages["study.md"] = templates.get_template("study.md.j2").render(parts=study, first=first, aims=AIMS)
    for name in ("frontier", "specificity", "stacks", "optimisations"):
        if result := read_result(name, results):
            pages[f"{name}.md"] = templates.get_template(f"{name}.md.j2").render(result=result)
    for kind, (size, on) in product(SIZED, _ON.items()):
        if result := read_result(name := f"{kind}{size}", results):
            found = verdicts(result["parts"]) if kind == "serving" else ()
            pages[f"{name}.md"] = templates.get_template(f"{kind}.md.j2").render(
                result=result, on=on, picture=f"{name}.png", verdicts=found
            )
    titles = [(name, text.partition("\n")[0].removeprefix("# ")) for name, text in pages.items()]
    return {"README.md": templates.get_template("README.md.j2").render(pages=titles), **pages}


def pictures(results: Path = RESULTS) -> dict[str, list[Path]]:
    """Return file name -> the result files it is drawn from, of every picture whose results are there."""
    sources = {
        "frontier.png": ["frontier"],
        "study.png": [f"study-{part}" for part in STUDY_PARTS],
        **{f"{kind}{size}.png": [f"{kind}{size}"] for kind, size in product(("packing", "serving"), _ON)},
    }
    paths = {name: [results / f"{source}.json" for source in own] for name, own in sources.items()}
    found = {name: [path for path in own if path.is_file()] for name, own in paths.items()}
    return {name: own for name, own in found.items() if own}


def draw_picture(name: str, path: Path, results: Path = RESULTS) -> None:
    """Draw one of `pictures` to `path`; the PNG carries the digest of the result files it shows."""
    digest = figures.digest_of(pictures(results)[name])
    if name == "study.png":
        figures.draw_study(_parts("study", STUDY_PARTS, results), AIMS, path, digest)
        return
    result = read_result(name.removesuffix(".png"), results)
    assert result is not None
    kind = name.removesuffix(".png").partition("-")[0]
    draw = {"frontier": figures.draw_frontier, "packing": figures.draw_packing}.get(kind, figures.draw_serving)
    draw(result, path, digest)


def markdown_templates(folder: Path) -> Environment:
    """Return the templates of a folder; a name that a template lacks is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _parts(name: str, parts: Sequence[str], results: Path) -> dict[str, dict[str, Any]]:
    return {part: found for part in parts if (found := read_result(f"{name}-{part}", results)) is not None}


def _templates() -> Environment:
    """The templates of the pages, with filters for what takes more than printing a value."""
    templates = markdown_templates(Path(__file__).parent / "templates")
    templates.filters |= {
        "f": format,
        "words": lambda name: name.replace("_", " "),
        "threads": threads_text,
        "measured_on": measured_on,
        "judges_of": judges_of,
        "ends": _ends,
        "difference": _difference,
        "leak_means": leak_means,
        "means": means,
        "judges_summed": judges_summed,
        "verdict": _verdict,
        "shown_metrics": lambda scores: [metric for metric in _SHOWN if metric in next(iter(scores.values()))],
        "settings": lambda own: ", ".join(f"{name} {value}" for name, value in own.items() if name != "method"),
        "followed": _followed,
    }
    return templates


def _ends(interval: Sequence[float | None]) -> str:
    low, high = ("\N{INFINITY}" if end is None else f"{end:.3f}" for end in interval)
    return f"({low} to {high})"


def _difference(difference: Sequence[float] | None) -> str:
    return "-" if difference is None else f"{difference[0]:+.3f} ({difference[1]:+.3f} to {difference[2]:+.3f})"


def _verdict(scores: Mapping[str, Any], aim: Aim) -> str:
    ratio = aim.measured(scores)
    if ratio is None or ratio[0] is None:
        return "-"
    text = f"{ratio[0]:.2f}x {_ends(ratio[1:])}"
    return text if aim.reached_by(ratio[0]) else f"**missed** {text}"


def _followed(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of images that follow their prompt, of each trial under each judge that can read; none: nothing."""
    return "; ".join(
        f"{trial} {', '.join(f'{share:.0%} ({judge})' for judge, share in own.items())}"
        for trial, own in shares.items()
        if own
    )
