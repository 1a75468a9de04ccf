"""The job spec a user writes: its fields, its file, and what an adapter of it resolves to."""
