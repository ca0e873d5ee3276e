"""The commands: each composes its settings, builds the parts, calls them and writes the results."""

from ..process import release_cores

release_cores()  # here, as every way to start a command imports this package, and torch only later
