"""Why a RayJob does not move."""

from __future__ import annotations

from dataclasses import dataclass

from cat_cluster.cluster.kuberay.api import Api


@dataclass(frozen=True)
class Obstacle:
    """What is in a job's way. about: the object; text: a sentence with its remedy; final: waiting cannot help."""

    about: str
    text: str
    final: bool


def job_obstacles(api: Api, name: str) -> list[Obstacle]:
    """Return what is in the way of a RayJob of the namespace."""
    return []
