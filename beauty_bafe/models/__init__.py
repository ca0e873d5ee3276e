"""Networks: backbones, poolings, the extractor and its Lightning module."""
