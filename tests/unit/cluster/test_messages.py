"""What the actor keeps of orders; how they travel is tested on a real Ray."""

from __future__ import annotations

from cat_cluster.cluster.messages import _Actor


def test_of_a_pack_that_has_ended_nothing_is_kept_and_late_workers_hear_nothing_new() -> None:
    actor = _Actor()
    actor.give(3, 1, 2, b"first")
    actor.give(4, 1, 5, b"other")
    assert (actor.newer(3, 0), actor.newer(3, 1), actor.adapters(3)) == (b"first", None, 2)
    actor.forget(3)
    assert actor.newer(3, 0) is None
    assert actor._orders.keys() == {4}
    actor.forget(3)
