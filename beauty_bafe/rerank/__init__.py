"""Re-ranking of search results."""
