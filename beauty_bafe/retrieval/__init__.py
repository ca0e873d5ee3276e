"""Ensembles, the gallery with its indexes and re-rankers, calibrated probabilities, and submission files."""
