import host.shim  # noqa: F401 - before diffusers
