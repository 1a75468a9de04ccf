"""The engine: rows of many requests denoised together on one device; no Ray, no HTTP."""
