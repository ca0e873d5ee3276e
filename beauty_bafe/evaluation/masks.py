"""Metrics of predicted masks against true ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..data.catalog import open_catalog
from ..data.pictures import letterbox, read_picture
from ..extraction.features import Features
from ..models.extractor import resize_mask
from ..models.objectives import mask_metrics

SIZE = 224  # side in pixels of the letterboxed masks that are compared


def evaluate_masks(features: Features, folder: str | Path) -> dict[str, float]:
    """Mean `mask_mae`, `mask_f_beta`, `mask_iou` over the pictures that have a mask in `folder` (same stem), and `mask_count`.

    Without masks in `features` the predicted mask is 1 everywhere. Raises ValueError if no picture has a true mask.
    """
    paths = dict(zip((catalog := open_catalog(folder)).ids, catalog.paths, strict=True))
    rows = [row for row, name in enumerate(features.ids) if name in paths]
    if not rows:
        raise ValueError(
            f"masks='{folder}' has no mask for '{features.ids[0]}' or any other query; masks must have the names of the queries"
        )
    true = np.stack([letterbox(read_picture(paths[features.ids[row]]).rgb[..., 0], SIZE, fill=0) for row in rows])
    label = torch.from_numpy(true)[:, None].float() / 255
    weights = np.full((len(features.ids), 1, 1), 255, np.uint8) if features.masks is None else features.masks
    predicted = resize_mask(torch.from_numpy(weights[rows])[:, None].float() / 255, SIZE)
    result = {f"mask_{name}": value.mean().item() for name, value in mask_metrics(predicted, label).items()}
    return result | {"mask_count": float(len(rows))}
