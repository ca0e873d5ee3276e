"""The commands: each composes its settings, builds the parts, calls them and writes the results."""

from ..process import release_cores

release_cores()  # here, as this is imported by every way to start a command, and before torch
