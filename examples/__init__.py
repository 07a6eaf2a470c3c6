"""Examples: a job file and a task each, the smallest first: digits, stdlib_lm."""
