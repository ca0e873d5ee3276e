"""Descriptors in, rankings out: extraction, ensemble, index, re-ranking, submission."""
