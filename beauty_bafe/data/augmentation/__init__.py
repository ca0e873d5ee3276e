"""Foreground augmentation: from a catalogue photo and its mask to a new picture and its mask, without labelling.

Source: BAFE (Wang et al., ACM MM 2019), section on foreground augmentation. Every augmentation is a pure function of
(photo, mask, surroundings, rng): the same generator state gives the same picture on every worker.
"""

from .base import Augmentation, Sample, Surroundings, draw_other
from .paper import PaperAugmentation
from .street import StreetAugmentation

__all__ = ["Augmentation", "PaperAugmentation", "Sample", "StreetAugmentation", "Surroundings", "draw_other"]
