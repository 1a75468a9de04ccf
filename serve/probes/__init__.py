"""Drift probes: what is drawn, how it is judged, and where records are kept."""
