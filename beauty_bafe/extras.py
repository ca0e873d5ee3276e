"""Packages that only some features need, and how to install them."""

from __future__ import annotations

import importlib.util

EXTRAS = {"wandb": "wandb", "tensorboard": "tensorboard", "skimage": "classical"} | dict.fromkeys(
    ("fastapi", "uvicorn", "python_multipart", "prometheus_client"), "serve"
)  # module -> extra of this package


def explain(error: ImportError) -> str:
    """What to type where `error` is about one of these packages; else the error's own text."""
    for module, extra in EXTRAS.items():
        if module in (error.name or str(error)) and importlib.util.find_spec(module) is None:
            return f"this needs the package {module}; type pip install 'beauty_bafe[{extra}]'"
    return str(error)
