"""Leases of several adapters at once: all or none, without waiting for each other, and in order with everybody else."""

from __future__ import annotations

import random
import threading
from concurrent.futures import Future

import pytest
import torch

from cat_cluster.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterNotFoundError,
    ConflictError,
    EngineStoppedError,
    OverloadedError,
)
from cat_cluster.registry import Manifest
from serve.adapters.slots import Lease
from tests.support.served_adapters import (
    RANK,
    SOON,
    CacheOnLoop,
    World,
    held,
    lease,
    random_weights,
    wait_until,
    weights_key,
)

STACKED = 8  # the ranks of one image add up to at most this


def leased(cache: CacheOnLoop) -> int:
    return sum(slot["leases"] for slot in cache.status()["held"])


def release(leases: tuple[Lease, ...]) -> None:
    for one in leases:
        one.release()


def publish(world: World, count: int) -> list[Manifest]:
    return [world.publish(f"a{number}", seed=number) for number in range(count)]


def test_all_members_are_leased_in_their_order(world: World) -> None:
    manifests = publish(world, 3)
    cache = world.cache(max_rank=STACKED)
    lease(cache, manifests[1]).release()
    granted = cache.lease_all(manifests).result(SOON)
    assert [one.manifest for one in granted] == manifests
    for one in granted:
        assert torch.equal(one.flat, world.vector(one.manifest))
    assert leased(cache) == 3
    release(granted)
    wait_until(lambda: leased(cache) == 0)
    assert world.metric("cat_adapter_requests_total", tier="store") == 3
    assert world.metric("cat_adapter_requests_total", tier="slot") == 1
    release(cache.lease_all(manifests).result(SOON))
    assert world.metric("cat_adapter_requests_total", tier="slot") == 4
    assert cache.lease_all([]).result(SOON) == ()


def test_stacks_whose_members_fill_all_slots_take_turns(world: World) -> None:
    """Each would hold a slot that another waits for, were slots taken one by one."""
    manifests = publish(world, 6)
    cache = world.cache(slots=2, max_rank=STACKED)
    chance, waiting = random.Random(1), list[Future[tuple[Lease, ...]]]()
    for round_ in range(30):
        waiting = [cache.lease_all(chance.sample(manifests, 2)) for _ in range(4)]
        waiting += [cache.lease_all([chance.choice(manifests)]) for _ in range(4)]
        left = list(waiting)
        while left:
            wait_until(lambda left=left: any(future.done() for future in left))  # type: ignore[misc]
            for future in [future for future in left if future.done()]:
                left.remove(future)
                granted = future.result()
                for one in granted:
                    assert torch.equal(one.flat, world.vector(one.manifest)), round_
                release(granted)
    wait_until(lambda: leased(cache) == 0)


def test_a_stack_is_not_overtaken_by_those_who_come_later(world: World) -> None:
    manifests = publish(world, 5)
    cache = world.cache(slots=2, max_rank=STACKED)
    first, second = lease(cache, manifests[0]), lease(cache, manifests[1])
    stacked = cache.lease_all(manifests[2:4])
    wait_until(lambda: len(cache.status()["waiting"]) == 2)
    later = cache.lease(manifests[4])
    wait_until(lambda: len(cache.status()["waiting"]) == 3)
    first.release()
    wait_until(lambda: len(cache.status()["waiting"]) == 2)
    assert not stacked.done()
    assert not later.done()
    second.release()
    granted = stacked.result(SOON)
    assert not later.done(), "all slots are the stack's"
    assert held(cache) == {manifest.name for manifest in manifests[2:4]}
    release(granted)
    later.result(SOON).release()


def test_a_stack_whose_store_is_slow_holds_no_slot(world: World) -> None:
    manifests = publish(world, 4)
    gate = world.store.gates[weights_key(manifests[1])] = threading.Event()
    cache = world.cache(slots=2, max_rank=STACKED)
    slow = cache.lease_all(manifests[:2])
    wait_until(lambda: cache.status()["loading"] == [manifests[1].name])
    release(cache.lease_all(manifests[2:]).result(SOON))  # as if it were not there
    assert not slow.done()
    gate.set()
    release(slow.result(SOON))


