"""A job spec as Kubernetes objects, and the check of manifests before they are applied."""
