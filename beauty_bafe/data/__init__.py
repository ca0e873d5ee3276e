"""Input pictures: catalogues, foreground masks, augmentation, loaders."""