def test_a_stack_in_slots_waits_for_nobody(world: World) -> None:
    manifests = publish(world, 5)
    cache = world.cache(slots=3, max_rank=STACKED)
    holders = [lease(cache, manifest) for manifest in manifests[:3]]
    waits = cache.lease_all(manifests[3:])
    wait_until(lambda: len(cache.status()["waiting"]) == 2)
    release(cache.lease_all(manifests[:2]).result(SOON))
    assert not waits.done()
    release(tuple(holders))
    release(waits.result(SOON))


@pytest.mark.parametrize("ends", ["cancelled", "late"])
def test_a_stack_that_gives_up_leaves_no_lease(world: World, ends: str) -> None:
    manifests = publish(world, 5)
    cache = world.cache(slots=2, max_rank=STACKED, load_timeout_s=SOON if ends == "cancelled" else 0.3)
    holder = lease(cache, manifests[0])
    waits = cache.lease_all(manifests[1:3])
    wait_until(lambda: leased(cache) == 2)  # it has one of the two slots
    if ends == "cancelled":
        waits.cancel()
    else:
        with pytest.raises(OverloadedError, match=r"a1@r-\S+\+a2@r-\S+ was not ready within 0.3 s: all 2 slots"):
            waits.result(SOON)
    wait_until(lambda: leased(cache) == 1)
    other = lease(cache, manifests[3])
    other.release()
    holder.release()
    release(cache.lease_all(manifests[1:3]).result(SOON))
    wait_until(lambda: leased(cache) == 0)


def test_stacks_cancelled_at_any_moment_leave_no_lease(world: World) -> None:
    manifests = publish(world, 5)
    cache = world.cache(slots=2, max_rank=STACKED)
    chance = random.Random(2)
    for _ in range(60):
        coming = [cache.lease_all(chance.sample(manifests, 2)) for _ in range(3)]
        threading.Event().wait(chance.random() * 0.004)
        for future in coming:
            if not future.cancel():
                release(future.result(SOON))
    wait_until(lambda: leased(cache) == 0)
    assert world.metric("cat_adapter_slots_leased") == 0
    release(cache.lease_all(manifests[:2]).result(SOON))


def test_a_member_that_cannot_be_loaded_is_named_and_the_others_are_given_back(world: World) -> None:
    good = world.publish("good")
    foreign = world.publish("foreign", seed=1, base_fingerprint="f" * 64)
    damaged, gone = world.publish("damaged", seed=2), world.publish("gone", seed=3)
    (world.folder / "storage" / weights_key(damaged)).write_bytes(b"x")
    world.registry.remove_alias("gone", "latest")
    world.registry.delete("gone", gone.revision)
    cache = world.cache(max_rank=STACKED)
    for bad, error in ((foreign, AdapterMismatchError), (damaged, AdapterFormatError), (gone, AdapterNotFoundError)):
        found = cache.lease_all([good, bad]).exception(SOON)
        assert isinstance(found, error)
        assert bad.name in str(found)
        assert leased(cache) == 0
    lease(cache, good).release()


def test_what_can_never_have_its_slots_or_ranks_is_refused_at_once(world: World) -> None:
    manifests = publish(world, 4)
    large = world.publish("large", rank=STACKED, seed=9, weights=random_weights(world.unet, rank=STACKED))
    cache = world.cache(slots=3, max_rank=STACKED)
    with pytest.raises(AdapterMismatchError, match=rf"has rank {STACKED + RANK} in all .* up to {STACKED}: name fewer"):
        cache.lease_all([large, manifests[0]]).result(SOON)
    with pytest.raises(ConflictError, match="needs 4 slots at once, and 3 of 3 are not pinned: name fewer"):
        cache.lease_all(manifests).result(SOON)
    for reference in ("a0", "a1"):
        cache.pin(reference).result(SOON)
    with pytest.raises(ConflictError, match=r"needs 2 slots at once, and 1 of 3 are not pinned: .* unpin some"):
        cache.lease_all(manifests[2:]).result(SOON)
    release(cache.lease_all(manifests[:3]).result(SOON))  # pinned members have theirs


def test_closing_ends_stacks_that_wait(world: World) -> None:
    manifests = publish(world, 5)
    cache = world.cache(slots=2, max_rank=STACKED)
    holder = lease(cache, manifests[0])
    waiting = [cache.lease_all(manifests[1:3]), cache.lease_all(manifests[3:])]
    wait_until(lambda: leased(cache) == 2)
    cache.close()
    for future in waiting:
        assert isinstance(future.exception(SOON), EngineStoppedError)
    holder.release()
    wait_until(lambda: leased(cache) == 0)
