"""Training on a cluster: Ray and DeepSpeed, and what plans the work."""
