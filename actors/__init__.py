"""Thin Ray shells around the protocols of `elastic.core`."""
