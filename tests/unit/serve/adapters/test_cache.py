"""The adapter cache on a real store: leases, admit-then-evict, failures, pins and unloading."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    CatClusterError,
    ObjectNotFoundError,
    ServingError,
    StoreError,
)
from cat_cluster.lora.formats import AdapterWeights, LoraLayer
from cat_cluster.registry.references import manifest_key
from serve.adapters.loader import MIB
from tests.support.served_adapters import ROW, SOON, Clock, World, held, lease, random_weights, wait_until, weights_key


def test_a_lease_holds_the_adapter_and_later_ones_need_no_store(world: World) -> None:
    manifest = world.publish("cup")
    cache = world.cache()
    with lease(cache, manifest) as first, lease(cache, manifest) as second:
        assert torch.equal(first.flat, world.vector(manifest))
        assert second.flat.data_ptr() == first.flat.data_ptr()
        assert cache.status()["held"] == [{"slot": 0, "model": manifest.name, "leases": 2, "pinned": False}]
        assert world.metric("cat_adapter_slots_leased") == 1
        first.release()
        first.release()
        assert cache.status()["held"][0]["leases"] == 1
    assert cache.status()["held"][0]["leases"] == 0
    assert world.metric("cat_adapter_requests_total", tier="store") == 1
    assert world.metric("cat_adapter_requests_total", tier="slot") == 1
    assert world.metric("cat_adapter_slots_used") == 1
    assert world.metric("cat_adapter_slots_leased") == 0
    assert world.metric("cat_adapter_swap_seconds_count") == 1
    assert world.metric("cat_adapter_load_seconds_count") == 1
    json.dumps(cache.status())


def test_the_least_recently_used_slot_goes_first_and_comes_back_from_host_memory(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(4)]
    cache = world.cache()
    for manifest in [*manifests[:3], manifests[0], manifests[3]]:
        lease(cache, manifest).release()
    assert held(cache) == {manifests[number].name for number in (0, 2, 3)}
    with lease(cache, manifests[1]) as again:
        assert torch.equal(again.flat, world.vector(manifests[1]))
    assert world.metric("cat_adapter_requests_total", tier="host") == 1
    assert world.metric("cat_adapter_evictions_total", tier="slot") == 2
    assert all(world.store.asked[weights_key(manifest)] == 1 for manifest in manifests[2:])


def bad_manifests(world: World, unet: UNet2DConditionModel) -> dict[str, tuple[object, type[CatClusterError]]]:
    damaged = world.publish("damaged", seed=11)
    world.store.put(weights_key(damaged), b"x" * damaged.objects["weights"].size)
    missing = world.publish("missing", seed=12)
    world.store.delete(weights_key(missing))
    odd = AdapterWeights({"conv_in": LoraLayer(torch.ones(1, 4), torch.ones(8, 1))})
    not_adapted = random_weights(unet, seed=13).layers
    linear = next(
        name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear) and name not in not_adapted
    )
    module = unet.get_submodule(linear)
    layer = LoraLayer(torch.ones(1, module.in_features), torch.ones(module.out_features, 1))
    return {
        "damaged": (damaged, AdapterFormatError),
        "missing": (missing, ObjectNotFoundError),
        "of another base": (world.publish("foreign", seed=14, base_fingerprint="c" * 64), AdapterMismatchError),
        "no linear layer": (world.publish("odd", seed=15, weights=odd), AdapterMismatchError),
        "not in targets": (
            world.publish("wide", seed=16, weights=AdapterWeights({linear: layer})),
            AdapterMismatchError,
        ),
        "rank": (world.publish("rank", seed=17, rank=3), AdapterMismatchError),
    }


def test_what_cannot_be_served_evicts_nothing(world: World, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """Ray Serve evicts before it loads: repeated bad ids flush its cache."""
    good = [world.publish(f"a{number}", seed=number) for number in range(3)]
    bad = bad_manifests(world, unet)
    disk = tmp_path / "disk"
    cache = world.cache(disk_cache=disk, host_mib=1, missing_ttl_s=0.0)
    for manifest in good:
        lease(cache, manifest).release()
    wait_until(lambda: len(os.listdir(disk)) == 3)
    before = cache.status()
    assert len(before["held"]) == len(before["host"]) == 3  # full
    for manifest, error in bad.values():
        for _ in range(3):
            assert isinstance(cache.lease(manifest).exception(SOON), error)
    with pytest.raises(AdapterNotFoundError):
        cache.load("nobody").result(SOON)
    after = cache.status()
    assert {**after, "references": None} == {**before, "references": None}
    assert set(os.listdir(disk)) == {f"{manifest.objects['weights'].sha256}.safetensors" for manifest in good}
    assert world.store.asked[weights_key(bad["of another base"][0])] == 0
    assert world.store.asked[weights_key(bad["rank"][0])] == 0
    assert world.metric("cat_adapter_evictions_total", tier="slot") == 0
    assert world.metric("cat_adapter_evictions_total", tier="host") == 0


def test_a_file_too_large_for_a_slot_is_refused_before_it_is_fetched(world: World) -> None:
    manifest = world.publish("cup")
    large = manifest.objects["weights"].model_copy(update={"size": 4 * ROW + MIB + 1})
    cache = world.cache()
    oversize = manifest.model_copy(update={"objects": {**manifest.objects, "weights": large}})
    with pytest.raises(AdapterMismatchError, match="a slot takes up to"):
        lease(cache, oversize)
    assert not world.store.asked


def test_a_revision_deleted_after_its_name_was_looked_up_is_not_found(world: World) -> None:
    cache, manifest = world.cache(), world.publish("cup")
    assert cache.resolve(manifest.name).result(SOON).manifest == manifest
    world.registry.remove_alias(manifest.adapter_id, "latest")
    world.registry.delete(manifest.adapter_id, manifest.revision)
    with pytest.raises(AdapterNotFoundError, match=f"{manifest.name} was deleted"):
        lease(cache, manifest)


def test_a_revision_published_again_while_it_is_loaded_is_served(world: World) -> None:
    cache, manifest = world.cache(), world.publish("cup")
    weights, looked_up = weights_key(manifest), manifest_key(manifest.adapter_id, manifest.revision)
    data = world.store.get(weights)
    world.store.delete(weights)
    world.store.gates[looked_up] = threading.Event()
    world.store.asked.clear()
    coming = cache.lease(manifest)
    wait_until(lambda: world.store.asked[looked_up] == 1)
    world.store.put(weights, data)
    world.store.gates[looked_up].set()
    with coming.result(SOON) as leased:
        assert torch.equal(leased.flat, world.vector(manifest))


def test_a_failure_is_remembered_for_a_while(world: World) -> None:
    manifest, clock = world.publish("cup"), Clock()
    data = world.store.get(weights_key(manifest))
    world.store.put(weights_key(manifest), b"x" * len(data))
    cache = world.cache(clock=clock)
    for _ in range(4):
        with pytest.raises(AdapterFormatError):
            lease(cache, manifest)
    assert world.store.asked[weights_key(manifest)] == 1
    assert world.metric("cat_adapter_load_failures_total") == 1
    (remembered,) = [error for error, _ in cache.cache._host._failures._errors.values()]
    assert remembered.__traceback__ is None  # its frames would keep the file alive
    world.store.put(weights_key(manifest), data)
    clock.now += 5.1
    lease(cache, manifest).release()


def test_a_store_that_cannot_be_reached_fails_loads_alone_and_is_asked_again(world: World) -> None:
    here, away = world.publish("cup"), world.publish("mug", seed=1)
    cache = world.cache()
    lease(cache, here).release()
    world.store.down = True
    with pytest.raises(StoreError):
        lease(cache, away)
    lease(cache, here).release()
    world.store.down = False
    lease(cache, away).release()


def test_a_revision_published_again_with_other_weights_is_another_adapter(
    world: World, unet: UNet2DConditionModel
) -> None:
    first = world.publish("cup")
    cache = world.cache()
    hold = lease(cache, first)
    old = world.vector(first)
    world.registry.remove_alias("cup", "latest")
    world.registry.delete("cup", first.revision)
    second = world.publish("cup", weights=random_weights(unet, seed=9))
    assert second.revision == first.revision
    with lease(cache, second) as new:
        assert torch.equal(new.flat, world.vector(second))
        assert torch.equal(hold.flat, old)
    hold.release()
    assert cache.unload(first.name).result(SOON) == {"model": first.name, "tier": None, "pinned": False}
    assert held(cache) == set()


def test_pins_are_made_at_the_start_and_never_evicted(world: World, caplog: pytest.LogCaptureFixture) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(4)]
    cache = world.cache(slots=3, pins=("a0", "nobody"))
    pinned, not_pinned = cache.pinning()
    assert pinned.result(SOON) == {"model": manifests[0].name, "tier": "slot", "pinned": True}
    assert isinstance(not_pinned.exception(SOON), AdapterNotFoundError)
    assert "nobody is not pinned" in caplog.text
    for manifest in manifests[1:]:
        lease(cache, manifest).release()
    assert manifests[0].name in held(cache)
    assert cache.pin("a1").result(SOON)["pinned"]
    with pytest.raises(ServingError, match="one of 3 slots must stay free"):
        cache.pin("a2").result(SOON)
    assert world.metric("cat_adapters_pinned") == 2
    with pytest.raises(ServingError, match="unpin it first"):
        cache.unload("a0").result(SOON)
    with pytest.raises(ServingError, match=r"a2@r-.* is not pinned: pinned are a[01]@r-.*, a[01]@r-"):
        cache.unpin("a2").result(SOON)
    world.store.down = True
    assert cache.unpin(manifests[0].name).result(SOON) == {"model": manifests[0].name, "tier": "slot", "pinned": False}
    assert cache.unload(manifests[0].name).result(SOON)["tier"] is None
    assert world.metric("cat_adapters_pinned") == 1
    assert sum(slot["leases"] for slot in cache.status()["held"]) == 0


def test_unloading_is_refused_while_in_use(world: World) -> None:
    manifest = world.publish("cup")
    cache = world.cache()
    gate = world.store.gates[weights_key(manifest)] = threading.Event()
    future = cache.lease(manifest)
    with pytest.raises(ServingError, match="is being loaded"):
        cache.unload("cup").result(SOON)
    gate.set()
    hold = future.result(SOON)
    with pytest.raises(ServingError, match="is in use"):
        cache.unload("cup").result(SOON)
    hold.release()
    assert cache.unload("cup").result(SOON)["tier"] is None
    assert cache.status()["host_bytes"] == 0
    assert cache.load("cup").result(SOON) == {"model": manifest.name, "tier": "slot", "pinned": False}


def test_host_memory_is_bounded_and_the_least_recently_used_go(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(4)]
    cache = world.cache(host_mib=1)
    for number in (0, 1, 2, 0, 3):
        cache.prefetch(f"a{number}").result(SOON)
    assert cache.status()["host"] == [manifests[number].name for number in (2, 0, 3)]
    assert cache.status()["host_bytes"] == 3 * 4 * ROW == world.metric("cat_adapter_host_bytes")
    assert world.metric("cat_adapter_evictions_total", tier="host") == 1
    assert held(cache) == set()


def test_a_hit_needs_no_thread_and_no_turn_of_the_loop(world: World) -> None:
    manifest = world.publish("cup")
    cache = world.cache()
    cache.load("cup").result(SOON)

    def hit(coroutine: Coroutine[Any, Any, Any]) -> Any:
        with pytest.raises(StopIteration) as returned:
            coroutine.send(None)
        return returned.value.value

    assert world.loop.call(lambda: hit(cache.cache.resolve("cup"))).manifest == manifest
    (granted,) = world.loop.call(lambda: hit(cache.cache.lease([manifest])))
    with granted:
        assert torch.equal(granted.flat, world.vector(manifest))
    assert cache.status()["held"][0]["leases"] == 0
