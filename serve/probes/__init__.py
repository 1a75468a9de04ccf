"""Drift probes: what is generated, how it is judged, and where records are kept."""
