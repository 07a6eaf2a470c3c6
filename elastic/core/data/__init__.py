"""Which samples a micro-batch holds, and the data sets that read samples by number."""
