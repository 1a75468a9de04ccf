"""Ray job entry points, example job specs and benchmarks; nobody imports this package."""
