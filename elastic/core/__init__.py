"""Pure core: exact sums, store, data, protocols without I/O. Never imports Ray."""
