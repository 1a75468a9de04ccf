"""What serving many adapters costs, beside its rivals."""
