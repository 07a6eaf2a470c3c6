"""What developers run: shell scripts, and `python -m scripts.api_docs`."""
