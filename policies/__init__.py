"""One decision per file, pure: `decide(view) -> decision with its reason`."""
