"""Has every training worker of a chaos test record its steps; Python reads this at start because of PYTHONPATH.

The program itself has no such hook: a worker reports only some steps to its driver, and late, while these tests must
know exactly how far a killed one had come.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "cat_cluster.cluster.monitor"


class _MonitorFinder:
    """Finds the module and has its monitor write a line for each step: rank, process, what each adapter has done."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """Answer for that one module."""
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _note_steps(module.PackMonitor)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _note_steps(monitor: Any) -> None:
    step = monitor.step
    journal = os.open(os.environ["CAT_TEST_JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(self: Any, report: Any, slots: Any) -> None:
        os.write(journal, f"{os.environ.get('RANK', '0')} {os.getpid()} {json.dumps(report.done)}\n".encode())
        step(self, report, slots)

    monitor.step = noted


if "CAT_TEST_JOURNAL" in os.environ:
    sys.meta_path.insert(0, _MonitorFinder)
