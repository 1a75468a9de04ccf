"""Metrics: names that Prometheus likes, an exposition it can read, labels that are checked and bounded."""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cat_cluster import telemetry
from cat_cluster.runs.progress import AdapterProgress
from cat_cluster.spec.concept import ConceptSpec
from cat_cluster.spec.job import AdapterSpec
from cat_cluster.telemetry import (
    ADAPTERS,
    CHECKPOINT_SECONDS,
    IDENTITY_LOSS,
    LABELS,
    PACKS_RUNNING,
    SERVING_METRICS,
    STEPS,
    STORE_RETRIES,
    TRAINING_METRICS,
    Metrics,
    MetricSpec,
    PrometheusBackend,
)

EXAMPLES = {"adapter": "striped-cup", "token": "<shs>"} | {n: one.values[0] for n, one in LABELS.items() if one.values}


@pytest.fixture
def backend() -> PrometheusBackend:
    return PrometheusBackend()


def samples(backend: PrometheusBackend) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(backend.exposition().decode())
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(backend: PrometheusBackend, name: str, **labels: str) -> float | None:
    return samples(backend).get((name, frozenset(labels.items())))


def test_names_are_unique_and_well_formed() -> None:
    every = {*TRAINING_METRICS, *SERVING_METRICS}
    names = [spec.name for spec in every]
    assert len(set(names)) == len(names)
    defined = {value for value in vars(telemetry).values() if isinstance(value, MetricSpec)}
    assert defined == every
    for spec in every:
        assert re.fullmatch(r"cat_[a-z_]+", spec.name)
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert not spec.name.endswith(("_count", "_sum", "_bucket", "_created", "_info"))
        assert re.fullmatch(r"[A-Z].*\.", spec.help)
        assert spec.unit


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "training_steps"}, "cat_ and words"),
        ({"name": "cat_Steps"}, "cat_ and words"),
        ({"name": "cat_steps_total"}, "ends in _total, and no other's"),
        ({"kind": "counter"}, "a counter's name ends in _total"),
        ({"unit": "seconds"}, "must end in its unit seconds"),
        ({"labels": ("prompt",)}, r"labels \['prompt'\] are not known"),
        ({"buckets": (1.0,)}, "no other metric has any"),
        ({"kind": "histogram"}, "a histogram has rising buckets"),
        ({"kind": "histogram", "buckets": (2.0, 1.0)}, "a histogram has rising buckets"),
    ],
)
def test_a_metric_against_the_rules_cannot_be_made(changes: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {"name": "cat_steps", "kind": "gauge", "unit": "steps", "help": "Steps."}
    MetricSpec(**good)
    with pytest.raises(ValueError, match=reason):
        MetricSpec(**{**good, **changes})


def test_the_exposition_of_all_metrics_parses(backend: PrometheusBackend) -> None:
    metrics = Metrics(backend)
    record = {"gauge": metrics.set, "counter": metrics.inc, "histogram": metrics.observe}
    for spec in TRAINING_METRICS:
        record[spec.kind](spec, 3.0, **{name: EXAMPLES[name] for name in spec.labels})
    families = {family.name: family for family in text_string_to_metric_families(backend.exposition().decode())}
    for spec in TRAINING_METRICS:
        family = families[spec.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        own = {name: EXAMPLES[name] for name in spec.labels}
        name = f"{spec.name}_sum" if spec.kind == "histogram" else spec.name
        assert value(backend, name, **own) == 3.0


def test_kinds_do_what_they_should(backend: PrometheusBackend) -> None:
    metrics = Metrics(backend)
    assert value(backend, "cat_training_steps_total") == 0.0
    for amount in (1.0, 2.5, 0.0):
        metrics.inc(STEPS, amount)
        metrics.set(PACKS_RUNNING, amount)
        metrics.observe(CHECKPOINT_SECONDS, amount)
    assert value(backend, "cat_training_steps_total") == 3.5
    assert value(backend, "cat_packs_running") == 0.0
    assert value(backend, "cat_checkpoint_seconds_count") == 3.0
    assert value(backend, "cat_checkpoint_seconds_bucket", le="1.0") == 2.0
    metrics.set(IDENTITY_LOSS, math.nan, adapter="mug", token="sks")
    assert math.isnan(value(backend, "cat_training_identity_loss", adapter="mug", token="sks") or 0.0)


def test_a_wrong_call_is_refused_and_records_nothing(backend: PrometheusBackend) -> None:
    metrics = Metrics(backend)
    before = backend.exposition()
    for call in (
        lambda: metrics.set(STEPS, 1.0),
        lambda: metrics.inc(PACKS_RUNNING),
        lambda: metrics.observe(STEPS, 1.0),
        lambda: metrics.inc(STEPS, -1.0),
        lambda: metrics.inc(STEPS, math.nan),
        lambda: metrics.inc(STEPS, adapter="mug"),
        lambda: metrics.set(IDENTITY_LOSS, 0.1, adapter="mug"),
        lambda: metrics.set(IDENTITY_LOSS, 0.1, adapter="Mug", token="sks"),
        lambda: metrics.set(IDENTITY_LOSS, 0.1, adapter="mug", token="a sks cup on grass"),
        lambda: metrics.set(IDENTITY_LOSS, 0.1, adapter="mug\n", token="sks"),
        lambda: metrics.set(ADAPTERS, 1.0, state="lost"),
        lambda: metrics.inc(STORE_RETRIES, operation="runs/cup/1.json"),
    ):
        with pytest.raises(ValueError, match="cat_"):
            call()
    assert backend.exposition() == before


def test_whatever_a_spec_may_name_is_a_label_value() -> None:
    for adapter_id in ("0", "a" * 63, "striped-cup-"):
        for token in ("sks", "<shs>", 'a"b\\', "猫", "x" * 300):
            concept = ConceptSpec(token=token, class_noun="cup", images="photos")
            AdapterSpec(id=adapter_id, concepts=(concept,))
            metrics = Metrics(backend := PrometheusBackend())
            metrics.set(IDENTITY_LOSS, 0.5, adapter=adapter_id, token=token)
            assert value(backend, "cat_training_identity_loss", adapter=adapter_id, token=token) == 0.5


def test_adapters_are_in_the_states_of_a_run() -> None:
    assert LABELS["state"].values == get_args(AdapterProgress.model_fields["state"].annotation)


def test_series_are_bounded_whatever_is_trained(backend: PrometheusBackend) -> None:
    served = MetricSpec("cat_served_total", "counter", "images", "Images.", ("adapter", "result"))
    metrics = Metrics(backend, (IDENTITY_LOSS, ADAPTERS, served), most_series=5)
    for n in range(50):
        metrics.set(IDENTITY_LOSS, n, adapter=f"cup-{n}", token="sks")
        metrics.inc(served, adapter=f"cup-{n}", result=("hit", "miss")[n % 2])
    found = samples(backend)
    losses = {labels: v for (name, labels), v in found.items() if name == IDENTITY_LOSS.name}
    assert len(losses) == 6
    assert losses[frozenset({("adapter", "other"), ("token", "other")})] == 49
    counts = {labels: v for (name, labels), v in found.items() if name == served.name}
    assert len(counts) == 7
    assert sum(counts.values()) == 50
    assert counts[frozenset({("adapter", "other"), ("result", "hit")})] == 22
    metrics.set(IDENTITY_LOSS, -1.0, adapter="cup-0", token="sks")
    assert value(backend, IDENTITY_LOSS.name, adapter="cup-0", token="sks") == -1.0
    for state in LABELS["state"].values:
        metrics.set(ADAPTERS, 1.0, state=state)
    assert {state: value(backend, "cat_adapters", state=state) for state in LABELS["state"].values} == dict.fromkeys(
        LABELS["state"].values, 1.0
    )


def test_of_an_adapter_that_has_left_no_gauge_is_shown_and_another_has_its_room(backend: PrometheusBackend) -> None:
    trained = MetricSpec("cat_trained_total", "counter", "images", "Images.", ("adapter",))
    metrics = Metrics(backend, (IDENTITY_LOSS, PACKS_RUNNING, trained), most_series=2)
    for adapter, token in (("cup", "sks"), ("cup", "zwx")):
        metrics.set(IDENTITY_LOSS, 0.5, adapter=adapter, token=token)
    metrics.set(PACKS_RUNNING, 1.0)
    metrics.inc(trained, adapter="cup")
    metrics.forget(adapter="cup")
    metrics.forget(adapter="never")
    losses = IDENTITY_LOSS.name
    assert not [labels for name, labels in samples(backend) if name == losses]
    assert (value(backend, "cat_packs_running"), value(backend, trained.name, adapter="cup")) == (1.0, 1.0)
    metrics.set(IDENTITY_LOSS, 0.25, adapter="mug", token="sks")
    metrics.set(IDENTITY_LOSS, 0.75, adapter="cup", token="sks")
    assert value(backend, losses, adapter="mug", token="sks") == 0.25
    assert value(backend, losses, adapter="cup", token="sks") == 0.75


def test_threads_share_the_bound(backend: PrometheusBackend) -> None:
    served = MetricSpec("cat_served_total", "counter", "images", "Images.", ("adapter",))
    metrics = Metrics(backend, (served,), most_series=10)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: metrics.inc(served, adapter=f"cup-{n % 40}"), range(4000)))
    counts = [v for (name, _), v in samples(backend).items() if name == served.name]
    assert (len(counts), sum(counts)) == (11, 4000.0)


def test_registries_are_separate_unless_they_are_given() -> None:
    one, other = PrometheusBackend(), PrometheusBackend()
    Metrics(one).inc(STEPS, 2.0)
    Metrics(other)
    assert (value(one, STEPS.name), value(other, STEPS.name)) == (2.0, 0.0)
    shared = CollectorRegistry()
    Metrics(PrometheusBackend(shared), (STEPS,))
    with pytest.raises(ValueError, match="Duplicated"):
        Metrics(PrometheusBackend(shared), (STEPS,))
