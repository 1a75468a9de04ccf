"""Evaluation: judges, metrics with intervals, token leaks, recognition, and the report that shows them."""
