"""Every metric the project exports, its name, unit and help text in one place.

Names follow Prometheus: prefix `cat_`, base units, `_total` for counters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from cat_cluster.spec.choices import AdapterPhase, DriftDetector, ProbeScore, ProbeVerdict

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class LabelSpec:
    """A label: its help text, and the values it may have. Those of a pattern are many, and are bounded in number."""

    help: str
    values: tuple[str, ...] = ()
    pattern: str | None = None

    def allows(self, value: str) -> bool:
        """Whether the label may have this value."""
        return value in self.values if self.pattern is None else re.fullmatch(self.pattern, value) is not None


# The patterns are those of the job spec: whatever a job may name is a label value.
LABELS: Mapping[str, LabelSpec] = {
    "adapter": LabelSpec("Adapter id.", pattern=r"[a-z0-9][a-z0-9-]{0,62}"),
    "token": LabelSpec("Token of the concept within its adapter.", pattern=r"[^\s,{}]+"),
    "operation": LabelSpec("What was asked of the store.", ("read", "write", "list", "delete")),
    "result": LabelSpec("hit: the prediction was kept; miss: the base model was asked.", ("hit", "miss")),
    "state": LabelSpec("Where an adapter of the job stands.", get_args(AdapterPhase)),
    "code": LabelSpec("HTTP status of the response.", pattern=r"[1-5][0-9]{2}"),
    "route": LabelSpec("Path template of the request.", pattern=r"/[a-z0-9_/{}.-]*"),
    "outcome": LabelSpec("How an image ended.", ("done", "cancelled", "expired", "refused", "failed")),
    "tier": LabelSpec("Where an adapter was found: store means it was fetched.", ("slot", "host", "disk", "store")),
    "kind": LabelSpec("canonical: fixed prompts and seeds; live: a user's own.", ("canonical", "live")),
    "verdict": LabelSpec("What a probe said.", get_args(ProbeVerdict)),
    "flag": LabelSpec("What the safety checker said; unchecked: it failed.", ("passed", "flagged", "unchecked")),
    "action": LabelSpec("What happens to flagged images.", ("refuse", "mark")),
    "detector": LabelSpec("Sequential detector.", get_args(DriftDetector)),
    "score": LabelSpec("Score of a probe.", get_args(ProbeScore)),
}


@dataclass(frozen=True)
class MetricSpec:
    """One metric. unit: a base unit for people; labels: keys of LABELS; buckets: upper ends, for a histogram only."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cat_[a-z]+(_[a-z]+)*", self.name):
            raise ValueError(f"metric {self.name!r}: write cat_ and words of a-z joined by _")
        if self.name.endswith("_total") != (self.kind == "counter"):
            raise ValueError(f"metric {self.name!r}: a counter's name ends in _total, and no other's does")
        if self.unit in ("seconds", "bytes") and not re.search(rf"_{self.unit}(_total)?$", self.name):
            raise ValueError(f"metric {self.name!r}: its name must end in its unit {self.unit}")
        if not set(self.labels) <= LABELS.keys():
            raise ValueError(f"metric {self.name!r}: labels {sorted(set(self.labels) - LABELS.keys())} are not known")
        if (self.kind == "histogram") != bool(self.buckets) or list(self.buckets) != sorted({*self.buckets}):
            raise ValueError(f"metric {self.name!r}: a histogram has rising buckets, and no other metric has any")


