"""The Ray Serve application: HTTP in, images out. It meets training only in the registry and the adapter format."""
