"""A better ranking from a first one."""