STEPS = MetricSpec("cat_training_steps_total", "counter", "steps", "Optimiser steps done.")
ROWS = MetricSpec("cat_training_rows_total", "counter", "rows", "Rows trained on, with and without the token.")
STEPS_PER_SECOND = MetricSpec(
    "cat_training_steps_per_second", "gauge", "steps per second", "Speed of the last step; checkpoints do not count."
)
ROWS_PER_SECOND = MetricSpec(
    "cat_training_rows_per_second", "gauge", "rows per second", "Rows of the last step over its time."
)
IDENTITY_LOSS = MetricSpec(
    "cat_training_identity_loss",
    "gauge",
    "squared error",
    "Mean identity loss of the concept's rows in the last step.",
    ("adapter", "token"),
)
CAT_LOSS = MetricSpec(
    "cat_training_cat_loss",
    "gauge",
    "squared error",
    "Mean CAT loss of the concept's rows in the last step that had any.",
    ("adapter", "token"),
)
DROPPED_ADAPTERS = MetricSpec(
    "cat_training_dropped_adapters_total", "counter", "adapters", "Adapters given up because training diverged."
)
TEACHER_CACHE = MetricSpec(
    "cat_teacher_cache_requests_total",
    "counter",
    "predictions",
    "Predictions of the base model that training asked for.",
    ("result",),
)
CHECKPOINT_SECONDS = MetricSpec(
    "cat_checkpoint_seconds",
    "histogram",
    "seconds",
    "Time to write one checkpoint of one adapter to the store.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
CHECKPOINT_BYTES = MetricSpec("cat_checkpoint_bytes_total", "counter", "bytes", "Bytes of checkpoints written.")
STORE_RETRIES = MetricSpec(
    "cat_store_retries_total", "counter", "requests", "Requests to the object store sent again.", ("operation",)
)
PACKS_RUNNING = MetricSpec("cat_packs_running", "gauge", "packs", "Packs that are training now.")
ADAPTERS = MetricSpec("cat_adapters", "gauge", "adapters", "Adapters of the job by state.", ("state",))
SLOTS = MetricSpec("cat_slots", "gauge", "slots", "Places for adapters in the groups of workers that train.")
SLOTS_OCCUPIED = MetricSpec("cat_slots_occupied", "gauge", "slots", "Those places that have an adapter.")
PACK_JOINS = MetricSpec("cat_pack_joins_total", "counter", "adapters", "Adapters that were given a place in a group.")
PACK_LEAVES = MetricSpec("cat_pack_leaves_total", "counter", "adapters", "Adapters that left it, trained or failed.")
QUEUE_WAITING = MetricSpec(
    "cat_queue_waiting",
    "gauge",
    "adapters",
    "Adapters of the queue that wait for a place.",
)
QUEUE_OLDEST = MetricSpec(
    "cat_queue_oldest_wait_seconds",
    "gauge",
    "seconds",
    "How long the run waits that was entered first of those with an adapter that waits; 0 if there is none.",
)
EVALUATION_SECONDS = MetricSpec(
    "cat_evaluation_seconds",
    "histogram",
    "seconds",
    "Time to measure one adapter.",
    buckets=(1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)

TRAINING_METRICS: tuple[MetricSpec, ...] = (
    STEPS,
    ROWS,
    STEPS_PER_SECOND,
    ROWS_PER_SECOND,
    IDENTITY_LOSS,
    CAT_LOSS,
    DROPPED_ADAPTERS,
    TEACHER_CACHE,
    CHECKPOINT_SECONDS,
    CHECKPOINT_BYTES,
    STORE_RETRIES,
    PACKS_RUNNING,
    ADAPTERS,
    SLOTS,
    SLOTS_OCCUPIED,
    PACK_JOINS,
    PACK_LEAVES,
    QUEUE_WAITING,
    QUEUE_OLDEST,
    EVALUATION_SECONDS,
)


_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0)
_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0)

