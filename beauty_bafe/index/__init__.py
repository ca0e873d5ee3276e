"""Indexes: the gallery's descriptors, and nearest-neighbour search among them."""
