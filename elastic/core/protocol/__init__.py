"""The step and membership protocols without I/O: `handle(event) -> list of actions`."""