HTTP_REQUESTS = MetricSpec(
    "cat_http_requests_total", "counter", "requests", "HTTP requests answered.", ("route", "code")
)
HTTP_SECONDS = MetricSpec(
    "cat_http_request_seconds", "histogram", "seconds", "Time to respond to an HTTP request.", ("route",), _SECONDS
)
IMAGES = MetricSpec("cat_serve_images_total", "counter", "images", "Images of users that ended.", ("outcome",))
ADAPTER_IMAGES = MetricSpec(
    "cat_serve_adapter_images_total", "counter", "images", "Images done for users, by adapter.", ("adapter",)
)
IMAGE_SECONDS = MetricSpec(
    "cat_serve_image_seconds", "histogram", "seconds", "Time from request to finished image.", buckets=_SECONDS
)
SAFETY_IMAGES = MetricSpec(
    "cat_serve_safety_images_total",
    "counter",
    "images",
    "Images that went through the safety checker.",
    ("flag", "action"),
)
SAFETY_SECONDS = MetricSpec(
    "cat_serve_safety_seconds", "histogram", "seconds", "Time from image to the checker's word.", buckets=_FAST
)
WAIT_SECONDS = MetricSpec(
    "cat_serve_wait_seconds", "histogram", "seconds", "Time from request to first denoising step.", buckets=_FAST
)
UNET_SECONDS = MetricSpec(
    "cat_serve_unet_seconds", "histogram", "seconds", "Time of one U-Net call with its sampler step.", buckets=_FAST
)
CALL_ROWS = MetricSpec(
    "cat_serve_call_rows", "histogram", "rows", "Rows of a U-Net call, padding left out.", buckets=_ROWS
)
CALL_ADAPTERS = MetricSpec(
    "cat_serve_call_adapters", "histogram", "adapters", "Different adapters in a U-Net call.", buckets=_ROWS
)
ROW_STEPS = MetricSpec("cat_serve_row_steps_total", "counter", "row-steps", "Row-steps done for users.")
PROBE_ROW_STEPS = MetricSpec("cat_serve_probe_row_steps_total", "counter", "row-steps", "Row-steps done for probes.")
PADDED_ROW_STEPS = MetricSpec("cat_serve_padded_row_steps_total", "counter", "row-steps", "Row-steps of padding.")
IMAGES_WAITING = MetricSpec("cat_serve_images_waiting", "gauge", "images", "Images that wait for rows.")
IMAGES_ACTIVE = MetricSpec("cat_serve_images_active", "gauge", "images", "Images being denoised.")
ENGINE_STEP_TIME = MetricSpec(
    "cat_serve_last_step_timestamp_seconds", "gauge", "seconds", "Unix time of the engine's last turn."
)
SIGNING_EXPIRY = MetricSpec(
    "cat_serve_signing_expiry_timestamp_seconds",
    "gauge",
    "seconds",
    "Unix time at which the certificate that signs images expires.",
)
ADAPTER_REQUESTS = MetricSpec(
    "cat_adapter_requests_total", "counter", "requests", "Adapters asked of the cache, by where found.", ("tier",)
)
ADAPTER_LOADS = MetricSpec(
    "cat_adapter_load_seconds", "histogram", "seconds", "Time to fetch, check and pack an adapter.", buckets=_FAST
)
ADAPTER_SWAPS = MetricSpec(
    "cat_adapter_swap_seconds",
    "histogram",
    "seconds",
    "Time to copy a host-resident adapter into a slot.",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5),
)
ADAPTER_FAILURES = MetricSpec("cat_adapter_load_failures_total", "counter", "loads", "Adapters that could not load.")
ADAPTER_EVICTIONS = MetricSpec(
    "cat_adapter_evictions_total", "counter", "adapters", "Adapters evicted from slots, host or disk.", ("tier",)
)
SLOTS_USED = MetricSpec("cat_adapter_slots_used", "gauge", "slots", "Slots that hold an adapter.")
SLOTS_LEASED = MetricSpec("cat_adapter_slots_leased", "gauge", "slots", "Slots that rows are being bound from.")
ADAPTERS_PINNED = MetricSpec("cat_adapters_pinned", "gauge", "adapters", "Adapters that are never evicted.")
HOST_BYTES = MetricSpec("cat_adapter_host_bytes", "gauge", "bytes", "Adapters in host memory.")
PROBES = MetricSpec("cat_probes_total", "counter", "probes", "Drift probes by kind and verdict.", ("kind", "verdict"))
PROBE_TIME = MetricSpec(
    "cat_probe_last_timestamp_seconds", "gauge", "seconds", "Unix time of an adapter's last probe.", ("adapter", "kind")
)
PROBE_SCORE = MetricSpec(
    "cat_probe_score",
    "gauge",
    "score",
    "Last score of an adapter's probes; kps higher is better.",
    ("adapter", "kind", "score"),
)
PROBE_SCORE_SUM = MetricSpec(
    "cat_probe_score_sum_total",
    "counter",
    "score",
    "Exact sum of the scores; over the count it is their mean.",
    ("adapter", "kind", "score"),
)
PROBE_SCORE_COUNT = MetricSpec(
    "cat_probe_score_count_total", "counter", "probes", "Number of scores in the sum.", ("adapter", "kind", "score")
)
PROBE_REFERENCE = MetricSpec(
    "cat_probe_reference_mean",
    "gauge",
    "score",
    "Mean of the score when the adapter was measured.",
    ("adapter", "score"),
)
DRIFT_STATISTIC = MetricSpec(
    "cat_drift_statistic",
    "gauge",
    "share of the limit",
    "Detector's statistic over its alarm limit; 1 is an alarm.",
    ("adapter", "score", "detector"),
)
DRIFT_STATE = MetricSpec(
    "cat_drift_state", "gauge", "state", "Drift of an adapter: 0 ok, 1 warning, 2 alarm.", ("adapter",)
)
QUARANTINED = MetricSpec("cat_adapters_quarantined_total", "counter", "revisions", "Revisions put in quarantine.")
BASE_MISMATCHES = MetricSpec(
    "cat_base_row_mismatches_total", "counter", "probes", "Canonical probes whose base image was not the known one."
)

SERVING_METRICS: tuple[MetricSpec, ...] = (
    HTTP_REQUESTS,
    HTTP_SECONDS,
    IMAGES,
    ADAPTER_IMAGES,
    IMAGE_SECONDS,
    SAFETY_IMAGES,
    SAFETY_SECONDS,
    WAIT_SECONDS,
    UNET_SECONDS,
    CALL_ROWS,
    CALL_ADAPTERS,
    ROW_STEPS,
    PROBE_ROW_STEPS,
    PADDED_ROW_STEPS,
    IMAGES_WAITING,
    IMAGES_ACTIVE,
    ENGINE_STEP_TIME,
    SIGNING_EXPIRY,
    ADAPTER_REQUESTS,
    ADAPTER_LOADS,
    ADAPTER_SWAPS,
    ADAPTER_FAILURES,
    ADAPTER_EVICTIONS,
    SLOTS_USED,
    SLOTS_LEASED,
    ADAPTERS_PINNED,
    HOST_BYTES,
    PROBES,
    PROBE_TIME,
    PROBE_SCORE,
    PROBE_SCORE_SUM,
    PROBE_SCORE_COUNT,
    PROBE_REFERENCE,
    DRIFT_STATISTIC,
    DRIFT_STATE,
    QUARANTINED,
    BASE_MISMATCHES,
    STORE_RETRIES,
)
