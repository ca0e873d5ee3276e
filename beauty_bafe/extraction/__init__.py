"""Pictures in, descriptors and masks out: in memory, on disk, on several machines."""
