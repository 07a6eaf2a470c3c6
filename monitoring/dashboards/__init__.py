"""Dashboards for Grafana, from code."""
