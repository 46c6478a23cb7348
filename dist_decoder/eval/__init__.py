"""Metrics, retrieval, report."""
