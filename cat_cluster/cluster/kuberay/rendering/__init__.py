"""What is made of a job spec: a RayJob, its pods, and their sizes."""
