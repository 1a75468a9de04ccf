"""What a reference names while serving: without listing the store, without it for a while, and without quarantined."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from cat_cluster.errors import AdapterNotFoundError, EngineStoppedError, QuarantinedError, RegistryError, StoreError
from cat_cluster.registry.references import manifest_key
from serve.adapters.cache import Resolved
from serve.adapters.failures import MOST_KEPT
from serve.adapters.resolver import MOST_STALE_S, PATIENCE_S, ReferenceResolver
from serve.settings import ProbeSettings, ServeSettings
from tests.support.served_adapters import SOON, CacheOnLoop, Clock, World, wait_until

ALIAS_1 = "aliases/cup/latest/00000001.json"


def resolve(cache: CacheOnLoop, reference: str) -> Resolved:
    return cache.resolve(reference).result(SOON)


def test_resolving_never_lists_the_store(world: World) -> None:
    manifest = world.publish("cup")
    world.registry.set_alias("cup", "prod", manifest.revision)
    cache = world.cache(alias_ttl_s=0.0, missing_ttl_s=0.0)
    for _ in range(3):
        for reference in ("cup", "cup@latest", "cup@prod", manifest.name):
            assert resolve(cache, reference) == Resolved(manifest)
        for reference in ("cop", "cup@staging", "cup@r-000000000000", "cop@r-000000000000"):
            with pytest.raises(AdapterNotFoundError, match="GET /v1/models"):
                resolve(cache, reference)
    assert world.store.asked["list"] == 0


@pytest.mark.parametrize("reference", ["", "CUP", "../cup", "cup@", "cup@r-1", "cup@a/b", "cup@latest@latest"])
def test_a_malformed_reference_never_reaches_the_store(world: World, reference: str) -> None:
    cache = world.cache()
    with pytest.raises(RegistryError):
        resolve(cache, reference)
    assert not world.store.asked


def test_a_new_revision_goes_live_within_the_ttl(world: World) -> None:
    clock = Clock()
    old, cache = world.publish("cup", seed=0), world.cache(clock=clock)
    assert resolve(cache, "cup").manifest == old
    new = world.publish("cup", seed=1)
    clock.now += 1.9
    assert resolve(cache, "cup").manifest == old
    clock.now += 0.2
    assert resolve(cache, "cup").manifest == new
    assert resolve(cache, old.name).manifest == old


def test_the_ttl_counts_from_the_start_of_a_slow_look_up(world: World) -> None:
    """What the store says may be as old as the question."""
    clock = Clock()
    old, cache = world.publish("cup", seed=0), world.cache(clock=clock)
    key, asked = manifest_key("cup", old.revision), world.store.asked.copy()
    gate = world.store.gates[key] = threading.Event()
    looking = cache.resolve("cup")
    wait_until(lambda: world.store.asked[key] > asked[key])
    new = world.publish("cup", seed=1)
    clock.now += 1.9
    gate.set()
    assert looking.result(SOON).manifest == old
    clock.now += 0.2
    assert resolve(cache, "cup").manifest == new


def test_an_unknown_name_is_asked_for_once_while_it_is_remembered(world: World) -> None:
    clock = Clock()
    cache = world.cache(clock=clock)
    for _ in range(5):
        with pytest.raises(AdapterNotFoundError):
            resolve(cache, "cup")
    assert world.store.asked[ALIAS_1] == 1
    manifest = world.publish("cup")
    clock.now += 5.1
    assert resolve(cache, "cup").manifest == manifest


def test_an_unknown_name_leaves_nothing_to_the_collector(world: World) -> None:
    async def main() -> int:
        resolver = ReferenceResolver(world.registry, ServeSettings(), Clock())

        async def misses(count: int) -> None:
            for number in range(count):
                with pytest.raises(AdapterNotFoundError):
                    await resolver.resolve(f"no-{number}")

        await misses(1)
        gc.collect()
        gc.disable()
        try:
            await misses(20)
            return gc.collect()
        finally:
            gc.enable()
            resolver.close()

    assert asyncio.run(main()) < 20


@pytest.mark.slow
def test_a_flood_of_unknown_names_fills_no_memory_and_forgets_no_known_one(world: World) -> None:
    manifest, clock = world.publish("cup"), Clock()
    cache = world.cache(clock=clock)
    assert resolve(cache, "cup").manifest == manifest
    futures = [cache.resolve(f"no-{number}") for number in range(2 * MOST_KEPT)]
    assert all(isinstance(future.exception(SOON), AdapterNotFoundError) for future in futures)
    counts = cache.status()["references"]
    assert counts["known"] == 1
    assert counts["refused"] == MOST_KEPT
    assert counts["running"] == 0
    world.store.down = True
    assert resolve(cache, "cup").manifest == manifest


def test_all_who_ask_at_once_share_one_look_up_and_may_cancel(world: World) -> None:
    manifest = world.publish("cup")
    cache = world.cache()
    world.store.gates[ALIAS_1] = threading.Event()
    futures = [cache.resolve("cup") for _ in range(20)]
    assert futures[0].cancel()
    world.store.gates[ALIAS_1].set()
    assert [future.result(SOON).manifest for future in futures[1:]] == [manifest] * 19
    assert world.store.asked["get"] == 3  # alias record, manifest, quarantine


def test_an_outage_of_the_store_leaves_known_references_standing_for_a_while(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    manifest, clock = world.publish("cup"), Clock()
    cache = world.cache(clock=clock)
    assert resolve(cache, "cup").manifest == manifest
    world.store.down = True
    clock.now += 2.1
    assert resolve(cache, "cup").manifest == manifest
    assert "the store does not respond" in caplog.text
    asked = world.store.asked.total()
    assert resolve(cache, "cup").manifest == manifest
    assert world.store.asked.total() == asked  # not asked again at once
    with pytest.raises(StoreError):
        resolve(cache, "mug")
    clock.now += MOST_STALE_S
    with pytest.raises(StoreError):
        resolve(cache, "cup")
    world.store.down = False
    newer = world.publish("cup", seed=1)
    assert resolve(cache, "cup").manifest == newer


def test_a_store_that_hangs_holds_up_nobody_whose_adapter_is_known(world: World) -> None:
    manifest, clock = world.publish("cup"), Clock()
    cache = world.cache(clock=clock)
    assert resolve(cache, "cup").manifest == manifest
    key = "aliases/cup/latest/00000002.json"
    gate = world.store.gates[key] = threading.Event()
    clock.now += 2.1
    asked = world.store.asked[key]
    first = cache.resolve("cup")
    wait_until(lambda: world.store.asked[key] > asked)
    clock.now += PATIENCE_S + 0.1
    assert cache.resolve("cup").result(SOON / 2).manifest == manifest
    assert not first.done()
    gate.set()
    assert first.result(SOON).manifest == manifest


def test_a_quarantined_revision_is_refused_until_it_is_released(world: World) -> None:
    manifest, clock = world.publish("cup"), Clock()
    cache = world.cache(clock=clock)
    assert resolve(cache, "cup").manifest == manifest
    world.registry.quarantine("cup", manifest.revision, "kps fell", by="the probes")
    clock.now += 2.1
    for reference in ("cup", manifest.name):
        with pytest.raises(QuarantinedError, match=r"cup@r-\w+ is quarantined since .* \(kps fell\)"):
            resolve(cache, reference)
    world.registry.release("cup", manifest.revision)
    clock.now += 2.1
    assert resolve(cache, "cup").manifest == manifest


def test_an_object_that_an_operator_wrote_by_hand_quarantines(world: World) -> None:
    manifest = world.publish("cup")
    world.store.put(f"quarantine/cup/{manifest.revision}.json", b"bad!")
    with pytest.raises(QuarantinedError, match="no reason given"):
        resolve(world.cache(), "cup")


def test_the_fall_back_policy_serves_the_previous_revision_to_aliases_alone(world: World) -> None:
    revisions = [world.publish("cup", seed=seed) for seed in range(3)]
    cache = world.cache(alias_ttl_s=0.0, probes=ProbeSettings(policy="fallback"))
    for bad, good in ((revisions[2], revisions[1]), (revisions[1], revisions[0])):
        world.registry.quarantine("cup", bad.revision, "kps fell")
        found = resolve(cache, "cup")
        assert found.manifest == good
        assert found.note is not None
        assert f"{good.name} serves in its place" in found.note
        with pytest.raises(QuarantinedError):
            resolve(cache, bad.name)
    world.registry.quarantine("cup", revisions[0].revision, "kps fell")
    with pytest.raises(QuarantinedError):
        resolve(cache, "cup")
    assert world.store.asked["list"] == 0


def test_a_rejected_revision_that_a_person_chose_is_served(world: World) -> None:
    manifest = world.publish("cup", status="rejected")
    cache = world.cache(missing_ttl_s=0.0)
    with pytest.raises(AdapterNotFoundError):
        resolve(cache, "cup")
    assert resolve(cache, manifest.name).manifest == manifest
    world.registry.set_alias("cup", "latest", manifest.revision)
    assert resolve(cache, "cup").manifest == manifest


def test_a_damaged_manifest_is_reported_and_remembered(world: World) -> None:
    manifest = world.publish("cup")
    key = f"adapters/cup/{manifest.revision}/manifest.json"
    world.store.put(key, b"{}")
    cache = world.cache()
    for _ in range(2):
        with pytest.raises(RegistryError, match="changed after it was published"):
            resolve(cache, manifest.name)
    assert world.store.asked[key] == 1


def test_closing_fails_what_waits(world: World) -> None:
    world.publish("cup")
    cache = world.cache()
    gate = world.store.gates[ALIAS_1] = threading.Event()
    waiting = cache.resolve("cup")
    wait_until(lambda: world.store.asked[ALIAS_1] == 1)
    cache.close()
    assert isinstance(waiting.exception(SOON), EngineStoppedError)
    assert isinstance(cache.resolve("cup").exception(SOON), EngineStoppedError)
    gate.set()
