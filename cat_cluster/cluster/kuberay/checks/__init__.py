"""Manifests read as Kubernetes reads them, and what an API server or KubeRay would refuse of them."""
