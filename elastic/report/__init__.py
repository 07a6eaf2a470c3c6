"""The report of a run: read as arrays (`story`), drawn (`picture`), or made a page (`page`)."""
