"""The service of `launch/serve.py`: a front that speaks HTTP, and replicas on Ray Serve that translate."""
