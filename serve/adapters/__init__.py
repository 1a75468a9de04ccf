"""The adapter cache: store, disk, host memory, slots; no Ray, no HTTP."""
