"""The HTTP service around an engine client; no Ray, no device."""
