"""What developers run: shell scripts, `python -m scripts.api_docs`, and the testbed's modules."""
