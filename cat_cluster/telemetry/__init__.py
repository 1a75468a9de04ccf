"""Metrics: what each one is (specs) and how it is recorded (recording)."""

from __future__ import annotations

from cat_cluster.telemetry.recording import *
from cat_cluster.telemetry.specs import *
