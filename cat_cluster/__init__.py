"""cat-cluster: knowledge-preserving personalisation of Stable Diffusion with Contrastive Adapter Training (CAT).

The names below are what a program needs (docs/api.md); each is imported when it is first used, so that
`import cat_cluster` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cat_cluster.errors import CatClusterError
    from cat_cluster.models.base_model import load_base_model
    from cat_cluster.models.generate import ImageRow, generate, save_png
    from cat_cluster.pipeline.job import AdapterResult, run_job
    from cat_cluster.pipeline.published_adapters import open_adapter
    from cat_cluster.registry import Manifest, Registry
    from cat_cluster.settings import Settings
    from cat_cluster.spec.job import JobSpec, load_spec
    from cat_cluster.store import open_store

    __version__: str

__all__ = [
    "AdapterResult",
    "CatClusterError",
    "ImageRow",
    "JobSpec",
    "Manifest",
    "Registry",
    "Settings",
    "__version__",
    "generate",
    "load_base_model",
    "load_spec",
    "open_adapter",
    "open_store",
    "run_job",
    "save_png",
]

_MODULES = {
    "AdapterResult": "pipeline.job",
    "CatClusterError": "errors",
    "ImageRow": "models.generate",
    "JobSpec": "spec.job",
    "Manifest": "registry",
    "Registry": "registry",
    "Settings": "settings",
    "generate": "models.generate",
    "load_base_model": "models.base_model",
    "load_spec": "spec.job",
    "open_adapter": "pipeline.published_adapters",
    "open_store": "store",
    "run_job": "pipeline.job",
    "save_png": "models.generate",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("cat-cluster")
    if name not in _MODULES:
        raise AttributeError(f"module 'cat_cluster' has no attribute {name!r}")
    return getattr(import_module(f"cat_cluster.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
