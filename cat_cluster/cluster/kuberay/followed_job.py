"""A RayJob that carries a run out: what those who follow the run learn of it while nothing moves."""

from __future__ import annotations

from cat_cluster.cluster.follow import Watcher
from cat_cluster.cluster.kuberay.client.api import Api, Json
from cat_cluster.cluster.kuberay.client.jobs import RAY, end_text, has_ended
from cat_cluster.cluster.kuberay.obstacles.obstacles import Obstacle, job_obstacles
from cat_cluster.errors import RunError
from cat_cluster.runs.progress import RunProgress, is_alive
from cat_cluster.runs.run import Run

_STATES = {  # of KubeRay, in words
    "": "the operator has not seen it yet",
    "Initializing": "its Ray cluster is being made",
    "Running": "its Ray cluster is there",
    "Retrying": "a try has failed, and another cluster is made for the next",
    "Suspending": "is being suspended, its pods go",
}


class FollowedJob:
    """A Carrier: a RayJob of a namespace, and what is in its way, each said once."""

    def __init__(self, api: Api, name: str, run: Run, watcher: Watcher) -> None:
        self._api, self._name, self._run, self._watcher = api, name, run, watcher
        self._said: set[Obstacle] = set()
        self._state: str | None = None

    def check(self, progress: RunProgress | None) -> None:
        """Say how the job stands, if that has changed, and what is in its way.

        Raises RunError when it has ended, or can go no further, and no driver has said so; KubernetesError.
        """
        is_heard = progress is not None and is_alive(progress)
        job = self._job()
        if job is None or has_ended(job):
            if not is_heard and not self._has_ended_since():
                raise RunError(self._end(job))
            return
        self._say_state(job)
        for obstacle in job_obstacles(self._api, self._name):
            if obstacle.final and not is_heard:
                raise RunError(
                    f"{obstacle.about}: {obstacle.text}. Waiting cannot help: mend it, then `cat-cluster k8s stop "
                    f"{self._name} --namespace {self._api.namespace}` removes the job, and submitting it again goes on"
                )
            if obstacle not in self._said:
                self._said.add(obstacle)
                self._watcher.message(f"{obstacle.about}: {obstacle.text}")

    def tries_again(self, progress: RunProgress) -> bool:
        """Say whether the operator makes another try after one that failed, but not for good."""
        if progress.state != "failed" or progress.permanent:
            return False
        job = self._job()
        if job is None or has_ended(job):
            return False
        self._say_state(job)
        return True

    def _job(self) -> Json | None:
        return self._api.get(RAY, "RayJob", self._name)

    def _say_state(self, job: Json) -> None:
        state = job.get("status", {}).get("jobDeploymentStatus", "")
        if state == self._state:
            return
        self._state = state
        if state != "Suspended":  # what starts it is said as what is in its way
            self._watcher.message(f"RayJob {self._name}: {_STATES.get(state, state)}")

    def _has_ended_since(self) -> bool:
        return self._run.last_record() is not None and self._run.awaited() is None and self._run.progress().ended

    def _end(self, job: Json | None) -> str:
        if job is None:
            return f"RayJob {self._name} is gone: somebody has deleted it; submit again to go on from what is stored"
        why = "".join(f"; {obstacle}" for obstacle in job_obstacles(self._api, self._name))
        return (
            f"RayJob {self._name} {end_text(job)}, without a word from its driver{why}: `cat-cluster k8s logs "
            f"{self._name} --namespace {self._api.namespace}` may show more; submit with --force to go on from what is "
            "stored"
        )
