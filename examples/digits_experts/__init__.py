"""Four flow-matching experts of handwritten digits, a router over them, and what they are worth."""
