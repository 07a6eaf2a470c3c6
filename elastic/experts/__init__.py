"""Experts of one data set: partition it, train each apart, a router over them, measure, pack."""
