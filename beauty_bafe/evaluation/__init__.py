"""Metrics, tables and reports of retrieval runs."""
