"""Extraction of descriptors and masks from pictures: in memory, on disk, on several machines."""
