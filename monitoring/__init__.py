"""Metric table, exporter, rules, dashboards."""
