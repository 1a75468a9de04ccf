"""Those who wait for an adapter: in order, sharing one load, within a limit, and free to leave."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from cat_cluster.errors import EngineStoppedError, OverloadedError
from cat_cluster.registry import Manifest
from serve.adapters.slots import Slot
from tests.support.served_adapters import SOON, CacheOnLoop, World, held, lease, wait_until, weights_key


def nothing_is_awaited(cache: CacheOnLoop) -> bool:
    status = cache.status()
    return (status["loading"], status["waiting"]) == ([], [])


def test_nothing_leased_is_evicted_and_those_who_wait_are_served_in_order(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(6)]
    cache = world.cache()
    leases = [lease(cache, manifest) for manifest in manifests[:3]]
    waiting = []
    for manifest in manifests[3:]:
        waiting.append(cache.lease(manifest))
        wait_until(lambda: len(cache.status()["waiting"]) == len(waiting))
    lease(cache, manifests[0]).release()  # a hit does not wait
    for number in range(3):
        assert not any(future.done() for future in waiting[number:])
        for one in leases[number:]:
            assert torch.equal(one.flat, world.vector(one.manifest))
        leases[number].release()
        leases.append(waiting[number].result(SOON))
    for one in leases:
        one.release()
    assert world.metric("cat_adapter_slots_leased") == 0


def test_a_wait_ends_at_the_time_limit(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(3)]
    cache = world.cache(slots=1, load_timeout_s=0.2)
    holder = lease(cache, manifests[0])
    gate = world.store.gates[weights_key(manifests[2])] = threading.Event()
    no_slot, slow = cache.lease(manifests[1]), cache.lease(manifests[2])
    with pytest.raises(OverloadedError, match="all 1 slots are in use"):
        no_slot.result(SOON)
    with pytest.raises(OverloadedError, match="the store is slow"):
        slow.result(SOON)
    wait_until(lambda: nothing_is_awaited(cache))
    gate.set()
    holder.release()
    lease(cache, manifests[1]).release()


def test_all_who_ask_at_once_share_one_load(world: World) -> None:
    manifest = world.publish("cup")
    cache = world.cache()
    gate = world.store.gates[weights_key(manifest)] = threading.Event()
    futures = [cache.lease(manifest) for _ in range(20)]
    wait_until(lambda: cache.status()["loading"] == [manifest.name])
    gate.set()
    leases = [future.result(SOON) for future in futures]
    assert world.store.asked[weights_key(manifest)] == 1
    assert cache.status()["held"][0]["leases"] == 20
    for one in leases:
        one.release()
    assert world.metric("cat_adapter_requests_total", tier="store") == 20


def test_slow_loads_hold_up_neither_hits_nor_copies(world: World) -> None:
    """More slow loads than workers; Ray Serve's one lock makes a slow load block every other."""
    here, in_host = world.publish("cup", seed=50), world.publish("mug", seed=51)
    slow = [world.publish(f"a{number}", seed=number) for number in range(8)]
    cache = world.cache()
    lease(cache, here).release()
    assert cache.prefetch("mug").result(SOON)["tier"] == "host"
    for manifest in slow:
        world.store.gates[weights_key(manifest)] = threading.Event()
    futures = [cache.lease(manifest) for manifest in slow]
    for manifest in (here, in_host):
        with cache.lease(manifest).result(2.0) as granted:
            assert torch.equal(granted.flat, world.vector(manifest))
    assert cache.resolve("cup").result(2.0).manifest == here
    assert not any(future.done() for future in futures)
    for manifest, future in zip(slow, futures, strict=True):
        world.store.gates[weights_key(manifest)].set()
        future.result(SOON).release()


def test_one_slow_load_does_not_hold_up_another(world: World) -> None:
    slow, quick = world.publish("cup"), world.publish("mug", seed=1)
    cache = world.cache()
    world.store.gates[weights_key(slow)] = threading.Event()
    future = cache.lease(slow)
    lease(cache, quick).release()
    assert not future.done()


