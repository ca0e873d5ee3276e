"""Networks exported as a folder with safetensors and JSON, which can be used instead of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREFIX = "extractor."  # of the network's weights in a checkpoint, which may contain other weights of the objective


def write_network(content: Mapping[str, Any], folder: Path) -> None:
    """Write the network of a checkpoint's `content` (see `read_checkpoint`) and its retrieval recipe to `folder`."""
    from safetensors.torch import save

    # The source of the pretrained weights no longer matters, and may be a local path.
    model = {**content["hyper_parameters"]["model"], "pretrained": False, "weights": None}
    config = {"model": model} | {key: content[key] for key in ("retrieval",) if key in content}
    state = content["state_dict"].items()
    weights = {key.removeprefix(PREFIX): value.contiguous() for key, value in state if key.startswith(PREFIX)}
    # Not save_file, whose files only their owner can read, whatever the umask.
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_network(folder: Path) -> dict[str, Any]:
    """Read an exported network into the form of a checkpoint's content.

    Raises OSError, ValueError, KeyError or SafetensorError if a file is missing or broken.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    state = {PREFIX + key: value for key, value in load_file(folder / WEIGHTS).items()}
    content = {"hyper_parameters": {"model": config["model"]}, "state_dict": state}
    return content | {key: config[key] for key in ("retrieval",) if key in config}


def checkpoint_bytes(checkpoint: str | Path) -> dict[str, bytes]:
    """The content of a checkpoint file, under the name "", or of the two files of an exported folder, by their names."""
    path = Path(checkpoint)
    return {name: (path / name).read_bytes() for name in ((CONFIG, WEIGHTS) if path.is_dir() else ("",))}
