"""Members become one index with its re-rankers, and answers become files."""
