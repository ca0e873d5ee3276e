"""Networks: backbones, mask decoders, poolings, the extractor and the Lightning modules that train it."""
