"""The commands: each composes its settings, builds the parts, calls them and writes the results."""
