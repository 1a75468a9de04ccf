"""Ray's and Ray Train's errors as one sentence of ours: their own classes, with the texts that Ray 2.60 writes."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import pytest
import torch
from ray import exceptions as ray_errors
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.train import TrainingFailedError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from cat_cluster.cluster.failures import failure_in, failure_of, unwrapped, worst_of
from cat_cluster.errors import (
    CatClusterError,
    CheckpointError,
    ConceptError,
    LostWorkerError,
    OutOfMemoryError,
    StoreError,
    StoreRefusedError,
    WorkerError,
)

ADVICE = (
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/en/latest/"
    "ray-observability/user-guides/debug-apps/debug-memory.html. Consider provisioning more memory on this node or "
    "reducing task parallelism by requesting more CPUs per task. To adjust the kill threshold, set the environment "
    "variable `RAY_memory_usage_threshold` when starting Ray. To revert to the legacy policy of determining worker to "
    "oom kill based on owner group size or only selecting a single worker to kill at a time, set the environment "
    "variable `RAY_worker_killing_policy_by_group` to true before starting Ray."
)
RAYS_OOM = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 5e63) was "
    "0.80GB used / 0.83GB limit (0.963855)\nOOM kill reason: memory usage threshold was met or exceeded\n"
    "Object store memory usage: [- objects spillable: 0]\nRay killed 1 worker(s) based on the killing policy\n"
    "Considered workers: [\n"
    "Selected to kill: (Actor(RayTrainWorker): job ID=01000000, lease ID=06, task name=RayTrainWorker.__init__, "
    "required resources={CPU: 1}, pid=91, actual memory used=0.44GB, worker ID=a8)\n"
    "(Task: job ID=01000000, lease ID=07, task name=train cup, required resources={}, pid=92, actual memory "
    "used=0.61GB, worker ID=a9)\n]\nTotal non-selected idle workers: 0\n"
    "To see more information about memory usage on this node, use `ray logs raylet.out -ip 10.0.0.7`\n"
    f"Top 10 memory users: PID\tMEM(GB)\tCOMMAND\n91\t0.44\tray::RayTrainWorker\n{ADVICE}"
)
HAD = "out of memory: the machine or pod had 0.83 GiB, and 0.80 were in use, 0.44 by the process that Ray then ended; "
ALONE = (
    "lower training.rows_per_concept, set training.gradient_checkpointing, or give it more memory (a worker in "
    "Kubernetes: `k8s render --worker-memory`)"
)
KILLED = "training stopped: a process was killed or has crashed, as happens when its machine or pod runs out of memory"
LOST = "training stopped: a machine or pod of the cluster was lost (a pod also ends when it has no memory left)"
GPU = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.69 GiB of which 3.10 GiB is "
    "free. Including non-PyTorch memory, this process has 20.58 GiB memory in use. Of the allocated memory 19.90 GiB "
    "is allocated by PyTorch, and 420.10 MiB is reserved by PyTorch but unallocated."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)


def actor_died(message: str, **context: Any) -> ray_errors.ActorDiedError:
    return ray_errors.ActorDiedError(
        ActorDiedErrorContext(error_message=message, class_name="RayTrainWorker", actor_id=16 * b"a", pid=91, **context)
    )


def process_died(code: str) -> ray_errors.ActorDiedError:
    return actor_died(
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        f"Worker unexpectedly exits with a connection error code {code}. End of file. Some common causes include: (1) "
        "the process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) "
        "the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
    )


def node_died(how: str, **context: Any) -> ray_errors.ActorDiedError:
    return actor_died(f"The actor died because its node has died. Node Id: 5e63\n\t{how}", **context)


def unhealthy(failure: Exception) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: Worker(...)", failure)


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    """The error with a traceback."""
    try:
        raise error from cause
    except Exception as caught:
        return caught


def text_of(error: Exception) -> str:
    return "".join(traceback.format_exception(raised(error)))


def task_error(error: Exception) -> ray_errors.RayTaskError:
    """What `ray.get` raises for an error inside a task."""
    return ray_errors.RayTaskError("f", text_of(error), error, "ray::f", 91, "10.0.0.7").as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (StoreError("the bucket\nis gone"), StoreError, "the bucket\nis gone"),
        (task_error(StoreError("the bucket is gone")), StoreError, "the bucket is gone"),
        (task_error(task_error(ConceptError("no photo"))), ConceptError, "no photo"),
        (UserExceptionWithTraceback(StoreError("gone"), "Traceback"), StoreError, "gone"),
        (WorkerGroupError("rank 0", {0: StoreRefusedError("denied")}), StoreRefusedError, "denied"),
        (ControllerError(task_error(CheckpointError("damaged"))), CheckpointError, "damaged"),
        (ControllerError(OutOfMemoryError("ours")), OutOfMemoryError, "ours"),
        (unhealthy(ray_errors.OutOfMemoryError(RAYS_OOM)), OutOfMemoryError, HAD + ALONE),
        (ControllerError(ray_errors.OutOfMemoryError(RAYS_OOM)), OutOfMemoryError, HAD + ALONE),
        (task_error(ray_errors.OutOfMemoryError(RAYS_OOM)), OutOfMemoryError, HAD + ALONE),
        (
            ray_errors.OutOfMemoryError("of another release"),
            OutOfMemoryError,
            f"out of memory: Ray ended a process, because its machine or pod had no memory left; {ALONE}",
        ),
        (
            torch.OutOfMemoryError(GPU),
            OutOfMemoryError,
            "out of memory: 20.00 GiB more were asked for on a GPU of 23.69 GiB, where the process held 20.58 GiB; "
            + ALONE,
        ),
        (RuntimeError(CPU), OutOfMemoryError, f"out of memory: 4.00 GiB more were asked for; {ALONE}"),
        (task_error(MemoryError()), OutOfMemoryError, f"out of memory: Python could get no more; {ALONE}"),
        (ray_errors.WorkerCrashedError(), LostWorkerError, KILLED),
        (unhealthy(process_died("2")), LostWorkerError, KILLED),
        (ControllerError(unhealthy(process_died("104"))), LostWorkerError, KILLED),
        (
            unhealthy(node_died("the actor's node was terminated unexpectedly: health check failed due to missing")),
            LostWorkerError,
            LOST,
        ),
        (
            unhealthy(
                node_died(
                    "the actor's node was preempted: spot",
                    node_death_info=NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED),
                )
            ),
            LostWorkerError,
            "training stopped: its machine was taken away",
        ),
        (
            ray_errors.NodeDiedError("Task failed because the node it was running on is dead or unavailable."),
            LostWorkerError,
            LOST,
        ),
        (unhealthy(ray_errors.LocalRayletDiedError()), LostWorkerError, LOST),
        (
            ray_errors.OwnerDiedError("ab", b"", ""),
            LostWorkerError,
            "training stopped: what a process had made was lost with it or its machine",
        ),
        (
            WorkerGroupStartupFailedError(
                f"One of the worker actors failed to initialize due to error:\n{text_of(process_died('2'))}"
            ),
            LostWorkerError,
            KILLED,
        ),
        (
            ray_errors.ActorDiedError(
                ray_errors.RayTaskError("f", text_of(StoreError("away")), None, "ray::f", 1, "::1")
            ),
            StoreError,
            "away",
        ),
        (
            WorkerHealthCheckTimeoutError("A worker health check has been hanging for 601.00 seconds. Marking ..."),
            WorkerError,
            "training stopped: A worker health check has been hanging for 601.00 seconds. Marking ...",
        ),
        (
            ray_errors.RuntimeEnvSetupError("pip found no such package"),
            WorkerError,
            "training stopped: pip found no such package",
        ),
        (
            ray_errors.TaskUnschedulableError("The node is gone"),
            WorkerError,
            "training stopped: The node is gone",
        ),
        (task_error(ValueError("late\nmore")), WorkerError, "training stopped: ValueError: late"),
        (RuntimeError(), WorkerError, "training stopped: RuntimeError"),
        (TrainingFailedError(), WorkerError, "training stopped: no reason given"),
    ],
)
def test_an_error_of_rays_is_its_cause_or_one_sentence(
    error: Exception, kind: type[CatClusterError], message: str
) -> None:
    failure = failure_of(error, adapters=1)
    assert (type(failure), str(failure)) == (kind, message)
    back = pickle.loads(pickle.dumps(failure))  # as it goes from the pack's task to the driver
    assert (type(back), str(back)) == (kind, message)


@pytest.mark.parametrize(
    ("adapters", "remedy"),
    [
        (None, "; give it more memory (a worker in Kubernetes: `k8s render --worker-memory`)"),
        (6, "; lower cluster.max_pack (here 6 trained together) or training.rows_per_concept, or give it more memory"),
    ],
)
def test_the_remedy_for_want_of_memory_is_that_of_the_pack(adapters: int | None, remedy: str) -> None:
    failure = failure_of(ray_errors.OutOfMemoryError(RAYS_OOM), adapters=adapters)
    assert remedy in str(failure)
    assert "oom kill" not in str(failure)
    assert "\n" not in str(failure)


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ({1: ValueError("second"), 0: ValueError("first")}, "training stopped: ValueError: first"),
        ({0: ValueError("late"), 1: CatClusterError("not finite")}, "not finite"),
        ({0: RuntimeError("Connection closed by peer"), 1: unhealthy(process_died("2"))}, KILLED),
        ({0: unhealthy(process_died("2")), 1: StoreError("the store is away")}, "the store is away"),
        ({0: StoreError("the store is away"), 1: StoreRefusedError("access was denied")}, "access was denied"),
        ({0: RuntimeError("Connection closed"), 1: unhealthy(ray_errors.OutOfMemoryError(RAYS_OOM))}, HAD + ALONE),
    ],
)
def test_of_several_workers_the_one_that_explains_the_others_counts(
    failures: dict[int, Exception], message: str
) -> None:
    assert str(worst_of(failures, adapters=1)) == message
    assert str(failure_of(WorkerGroupError("several", failures), adapters=1)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text_of(StoreError("two\nlines")), "two\nlines"),
        (
            "".join(traceback.format_exception(raised(ValueError("x"), StoreError("cause")))),
            "it stopped: ValueError: x",
        ),
        (text_of(torch.OutOfMemoryError(GPU)), "out of memory: 20.00 GiB more were asked for on a GPU of 23.69 GiB, "),
        (text_of(ray_errors.OutOfMemoryError(RAYS_OOM)), HAD),
        (f"Exception when allocating:\n{text_of(RuntimeError(text_of(ConceptError('no photo'))))}", "no photo"),
        ("plain\nwords", "it stopped: plain"),
        (" ", "it stopped: no reason given"),
    ],
)
def test_a_text_with_tracebacks_is_its_last_error(text: str, message: str) -> None:
    assert str(failure_in(text, "it")).startswith(message)


def test_what_may_pass_is_told_from_what_is_permanent() -> None:
    assert failure_of(ray_errors.OutOfMemoryError(RAYS_OOM)).permanent
    assert failure_of(task_error(StoreRefusedError("access was denied"))).permanent
    for error in (ray_errors.WorkerCrashedError(), unhealthy(process_died("2")), task_error(StoreError("away"))):
        assert not failure_of(error).permanent
    assert not failure_of(ValueError("unknown")).permanent


def test_a_block_is_left_with_an_error_of_ours() -> None:
    with pytest.raises(StoreError, match=r"^gone$"), unwrapped("the run"):
        raise task_error(StoreError("gone"))
    with (
        pytest.raises(LostWorkerError, match=r"^the run stopped: a machine or pod of the cluster was lost"),
        unwrapped("the run"),
    ):
        raise ray_errors.LocalRayletDiedError
    with pytest.raises(KeyboardInterrupt), unwrapped("the run"):
        raise KeyboardInterrupt
