"""Measurements: each module measures one question side by side in one run and writes a result file."""
