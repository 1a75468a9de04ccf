"""What workers, ZeRO, Ray and checkpoints cost and gain."""
