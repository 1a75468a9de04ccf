"""Noise schedules and samplers, both as tables that rows of a batch gather from."""
