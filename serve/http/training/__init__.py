"""Training over HTTP: uploads of photos, fine-tuning jobs as OpenAI has them, and whole runs; no Ray, no device."""
