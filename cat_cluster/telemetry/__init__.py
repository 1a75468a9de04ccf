"""Metrics: what each one is (specs), how it is recorded (recording), and their page in the docs (document)."""

from __future__ import annotations

from cat_cluster.telemetry.document import *
from cat_cluster.telemetry.recording import *
from cat_cluster.telemetry.specs import *
