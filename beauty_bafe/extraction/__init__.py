"""From pictures to descriptors and masks: in memory, on disk, on several machines."""
