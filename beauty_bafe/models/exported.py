"""A network as a folder of safetensors and JSON, which loads wherever a checkpoint does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREFIX = "extractor."  # of the network's weights in a checkpoint; an objective may keep more


def write_network(content: Mapping[str, Any], folder: Path) -> None:
    """Write the network of a checkpoint's `content` (see `read_checkpoint`) and its retrieval recipe to `folder`."""
    from safetensors.torch import save

    # Where pretrained weights came from plays no role any more, and may be a path of somebody's machine.
    model = {**content["hyper_parameters"]["model"], "pretrained": False, "weights": None}
    config = {"model": model} | {key: content[key] for key in ("retrieval",) if key in content}
    state = content["state_dict"].items()
    weights = {key.removeprefix(PREFIX): value.contiguous() for key, value in state if key.startswith(PREFIX)}
    # Not save_file, whose files only their owner may read, whatever the umask says.
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_network(folder: Path) -> dict[str, Any]:
    """What `write_network` wrote, in the form of a checkpoint's content.

    Raises OSError, ValueError, KeyError or SafetensorError where a file is missing or broken.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    state = {PREFIX + key: value for key, value in load_file(folder / WEIGHTS).items()}
    content = {"hyper_parameters": {"model": config["model"]}, "state_dict": state}
    return content | {key: config[key] for key in ("retrieval",) if key in config}


def checkpoint_bytes(checkpoint: str | Path) -> dict[str, bytes]:
    """The files that make up a checkpoint, by their path below it: itself, "", or the two of an exported folder."""
    path = Path(checkpoint)
    return {name: (path / name).read_bytes() for name in ((CONFIG, WEIGHTS) if path.is_dir() else ("",))}
