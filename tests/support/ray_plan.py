"""The jobs of tests/integration/test_cluster.py: every way to train one adapter, bad ones in a batch, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cat_cluster.store import open_store
from tests.support.tiny_jobs import adapter, write_spec

STEPS = 20
GOOD = tuple(f"good-{n}" for n in range(18))
MEASURED = 4  # of these
# What the node must show after the first job; a checkpoint is taken twice as often as asked.
METRICS = {
    "ray_cat_training_steps_total": 2 * STEPS,
    "ray_cat_checkpoint_bytes_total": 1,
    "ray_cat_checkpoint_seconds_count": 2 * STEPS // 5,
    "ray_cat_evaluation_seconds_count": 2,
}
HOOKS = ("damage", "store_away", "metrics", "environment")  # see tests/support/ray_jobs.py
GAUGES = ("ray_cat_packs_running", "ray_cat_adapters", "ray_cat_training_identity_loss")


def cup(folder: Path, judge: Path, images: str | None = None) -> dict[str, Any]:
    """The adapter that every way of training must make alike, measured."""
    return adapter("cup", folder / "photos" / "cup", evaluation=measured(judge)) | (
        {} if images is None else {"concepts": [{"token": "sks", "class_noun": "cup", "images": images}]}
    )


def mug(folder: Path, judge: Path) -> dict[str, Any]:
    """An adapter that is trained and fails its gate."""
    return adapter(
        "mug",
        folder / "photos" / "mug",
        token="zwx",
        training={"rank": 3, "seed": 4},
        evaluation={**measured(judge), "require": {"kps": ">=2"}},
    )


def measured(judge: Path) -> dict[str, Any]:
    prompts = ["a picture of a {}", "a drawing of a {}"]
    return {"enabled": True, "prompts": prompts, "images_per_prompt": 1, "steps": 2, "judge": str(judge)}


def batch(folder: Path, judge: Path) -> list[dict[str, Any]]:
    """Twenty concepts that are fine, one whose training diverges, and one whose photos turn bad after the check."""
    photos = folder / "photos"
    good = [
        adapter(
            name,
            photos / name,
            token=("sks", "zwx", "ohwx")[n % 3],
            training={"rank": 2 + n % 3, "seed": n},
            evaluation=measured(judge) if n < MEASURED else {"enabled": False},
        )
        for n, name in enumerate(GOOD)
    ]
    diverging = adapter("diverging", photos / "mug", training={"learning_rate": 1e30})
    return [
        *good[:9],
        diverging,
        cup(folder, judge),
        adapter("spoilt", photos / "spoilt"),
        mug(folder, judge),
        *good[9:],
    ]


def stream(folder: Path, judge: Path) -> list[dict[str, Any]]:
    """Four concepts for a pack of two: as the short ones end, the others come in."""
    short = [
        adapter(name, folder / "photos" / name, training={"steps": steps, "rank": 2}, evaluation={"enabled": False})
        for name, steps in zip(GOOD, (5, 8), strict=False)
    ]
    return [*short, cup(folder, judge), mug(folder, judge)]


def write_plan(folder: Path, base: Path, judge: Path, bucket: str | None) -> list[dict[str, Any]]:
    """Write the specs of all jobs, each to train alike, and return the jobs in order.

    folder: has `photos`, and the name of each job is its storage. bucket: the storage of the job `apart`, and where its
    cup's photos are; without one it is as the others, and what S3 refuses is left out.
    """

    def job(name: str, adapters: list[dict[str, Any]], *arguments: str, **changes: Any) -> dict[str, Any]:
        storage = changes.pop("to", str(folder / name))
        hooks = {key: changes.pop(key) for key in HOOKS if key in changes}
        training = {"steps": STEPS, "learning_rate": 0.005}
        spec = write_spec(folder / f"{name}.yaml", base, adapters, training=training, **changes)
        return {"name": name, "arguments": ["train", str(spec), "--storage", storage, "--json", *arguments], **hooks}

    both = [cup(folder, judge), mug(folder, judge)]
    spoilt = folder / "photos" / "spoilt" / "1.png"
    apart = job(
        "apart",
        [cup(folder, judge, None if bucket is None else photos_in(bucket, folder / "photos" / "cup")), both[1]],
        cluster={"workers": 1, "max_pack": 1, "checkpoint_every": 10},
        monitoring={"tensorboard": True, "samples_every": 10},
        metrics=METRICS,
        to=str(folder / "apart") if bucket is None else f"{bucket}/prod",
    )
    unpublished = job("unpublished", both, "--in-process", store_away=True)
    published = job("unpublished", both)["arguments"]  # the same spec and storage
    jobs = [
        job("local", both, "--in-process"),
        unpublished,
        apart,
        job("batch", batch(folder, judge), cluster={"workers": [1, 2], "zero_stage": 2}, damage=str(spoilt)),
        job("stream", stream(folder, judge), cluster={"workers": 2, "zero_stage": 2, "max_pack": 2}),
        {"name": "published", "arguments": published},
        {"name": "published again", "arguments": published},
        job("workers", both, cluster={"workers": 4096}),
    ]
    if bucket is not None:
        wrong, away = {"AWS_SECRET_ACCESS_KEY": "wrong"}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
        jobs += [
            job("bucket", both, to="s3://no-such-bucket/prod"),
            job("secret", both, to=f"{bucket}/secret", environment=wrong),
            job("endpoint", both, to=f"{bucket}/endpoint", environment=away),
        ]
    return jobs


def photos_in(bucket: str, photos: Path) -> str:
    """Put a folder's photos into the bucket, and return where they are."""
    images = open_store(f"{bucket}/concepts/{photos.name}")
    for path in photos.iterdir():
        images.put(path.name, path.read_bytes())
    return images.url
