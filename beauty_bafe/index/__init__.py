"""Where the gallery's descriptors are kept and searched."""