def test_a_cancelled_lease_leaves_no_trace(world: World) -> None:
    """Ray Serve keeps the id of a cancelled load in its loading set."""
    loading, queued, holder = (world.publish(name, seed=n) for n, name in enumerate(("loading", "queued", "holder")))
    cache = world.cache(slots=1)
    hold = lease(cache, holder)
    gate = world.store.gates[weights_key(loading)] = threading.Event()
    first, second = cache.lease(loading), cache.lease(queued)
    wait_until(lambda: cache.status()["waiting"] == [queued.name] and world.store.asked[weights_key(loading)] == 1)
    assert first.cancel()
    assert second.cancel()
    wait_until(lambda: nothing_is_awaited(cache))
    gate.set()
    hold.release()
    wait_until(cache.is_idle)
    status = cache.status()
    assert held(cache) == {holder.name}
    assert loading.name not in status["host"]  # nobody waited for it when it arrived
    assert status["held"][0]["leases"] == 0
    lease(cache, loading).release()


def test_a_load_that_waits_for_a_worker_is_never_made_when_nobody_wants_it(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(6)]
    cache = world.cache(slots=6)
    for manifest in manifests:
        world.store.gates[weights_key(manifest)] = threading.Event()
    futures = [cache.lease(manifest) for manifest in manifests]
    assert futures[-1].cancel()
    for gate in world.store.gates.values():
        gate.set()
    for future in futures[:-1]:
        future.result(SOON).release()
    assert world.store.asked[weights_key(manifests[-1])] == 0


def test_one_of_two_who_wait_may_cancel(world: World) -> None:
    manifest = world.publish("cup")
    cache = world.cache()
    gate = world.store.gates[weights_key(manifest)] = threading.Event()
    first, second = cache.lease(manifest), cache.lease(manifest)
    assert first.cancel()
    gate.set()
    with second.result(SOON):
        assert cache.status()["held"][0]["leases"] == 1


def test_an_emptied_slot_goes_to_those_who_wait(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(3)]
    cache = world.cache(slots=2)
    assert cache.pin("a0").result(SOON)["pinned"]
    hold = lease(cache, manifests[1])
    future = cache.lease(manifests[2])
    wait_until(lambda: cache.status()["waiting"] == [manifests[2].name])
    assert cache.unpin("a0").result(SOON)["pinned"] is False
    future.result(SOON).release()
    hold.release()


def test_a_slot_filled_for_a_caller_that_leaves_just_then_goes_to_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = world.publish("cup"), world.publish("mug", seed=1)
    cache = world.cache(slots=1, load_timeout_s=2.0)
    for reference in ("cup", "mug"):
        cache.prefetch(reference).result(SOON)

    async def leave_when_filled() -> None:
        fill = cache.cache._slots.fill
        leaving = asyncio.create_task(cache.cache.lease([first]))
        staying = asyncio.create_task(cache.cache.lease([second]))

        def fill_and_cancel(slot: Slot, manifest: Manifest) -> None:
            fill(slot, manifest)
            asyncio.get_running_loop().call_soon(leaving.cancel)

        monkeypatch.setattr(cache.cache._slots, "fill", fill_and_cancel)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        (granted,) = await staying
        with granted:
            assert torch.equal(granted.flat, world.vector(second))

    world.loop.begin(leave_when_filled()).result(SOON)


def test_closing_fails_what_waits_and_leaves_leases(world: World) -> None:
    manifests = [world.publish(f"a{number}", seed=number) for number in range(3)]
    cache = world.cache(slots=1)
    hold = lease(cache, manifests[0])
    gate = world.store.gates[weights_key(manifests[1])] = threading.Event()
    waiting = [cache.lease(manifests[1]), cache.lease(manifests[2]), cache.load("a1")]
    wait_until(lambda: cache.status()["waiting"] == [manifests[2].name] and len(cache.status()["loading"]) == 1)
    cache.close()
    assert all(isinstance(future.exception(SOON), EngineStoppedError) for future in waiting)
    assert isinstance(cache.lease(manifests[0]).exception(SOON), EngineStoppedError)
    assert torch.equal(hold.flat, world.vector(manifests[0]))
    hold.release()
    gate.set()
    cache.close()


def test_a_load_that_all_have_given_up_is_joined_by_the_next_one(world: World) -> None:
    """Clients that come and go while the store is slow take one of the few loaders, not all."""
    manifest = world.publish("cup")
    cache = world.cache()
    gate = world.store.gates[weights_key(manifest)] = threading.Event()
    first = cache.lease(manifest)
    wait_until(lambda: world.store.asked[weights_key(manifest)] == 1)
    assert first.cancel()
    wait_until(lambda: nothing_is_awaited(cache))
    second = cache.lease(manifest)
    wait_until(lambda: cache.status()["loading"] == [manifest.name])
    gate.set()
    second.result(SOON).release()
    assert world.store.asked[weights_key(manifest)] == 1
