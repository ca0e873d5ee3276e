"""Pictures in: catalogues, foreground masks, augmentation, loaders."""
