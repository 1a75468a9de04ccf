"""Packed training: several adapters in one U-Net forward, each as if it were alone."""

from __future__ import annotations

# A part of every trained revision. Raise it only when the same settings on the same photos train to other weights by
# more than rounding: another draw, loss, optimiser step or start. Until then a new release finds what older ones
# published, and trains nothing again.
TRAINING_VERSION = 2
