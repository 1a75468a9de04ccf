"""Why a job does not move: what a real API server (Kubernetes 1.34) and KubeRay 1.7 said, told in a sentence."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from cat_cluster.cluster.kuberay.client.api import Api
from cat_cluster.cluster.kuberay.obstacles.obstacles import Obstacle, job_obstacles, obstacles_of
from cat_cluster.cluster.kuberay.obstacles.pod_causes import logs_wanted
from cat_cluster.cluster.kuberay.obstacles.states import pod_state
from cat_cluster.cluster.kuberay.obstacles.view import JobView, view_job
from tests.support.api_server import ApiServer, made
from tests.support.recorded_jobs import RECORDED, put_jobs, put_recorded, queued, typed, workload

# Of each recorded job: about what is said, in what words, and whether waiting cannot help.
SAID: dict[str, list[tuple[str, str, bool]]] = {
    "cpu": [("Pod cpu-w4s7z-head-l22zm", "of 1 machine: 1 with too little cpu free (it asks for 100); ask for", False)],
    "mem": [("Pod ", "1 with too little memory free (it asks for 500Gi); ask for less (--worker-memory", False)],
    "gpu": [("Pod ", "1 with too little nvidia.com/gpu free (it asks for 1); wait for a GPU, add machines", False)],
    "tengpu": [
        ("Pod tengpu-29hgt-head-w46j5", "container ray-head cannot be started: exec", True),
        ("4 pods (tengpu-29hgt-workers-worker-f2f9v, ...)", "1 with too little nvidia.com/gpu free", False),
    ],
    "sel": [("Pod ", "1 without the labels that the pod selects; label machines as its nodeSelector", False)],
    "pvc": [("Pod ", "there is no volume claim none; make it, or leave the volume out", False)],
    "pvcwait": [("Pod ", "its volume claim is not bound; see `kubectl get pvc`", False)],
    "image": [("Pod ", "image registry.invalid/cat:9 cannot be pulled: Head", False)],
    "badname": [("Pod ", "'Cat:0.2.0:x' is no name of an image; correct --image", True)],
    "never": [("Pod ", "image localhost/notthere:1 is not on its machine, and imagePullPolicy is Never", True)],
    "psa": [("RayCluster psa-dphkj", "Pod Security (restricted) refuses its pods: runAsNonRoot != true", True)],
    "account": [("RayCluster ", "its pods want service account nobody, which is not there; apply the overlay", True)],
    "prio": [("RayCluster ", "its pods want priority class nothing, which is not there; apply the overlay", True)],
    "quota": [
        ("RayCluster ", "quota training has no room for its pods, the next of which asks for requests.cpu 2", True)
    ],
    "quota10": [
        ("RayCluster quota10-d6cgk", "asks for requests.cpu 300m (910m of 1 in use); wait for other jobs", False),
        ("Pod quota10-d6cgk-head-hkqqp", "container ray-head cannot be started: exec", True),
        ("3 pods (quota10-d6cgk-workers-worker-9pss5, ...)", "container wait-gcs-ready cannot be started", True),
    ],
    "secret": [("Pod ", "container ray-head wants Secret absent-secret, which is not there; make it", True)],
    "cm": [("Pod ", "wants ConfigMap cat-cluster-settings, which is not there; apply the overlay of k8s/", True)],
    "key": [("Pod ", "wants key nokey of Secret there, which does not have it; add it", True)],
    "mount": [("Pod ", "volume v wants Secret absent-secret, which is not there; make it", True)],
    "oom": [("Pod ", "was killed for memory 5 times, of which it had 16Mi; give it more (--head-memory)", True)],
    "crash": [("Pod ", "container ray-head ended with exit code 255, 5 times; its last lines: no / bucket;", True)],
    "cmdbad": [("Pod ", 'cannot be started: exec: "/nothere": stat /nothere: no such file or directory', True)],
    "evict": [("pods (evict-", 'was evicted: Usage of EmptyDir volume "v" exceeds the limit "4Ki"; another', False)],
    "sleeps": [("Pod ", "runs for 180 s and more and is not ready: Liveness probe failed: Get", False)],
    "managed": [("RayJob managed", "is kueue.x-k8s.io/multikueue's to run (managedBy)", False)],
    "invalid": [("RayJob invalid", "KubeRay's operator refuses it: The RayJob spec is invalid: backoffLimit", True)],
    "invalid2": [("RayJob invalid2", "is not allowed to be suspended; correct it, and make it anew", True)],
    "suspended": [
        ("RayJob suspended", 'is suspended; `kubectl patch rayjob suspended --type merge -p \'{"spec":', False)
    ],
    "deadline": [
        ("RayJob deadline", "its deadline has passed: The RayJob has passed the activeDeadlineSeconds", True),
        ("Pod ", "container ray-head cannot be started", True),
    ],
    "predeadline": [
        ("RayJob predeadline", "its deadline has passed: The RayJob has passed the preRunningDeadlineSeconds", True),
        ("Pod ", "container ray-head cannot be started", True),
    ],
}
NOW = datetime(2026, 11, 29, 10, 51, 18, tzinfo=UTC)


def test_each_recorded_case_has_its_words() -> None:
    assert SAID.keys() == RECORDED.keys()


@pytest.mark.parametrize("case", SAID)
def test_a_recorded_job(case: str) -> None:
    found = obstacles_of(view_of(case), now=NOW)
    assert len(found) == len(SAID[case]), found
    for obstacle, (about, text, final) in zip(found, SAID[case], strict=True):
        assert about in obstacle.about
        assert text in obstacle.text
        assert obstacle.final is final
        assert str(obstacle) == f"{obstacle.about}: {obstacle.text}"
        assert "\n" not in obstacle.text


def view_of(case: str) -> JobView:
    record = RECORDED[case]
    logs = {(pod["metadata"]["name"], "ray-head"): "x\n\nno\nbucket\n"[2:] for pod in record["pods"]}
    return JobView(record["job"], record["pods"], record["events"], logs=logs)


@pytest.mark.parametrize(
    ("clause", "words"),
    [
        ("3 node(s) had untolerated taint {nvidia.com/gpu: present}", "3 tainted nvidia.com/gpu; take the taint away"),
        ("2 Too many pods", "2 with as many pods as they may have; add machines"),
        ("1 node(s) were unschedulable", "1 cordoned; uncordon them"),
        ("1 node(s) had volume node affinity conflict", "1 away from its volume; add a machine in its zone"),
        ("2 node(s) didn't have free ports", "2 node(s) didn't have free ports; add machines that fit"),
    ],
)
def test_what_else_keeps_a_pod_from_machines(clause: str, words: str) -> None:
    message = f"0/4 nodes are available: {clause}. preemption: 0/4 nodes are available: 4 No preemption victims found."
    pod = copy.deepcopy(RECORDED["cpu"]["pods"][0])
    pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "message": message}]
    (obstacle,) = obstacles_of(JobView(RECORDED["cpu"]["job"], [pod]), now=NOW)
    assert obstacle.text == f"no machine takes it, of 4 machines: {words}" + (
        " or add a toleration" if "taint" in clause else ""
    )


def test_reasons_of_several_machines_are_told_together() -> None:
    message = "0/3 nodes are available: 1 Insufficient cpu, 2 Insufficient memory. preemption: no."
    pod = copy.deepcopy(RECORDED["cpu"]["pods"][0])
    pod["status"]["conditions"][0]["message"] = message
    (obstacle,) = obstacles_of(JobView(RECORDED["cpu"]["job"], [pod]), now=NOW)
    asked = "1 with too little cpu free (it asks for 100), 2 with too little memory free (it asks for 32Mi)"
    assert asked in obstacle.text


def test_an_evicted_pod_that_is_still_there() -> None:
    pod = copy.deepcopy(RECORDED["cpu"]["pods"][0])
    pod["status"] = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory. "}
    (obstacle,) = obstacles_of(JobView(RECORDED["cpu"]["job"], [pod]), now=NOW)
    assert obstacle.text.startswith("was evicted: The node was low on resource: memory; another takes its place")


def test_old_evictions_and_pods_that_go_say_nothing() -> None:
    view = view_of("evict")
    later = NOW + timedelta(hours=1)
    assert [one for one in obstacles_of(view, now=later) if "evicted" in one.text] == []
    pod = copy.deepcopy(RECORDED["oom"]["pods"][0])
    pod["metadata"]["deletionTimestamp"] = "2026-11-29T10:51:00Z"
    assert obstacles_of(JobView(RECORDED["oom"]["job"], [pod]), now=NOW) == []


def test_a_container_that_is_back_after_it_was_killed_for_memory_is_told_and_may_go_on() -> None:
    pod = copy.deepcopy(RECORDED["oom"]["pods"][0])
    pod["status"]["containerStatuses"][0] |= {"ready": True, "restartCount": 4, "state": {"running": {}}}
    (obstacle,) = obstacles_of(JobView(RECORDED["oom"]["job"], [pod]), now=NOW)
    assert "was killed for memory 4 times" in obstacle.text
    assert not obstacle.final
    pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"] = "Error"
    assert obstacles_of(JobView(RECORDED["oom"]["job"], [pod]), now=NOW) == []


@pytest.mark.parametrize(
    ("labels", "container", "remedy"),
    [
        ({"ray.io/node-type": "head"}, "ray-head", "give it more (--head-memory), or train fewer packs"),
        ({"ray.io/node-type": "head"}, "autoscaler", "give it more (autoscalerOptions.resources of the manifest)"),
        ({"ray.io/node-type": "worker"}, "ray-worker", "give it more (--worker-memory), or train fewer adapters"),
        ({"batch.kubernetes.io/job-name": "oom"}, "ray-job-submitter", "give it more (submitterPodTemplate of"),
    ],
)
@pytest.mark.parametrize("restarts", [True, False])
def test_each_pod_that_is_killed_for_memory_is_told_what_it_had_and_what_gives_it_more(
    labels: dict[str, str], container: str, remedy: str, restarts: bool
) -> None:
    pod = copy.deepcopy(RECORDED["oom"]["pods"][0])
    pod["metadata"]["labels"] = labels
    pod["spec"]["containers"][0]["name"] = pod["status"]["containerStatuses"][0]["name"] = container
    times = "5 times"
    if not restarts:
        status = pod["status"]["containerStatuses"][0]
        status |= {"restartCount": 0, "state": status.pop("lastState")}
        pod["status"]["phase"], times = "Failed", "once"
    (obstacle,) = obstacles_of(JobView(RECORDED["oom"]["job"], [pod]), now=NOW)
    assert f"container {container} was killed for memory {times}, of which it had 16Mi; {remedy}" in obstacle.text
    assert pod_state(pod).phase == ("CrashLoopBackOff" if restarts else "OOMKilled")


@pytest.mark.parametrize(("state", "told"), [("Failed", 1), ("Complete", 0)])
def test_a_job_that_failed_says_what_of_it_was_killed_for_memory(
    state: str, told: int, api: Api, server: ApiServer
) -> None:
    put_recorded(server, "oom", "crash")
    for name in ("oom", "crash"):
        server.objects["rayjobs", "cat-cluster", name]["status"] |= {"jobDeploymentStatus": state}
    found = job_obstacles(api, "oom")
    assert ["was killed for memory 5 times, of which it had 16Mi" in one.text for one in found] == [True] * told
    assert job_obstacles(api, "crash") == []


def test_a_worker_that_was_killed_for_memory_and_deleted_is_told_by_the_operators_event(
    api: Api, server: ApiServer
) -> None:
    """With autoscaler v2 no pod restarts: KubeRay deletes it at once and makes another."""
    job = copy.deepcopy(RECORDED["tengpu"]["job"])
    name, cluster = job["metadata"]["name"], job["status"]["rayClusterName"]
    put_jobs(server, job)
    spec = {"containers": [{"name": "ray-worker", "resources": {"limits": {"memory": "3Gi"}}}]}
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "worker"}
    server.put(made("Pod", f"{cluster}-cpu-worker-new", labels=labels, spec=spec))

    def event(number: int, pod: str, ended: str) -> None:
        # As KubeRay 1.7 and k8s.io/api 0.36 write it.
        message = (
            f"Deleted worker Pod cat-cluster/{pod}; Pod status: Failed; Pod restart policy: Never; "
            f"Ray container terminated status: {ended}"
        )
        about = {"kind": "RayCluster", "name": cluster}
        server.put(
            made(
                "Event",
                f"e{number}",
                type="Normal",
                reason="DeletedWorkerPod",
                message=message,
                involvedObject=about,
                eventTime=datetime.now(UTC).isoformat(),
            )
        )

    event(1, f"{cluster}-cpu-worker-old", "&ContainerStateTerminated{ExitCode:137,Signal:0,Reason:OOMKilled,Message:,}")
    event(2, f"{cluster}-cpu-worker-x", "&ContainerStateTerminated{ExitCode:1,Signal:0,Reason:Error,Message:,}")
    (obstacle,) = job_obstacles(api, name)
    assert str(obstacle) == (
        f"Pod {cluster}-cpu-worker-old: was killed for memory, of which it had 3Gi; another takes its place: give it "
        "more (--worker-memory), or train fewer adapters in a pack (cluster.max_pack)"
    )
    assert not obstacle.final


def test_a_pod_that_submits_and_is_refused() -> None:
    event = {
        "involvedObject": {"kind": "Job", "name": "cpu"},
        "metadata": {},
        "reason": "FailedCreate",
        "lastTimestamp": "2026-11-29T10:50:31Z",
        "message": 'Error creating: pods "cpu-m5ccm" is forbidden: violates PodSecurity "restricted:latest": '
        'seccompProfile (pod or container "a" must set securityContext.seccompProfile.type)',
    }
    later = NOW + timedelta(minutes=20)  # Kubernetes tries it again ever more seldom
    (obstacle,) = obstacles_of(JobView(RECORDED["cpu"]["job"], events=[event]), now=later)
    assert obstacle.about == "Job cpu"
    assert obstacle.text.startswith("Pod Security (restricted) refuses its pods: seccompProfile (pod")


def test_a_job_that_nobody_has_looked_at() -> None:
    job = copy.deepcopy(RECORDED["managed"]["job"])
    del job["spec"]["managedBy"]
    made = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    soon, late = made + timedelta(seconds=20), made + timedelta(seconds=95)
    assert obstacles_of(JobView(job), now=soon) == []
    (hidden,) = obstacles_of(JobView(job), now=late)
    assert hidden.text.startswith("KubeRay's operator has said nothing of it for 30 s and more; see that it runs")
    (absent,) = obstacles_of(JobView(job, operators=[]), now=late)
    assert absent.text.endswith("and the cluster shows none; install it (docs/operations.md)")
    down = {"metadata": {"namespace": "ops"}, "status": {}}
    (stopped,) = obstacles_of(JobView(job, operators=[down]), now=late)
    assert "has no pod that is ready; see that it runs (`kubectl -n ops get pods`)" in stopped.text
    assert not any(one.final for one in (hidden, absent, stopped))


@pytest.mark.parametrize("forbidden", [set(), {"deployments"}])
def test_the_operator_is_looked_for_where_that_is_allowed(forbidden: set[str], api: Api, server: ApiServer) -> None:
    job = copy.deepcopy(RECORDED["managed"]["job"])
    del job["spec"]["managedBy"]
    put_jobs(server, job)
    containers = [{"image": "quay.io/kuberay/operator:v1.7.0"}]
    server.put(made("Deployment", "ray", "ops", spec={"template": {"spec": {"containers": containers}}}))
    server.forbidden |= forbidden
    (obstacle,) = job_obstacles(api, "managed")
    assert ("-n ops" in obstacle.text) is (not forbidden)


def test_pods_that_are_not_valid_are_told_without_the_name_of_the_last() -> None:
    job = copy.deepcopy(RECORDED["quota"]["job"])
    message = (
        'FailedCreateWorkerPod\nPod "tea-x-worker-6bpd9" is invalid: metadata.labels: Invalid value: "g_": no label'
    )
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": message}
    job["status"]["rayClusterStatus"]["conditions"] = [failure]
    (obstacle,) = obstacles_of(JobView(job), now=NOW)
    assert obstacle.text.startswith('the API server refuses its pods: metadata.labels: Invalid value: "g_": no label;')


def test_commands_name_the_namespace() -> None:
    job = copy.deepcopy(RECORDED["suspended"]["job"])
    job["metadata"]["namespace"] = "cats"
    assert "`kubectl -n cats patch rayjob suspended --type" in obstacles_of(JobView(job), now=NOW)[0].text


def test_a_job_of_a_queue_runs_where_there_is_no_kueue() -> None:
    """Nobody suspends it there, so it waits for nobody."""
    job = {**queued("tea"), "spec": {"suspend": False}, "status": RECORDED["cpu"]["job"]["status"]}
    assert obstacles_of(JobView(job, workloads=None), now=NOW) == []


def test_a_job_that_is_handed_over_in_vain() -> None:
    status = {"jobDeploymentStatus": "Failed", "reason": "SubmissionFailed", "message": "Job submission has failed."}
    (obstacle,) = obstacles_of(JobView({**RECORDED["cpu"]["job"], "status": status}), now=NOW)
    assert obstacle.text.startswith("it could not be handed to its cluster: Job submission has failed; `cat-cluster")


# Kueue's objects are written here from its types (v1beta2): the cluster of the recordings had no Kueue.


def test_the_place_in_a_queue_is_by_priority_and_then_by_age() -> None:
    message = "couldn't assign flavors to pod set head: insufficient unused quota for cpu in flavor all, 1 more needed"
    runs = workload("runs", 10)
    runs["status"]["conditions"] = [{"type": kind, "status": "True"} for kind in ("QuotaReserved", "Admitted")]
    other = workload("other", 10, queueName="night")
    held = workload("held", 10, active=False)
    workloads = [
        workload("late", 30),
        workload("tea", 20, message=message),
        runs,
        workload("first", 40, 9),
        other,
        held,
    ]
    (obstacle,) = obstacles_of(JobView(queued("tea"), workloads=workloads), now=NOW)
    assert obstacle == Obstacle(
        "RayJob tea",
        f"waiting in queue train, place 2: head lacks 1 of cpu in flavor all; {LATER}",
        final=False,
    )
    (obstacle,) = obstacles_of(JobView(queued("held"), workloads=workloads), now=NOW)
    assert obstacle.text.startswith("held in queue train: `kubectl patch workload rayjob-held")


LATER = "it starts when there is quota for all of its pods"
RESERVED_NOTHING = (  # by Kueue 0.17.0, of a job of two pod sets in a queue with another
    "couldn't assign flavors to pod set head: insufficient unused quota for cpu in flavor e2e, 100m more needed, "
    "insufficient unused quota for memory in flavor e2e, 512Mi more needed; couldn't assign flavors to pod set cpu: "
    "insufficient unused quota for cpu in flavor e2e, 1100m more needed"
)
NEVER = (
    "couldn't assign flavors to pod set head: insufficient quota for cpu in flavor {}, previously considered podsets "
    "requests (0) + current podset request (4) > maximum capacity (2)"
)


@pytest.mark.parametrize(
    ("message", "words", "final"),
    [
        (
            RESERVED_NOTHING,
            "head lacks 100m of cpu in flavor e2e and 512Mi of memory in flavor e2e; "
            f"cpu lacks 1100m of cpu in flavor e2e; {LATER}",
            False,
        ),
        (
            NEVER.format("small"),
            "head asks for 4 of cpu where flavor small has 2; ask for less, or have the quota raised",
            True,
        ),
        (
            NEVER.format("small").replace("(0)", "(500m)"),
            "head asks for 4 of cpu beside 500m for its other pods where flavor small has 2; ask for less, or have the "
            "quota raised",
            True,
        ),
        (  # another flavor has room for it, later
            NEVER.format("small") + ", insufficient unused quota for cpu in flavor large, 1 more needed",
            f"head lacks 1 of cpu in flavor large, asks for 4 of cpu where flavor small has 2; {LATER}",
            False,
        ),
        (
            "couldn't assign flavors to pod set head: flavor gpu doesn't match node affinity",
            f"couldn't assign flavors to pod set head: flavor gpu doesn't match node affinity; {LATER}",
            False,
        ),
    ],
)
def test_what_a_queue_has_no_quota_for(message: str, words: str, final: bool) -> None:
    (obstacle,) = obstacles_of(JobView(queued("tea"), workloads=[workload("tea", 10, message=message)]), now=NOW)
    assert (obstacle.text, obstacle.final) == (f"waiting in queue train, place 1: {words}", final)


def test_a_queue_that_is_not_there() -> None:
    (obstacle,) = obstacles_of(
        JobView(queued("tea"), workloads=[workload("tea", 10, message="LocalQueue train doesn't exist")]), now=NOW
    )
    assert obstacle.text.startswith("waiting in queue train, place 1: LocalQueue train doesn't exist; make it")
    assert obstacle.final
    (obstacle,) = obstacles_of(JobView(queued("tea"), workloads=None), now=NOW)
    assert "Kueue is not installed" in obstacle.text
    (obstacle,) = obstacles_of(JobView(queued("tea")), now=NOW)
    assert "which Kueue has not noticed" in obstacle.text


def test_a_job_with_quota_waits_for_admission_checks() -> None:
    one = workload("tea", 10)
    one["status"] = {
        "conditions": [{"type": "QuotaReserved", "status": "True"}, {"type": "Admitted", "status": "False"}],
        "admissionChecks": [{"name": "machines", "state": "Pending"}],
    }
    (obstacle,) = obstacles_of(JobView(queued("tea"), workloads=[one]), now=NOW)
    assert obstacle.text.startswith("has quota in queue train and waits for admission check machines;")


def test_the_reader_looks_at_the_pods_and_events_of_one_job(api: Api, server: ApiServer) -> None:
    put_recorded(server, "cpu", "crash", "oom")
    server.logs["crash-p7xbh-head-dx5x8"] = "Traceback\nValueError: no bucket\n"
    (obstacle,) = job_obstacles(api, "crash")
    assert "its last lines: Traceback / ValueError: no bucket; `cat-cluster k8s logs` has more" in obstacle.text
    (read,) = [asked for asked in server.asked if "/log?" in asked]
    assert read.endswith("/pods/crash-p7xbh-head-dx5x8/log?container=ray-head&tailLines=3&previous=true")
    assert job_obstacles(api, "none") == []


def test_what_may_not_be_seen_is_told_beside_the_rest(api: Api, server: ApiServer) -> None:
    put_recorded(server, "cpu")
    server.forbidden.add("events")
    (hidden, seen) = job_obstacles(api, "cpu")
    assert hidden.about == "events"
    assert hidden.text.startswith("a right is missing to list events")
    assert "too little cpu" in seen.text


def test_the_reader_asks_kueue_for_jobs_of_a_queue_alone(api: Api, server: ApiServer) -> None:
    put_jobs(server, queued("tea"))
    server.put(typed("kueue.x-k8s.io/v1beta1", "Workload", workload("tea", 10)))
    put_recorded(server, "cpu")
    (obstacle,) = job_obstacles(api, "tea")
    assert obstacle.text.startswith("waiting in queue train, place 1;")
    server.forbidden.add("workloads")
    assert len(job_obstacles(api, "cpu")) == 1


def test_a_queue_without_kueue(api: Api, server: ApiServer) -> None:
    put_jobs(server, queued("tea"))
    del server.kinds["kueue.x-k8s.io/v1beta1"]
    (obstacle,) = job_obstacles(api, "tea")
    assert "Kueue is not installed" in obstacle.text


def test_a_job_without_a_spec_is_looked_at_too() -> None:
    job = {"metadata": {"name": "tea"}, "status": {"jobDeploymentStatus": "Running"}}
    assert obstacles_of(JobView(job), now=datetime.now(UTC)) == []


def test_an_end_without_a_reason_wants_its_log() -> None:
    ended = {"name": "ray-head", "state": {"terminated": {"exitCode": 137}}}
    assert list(logs_wanted({"status": {"containerStatuses": [ended]}})) == [("ray-head", False)]


def test_a_shared_cluster_is_not_the_jobs(api: Api, server: ApiServer) -> None:
    """Its pods are other jobs' too; it is in the way of a job that waits for it alone, and then by its name."""
    record = copy.deepcopy(RECORDED["oom"])
    cluster = record["job"]["status"]["rayClusterName"]
    put_recorded(server, "oom")
    (own,) = job_obstacles(api, "oom")
    assert "was killed for memory" in own.text
    record["job"]["spec"] = {"clusterSelector": {"ray.io/cluster": cluster}}
    record["job"]["metadata"]["namespace"] = "cat-cluster"
    put_jobs(server, record["job"])
    server.put(made("Pod", "oom-s", labels={"batch.kubernetes.io/job-name": "oom"}))
    assert [pod["metadata"]["name"] for pod in view_job(api, record["job"]).pods] == ["oom-s"]
    (waits,) = job_obstacles(api, "oom")
    assert str(waits) == (
        f"RayJob oom: waits for RayCluster {cluster}, which it shares with others, to be ready; "
        f"`kubectl -n cat-cluster describe raycluster {cluster}` says how that stands"
    )
    assert not waits.final
    record["job"]["status"]["jobDeploymentStatus"] = "Running"
    put_jobs(server, record["job"])
    assert job_obstacles(api, "oom") == []


@pytest.mark.parametrize("ahead", [timedelta(hours=2), timedelta(hours=-2)])
def test_recent_events_are_recent_by_the_servers_clock(ahead: timedelta, api: Api, server: ApiServer) -> None:
    """Whatever this machine's clock says."""
    put_recorded(server, "evict")
    there = datetime.now(UTC) + ahead
    for one in server.objects.values():
        if one["kind"] == "Event":
            one["lastTimestamp"] = there.isoformat()
    server.date = format_datetime(there, usegmt=True)
    (evicted,) = job_obstacles(api, "evict")
    assert "was evicted" in evicted.text
    server.date = format_datetime(there + timedelta(hours=1), usegmt=True)
    assert job_obstacles(api, "evict") == []
