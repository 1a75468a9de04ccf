"""The load of the chaos tests finds what is wrong with an answer, and nothing with those of a sound service."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cat_cluster.models.base_model import load_base_model
from cat_cluster.registry import Registry
from cat_cluster.store import LocalStore
from serve.settings import ProbeSettings, ServeSettings
from tests.support.ingress_server import Live, Shop, serving
from tests.support.motifs import Motif, motifs_of_each_kind
from tests.support.serving import Gallery, publish_random, until
from tests.support.serving_load import Answer, Load, Mover, Order, Wish, alone, ways_to_name

PLAIN, SEEDS, STEPS = Motif("a photo of a sks cup"), range(1, 4), 3
MOTIFS = (PLAIN, *motifs_of_each_kind(16))
R = "r-0123456789ab"
EQUAL = (("cup@live", 0.5), ("mug@live", 0.5))
UNEQUAL = (("jar@live", 0.7), ("cup@live", 1.3))
FOUR = ("adapters", "prompt", "model", "model and prompt")  # ways to name a stack of equal strengths


@dataclass(frozen=True)
class World:
    """A service in this process: cup has two revisions, mug comes and goes, jar is quarantined at times."""

    live: Live
    gallery: Gallery
    order: Order
    mover: Mover


@pytest.fixture(scope="module")
def world(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    storage = tmp_path_factory.mktemp("storage")
    base, registry = load_base_model(str(tiny_base_folder)), Registry(LocalStore(storage))
    publish = partial(publish_random, registry, base)
    cups, mug, jar = (publish("cup", 1), publish("cup", 2)), publish("mug", 3), publish("jar", 4)
    gallery = Gallery(registry, base, STEPS)
    for manifest in (*cups, mug, jar):
        gallery.add(manifest, MOTIFS, SEEDS)
        registry.set_alias(manifest.adapter_id, "live", manifest.revision)
    for cup in cups:
        gallery.add_stack([(cup, 0.5), (mug, 0.5)], MOTIFS, SEEDS)
        gallery.add_stack([(jar, 0.7), (cup, 1.3)], MOTIFS, SEEDS)
    gallery.check_it_tells_apart()
    settings = ServeSettings(
        base=str(tiny_base_folder),
        storage=str(storage),
        device="cpu",
        threads=1,
        slots=2,
        alias_ttl_s=0.2,
        missing_ttl_s=0.2,
        images_per_key=1000,
        max_uploads=100,
        probes=ProbeSettings(enabled=False),
    )
    stacks = [wish for stack in (EQUAL, UNEQUAL) for wish in ways_to_name(stack)]
    names = ["cup@live", *(cup.name for cup in cups), "mug@live", "jar@live"]
    missing, quarantined = frozenset({"mug"}), frozenset({"jar"})
    order = Order([*map(alone, names), *stacks], MOTIFS, SEEDS, STEPS, missing, quarantined, leave=0.1)
    with serving(Shop(settings, registry, cups, mug)) as live:
        yield World(live, gallery, order, Mover(registry, [cups], [partial(publish, "mug", 3)], [jar], seed=1))


@pytest.mark.slow
def test_every_way_to_name_a_stack_gives_its_picture_and_what_is_wrong_is_found(world: World) -> None:
    judge, named = partial(world.order.judge, gallery=world.gallery), zip(FOUR, ways_to_name(EQUAL), strict=True)
    with world.live.http() as http:
        for stream, motif, (way, wish) in product((False, True), MOTIFS, named):
            if not motif.allows(wish.fields):
                continue
            settings = {"seed": 1, "n": 2, "num_inference_steps": STEPS, "stream": stream}
            path, sent = motif.request({**wish.fields, "prompt": motif.prompt + wish.tags, **settings})
            answer = Answer.of(http.post(path, **sent))
            end = judge(wish, motif, 2, answer)
            assert (end.how, end.problem, end.images, end.kind) == ("200", None, 2, motif.kind), (way, answer)
            assert end.stack
            first, second = answer.content["data"]
            for how, other in {
                "short": {"data": [first]},
                "wrong": {"data": [first, {**first, "seed": second["seed"]}]},
                "other revision": {"model": "+".join(reversed(answer.content["model"].split("+")))},
            }.items():
                content = {**answer.content, **other}
                found = judge(wish, motif, 2, replace(answer, content=content, model=content["model"]))
                assert found.how == how
                assert found.problem is not None
            assert judge(wish, motif, 2, replace(answer, model=None)).how == "other revision"


@pytest.mark.slow
def test_nothing_is_wrong_with_a_sound_service(world: World) -> None:
    mover, load = world.mover, Load(world.live, world.gallery, world.order, 6, seed=2)
    tally, fields = load.tally, ("model", "prompt", "adapters.0.model", "adapters.1.model")

    def enough() -> bool:
        seen = (tally.ends["200"], tally.of_stacks, tally.ends["left"], tally.ends["404"], tally.ends["409"])
        seen = (*seen, *(tally.images[motif.kind] for motif in MOTIFS))
        return min(*seen, mover.moves, *(tally.blamed[one] for one in fields)) > 1

    with world.live.http() as http:
        assert http.get("/v1/adapters/mug@live").status_code == 200  # for seconds the listing has it, deleted or not
    with mover, load:
        until(enough, 100)
    assert tally.problems == []
    assert set(tally.ends) == {"200", "404", "409", "left"}
    assert set(tally.blamed) == set(fields)


def refusal(code: str, param: str | None) -> dict[str, Any]:
    return {"error": {"code": code, "param": param, "message": "no", "type": "invalid_request_error"}}


ADAPTERS, TAGS, MODEL, BOTH = ways_to_name((("cup@live", 1.0), ("mug@live", 1.0), ("jar@live", 1.0)))


@pytest.mark.parametrize(
    ("wish", "status", "code", "param", "how"),
    [
        (alone("mug@live"), 404, "model_not_found", "model", "404"),
        (ADAPTERS, 404, "model_not_found", "adapters.1.model", "404"),
        (ADAPTERS, 409, "model_quarantined", "adapters.2.model", "409"),
        (TAGS, 404, "model_not_found", "prompt", "404"),
        (MODEL, 409, "model_quarantined", "model", "409"),
        (BOTH, 200, "model_not_found", "prompt", "404"),  # of a stream that had begun
        (ADAPTERS, 404, "model_not_found", "adapters.0.model", None),  # cup is always there
        (ADAPTERS, 409, "model_quarantined", "adapters.1.model", None),  # mug is never quarantined
        (ADAPTERS, 404, "model_not_found", "model", None),  # it was not named there
        (BOTH, 404, "model_not_found", "model", None),
        (ADAPTERS, 404, "model_not_found", None, None),
        (ADAPTERS, 409, "model_not_found", "adapters.1.model", None),
        (ADAPTERS, 409, "conflict", "adapters", None),
        (ADAPTERS, 422, "model_mismatch", "adapters", None),
        (ADAPTERS, 503, "overloaded", None, None),
        (alone("cup@live"), 404, "model_not_found", "model", None),
    ],
)
def test_a_refusal_must_blame_the_field_of_one_that_may_be_refused(
    wish: Wish, status: int, code: str, param: str | None, how: str | None
) -> None:
    order = Order([wish], MOTIFS, SEEDS, STEPS, frozenset({"mug"}), frozenset({"jar"}))
    gallery: Any = None  # no picture is looked at
    end = order.judge(wish, PLAIN, 1, Answer(status, refusal(code, param), retries=True), gallery)
    assert (end.how, end.problem is None) == ((how, True) if how else (f"refused {status}", False))
    assert end.blamed == (param if how else None)
    patient = replace(order, may_be_refused=True).judge(
        wish, PLAIN, 1, Answer(status, refusal(code, param), retries=True), gallery
    )
    assert (patient.how == "503") == (status == 503)


def test_an_answer_names_the_revisions_of_what_was_asked_for_in_their_order() -> None:
    wish = next(ways_to_name(((f"cup@{R}", 1.0), ("mug@live", 1.0))))
    assert wish.names(f"cup@{R}+mug@{R}")
    for other in (
        f"cup@{R}",
        f"mug@{R}+cup@{R}",
        f"cup@r-ba9876543210+mug@{R}",
        f"cup@{R}+mug@live",
        f"cup@{R}+mu@{R}",
    ):
        assert not wish.names(other)
