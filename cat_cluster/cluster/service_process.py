"""The process of a training service: it joins or starts Ray, and works until somebody interrupts it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

import ray

from cat_cluster.cluster.connection import check_size, cluster_address, ray_connection
from cat_cluster.cluster.failures import unwrapped
from cat_cluster.cluster.train_service import ServiceOptions, TrainService
from cat_cluster.cluster.trainer import most_workers
from cat_cluster.runs.services import check_service_name
from cat_cluster.settings import Settings
from cat_cluster.store import open_store


def run_train_service(
    store_url: str,
    settings: Settings,
    options: ServiceOptions,
    say: Callable[[str], None],
    *,
    address: str | None = None,
) -> None:
    """Train what the queue of a storage asks for until somebody interrupts it: SIGTERM is a KeyboardInterrupt here.

    address: of the Ray cluster; None means RAY_ADDRESS, else a Ray started on this machine. Raises SpecError for a
    cluster that is too small for one group or a name that none can have, ClusterError, StoreError.
    """
    check_service_name(options.name)
    address = None if ray.is_initialized() else cluster_address(address)
    store = open_store(store_url)
    store.check_access()
    with unwrapped("the service"), ray_connection(address) as size:
        check_size(options.cluster, store.url, size)
        if options.groups[1] * most_workers(options.cluster.workers) >= size.workers:
            say(
                f"warning: the groups may take all {size.workers} {size.kind} of the cluster, and what is trained then "
                "waits for one of them to be published with: allow fewer with --groups, or let the cluster grow"
            )
        # Once Ray is joined, which has a handler of its own that ends the process with nothing given back.
        signal.signal(signal.SIGTERM, _interrupt)
        with TrainService(store, settings, options, size, say) as service:
            say(f"training service {options.name}: waiting for runs in the queue of {store.url}")
            while True:
                service.turn()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does, and ignore further signals while runs are given back."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
