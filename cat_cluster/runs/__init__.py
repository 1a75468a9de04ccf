"""What is known of runs, kept in the object store; no Ray and no torch."""
