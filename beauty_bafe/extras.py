"""Optional dependencies, and how to install them."""

from __future__ import annotations

import importlib.util
import re

EXTRAS = {  # module -> extra of this package
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "skimage": "classical",
    "onnxruntime": "export",
    "onnxscript": "export",
    "onnx": "export",  # after those whose names begin with onnx
    "pymilvus": "milvus",
    "fastapi": "serve",
    "ray": "ray",
    "rapidocr": "text",
    "rapidfuzz": "text",
    "uvicorn": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
}


def explain(error: ImportError) -> str:
    """How to install the missing package if `error` is about one of these; otherwise its own text."""
    for module, extra in EXTRAS.items():
        if re.search(rf"\b{module}\b", error.name or str(error)) and importlib.util.find_spec(module) is None:
            return f"this needs the package {module}; type pip install 'beauty_bafe[{extra}]'"
    return str(error)
