"""The page that goes with an exported network: what it is, what it learned from, what was measured, whose it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CONF, compose

FIGURES = {  # of metrics.json
    "val/mAP@7": "mAP@7, street views of held-back photos against the catalogue",
    "val/iou": "mask IoU",
    "val/f_beta": "mask F-beta",
    "val/mae": "mask mean absolute error",
}


def write_card(file: Path, content: Mapping[str, Any], checkpoint: Path, files: Mapping[str, Any], drawn: bool) -> None:
    """Write the card of a checkpoint's `content` (see `read_checkpoint`), read from `checkpoint`.

    `files`: what export found of each ONNX file. `drawn`: whether they were compared on drawn pictures.
    """
    model = content["hyper_parameters"]["model"]
    agreement = [
        f"| `{name}` | {found['size']} px | {found['view']} | {found['least_cosine']:.7f} | "
        f"{found['largest_mask_difference'] * 255:.0f}/255 | {found['compared_pictures']} |"
        for name, found in files.items()
    ]
    pad = files["model.onnx"]["pad"]
    lines = [
        f"# A background-agnostic product descriptor: {model['name']}",
        "",
        "Describes the product in a picture, and says where it is. Made by beauty_bafe, `beauty-bafe export`.",
        "",
        "## Use",
        "",
        "`retrieve.py checkpoints='[FOLDER]'` and `Retriever.build(\"FOLDER\", gallery)` load this folder "
        "(`model.safetensors`, `config.json`).",
        "",
        "ONNX: input `pictures`, uint8 (N, 3, S, S), RGB: the picture in the middle, its longer side scaled "
        f"to S, the rest filled with {pad}; outputs `descriptor`, float32 (N, D) of length 1, and `mask`, uint8 (N, 112, 112), "
        "0 to 255. Normalisation is inside.",
        f"Pooling: {files['model.onnx']['pooling']}. "
        + (
            "Describe the gallery with `model.onnx`, queries with `query.onnx`."
            if "query.onnx" in files
            else "Describe gallery and queries with `model.onnx`."
        ),
        "",
        "| file | S | looks at | lowest cosine | largest mask difference | pictures |",
        "| --- | --- | --- | --- | --- | --- |",
        *agreement,
        "",
        *(
            [
                "`query.onnx` first finds the product, then describes what its view shows of it, see `conf/query`.",
                "",
            ]
            if "query.onnx" in files
            else []
        ),
        f"The last columns compare onnxruntime on a CPU with PyTorch in float32, on {'drawn' if drawn else 'real'} pictures.",
        "",
        "## Data and recipe",
        "",
        *_settings(content),
        "",
        "## Figures",
        "",
        *_figures(checkpoint),
        "",
        "## Licence",
        "",
        *_licence(model["name"]),
        "",
        "## Limits",
        "",
        "* Learned from catalogue photos with pasted backgrounds; photographs differ. Measure on your own before use.",
        "* One product a picture: of several it may take any, or all of them.",
        "* A score ranks answers; it is no probability that an answer is right.",
        "* Runs in bfloat16 or compiled give slightly other descriptors: do not mix them with these in one index.",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(content: Mapping[str, Any]) -> list[str]:
    """What decided the training, as a list; which pictures it was is not in a checkpoint."""
    run, rest = content.get("run", {}), content["hyper_parameters"]
    rows = {"objective": content.get("objective"), "epochs": content.get("epoch", -1) + 1 or None}
    rows |= {key: value for key, value in rest.items() if key != "model"} | run
    rows |= {f"retrieval.{key}": value for key, value in (content.get("retrieval") or {}).items()}
    kept = [f"* {key}: `{json.dumps(value)}`" for key, value in rows.items() if value not in (None, {}, [])]
    return [
        "The checkpoint does not say which photos it learned from: add it here. The settings that it keeps, which "
        "`conf/objective` and `conf/train.yaml` explain:",
        "",
        *kept,
    ]


def _figures(checkpoint: Path) -> list[str]:
    """Of metrics.json beside the checkpoint or in its run's folder."""
    places = [folder / "metrics.json" for folder in (checkpoint.parent, checkpoint.parent.parent)]
    found: dict[str, Any] = next((json.loads(file.read_text(encoding="utf-8")) for file in places if file.is_file()), {})
    rows = [f"| {meaning} | {found[key]:.4f} |" for key, meaning in FIGURES.items() if key in found]
    if not rows:
        return ["None: there was no metrics.json beside the checkpoint."]
    return [
        "The training's last epoch, on photos held back from it; intervals were not measured.",
        "",
        "| figure | value |",
        "| --- | --- |",
        *rows,
    ]


def _licence(name: str) -> list[str]:
    """What timm and conf/model say about the backbone called `name`."""
    import timm

    config = timm.get_pretrained_cfg(name)
    says = (config.license if config is not None else None) or "nothing"
    lines = [
        "The trained weights: nothing is granted here; whoever publishes them decides, within the backbone's licence and the "
        "rights in the photos.",
        "",
        f"The backbone, {name}: timm says {says}.",
    ]
    for file in sorted((CONF / "model").glob("*.yaml")):
        if compose("train", [f"model={file.stem}"]).model.name == name and (comment := _comment(file.stem)):
            lines += ["", f"`conf/model/{file.stem}.yaml` says:", "", *comment]
    return lines


def _comment(stem: str) -> list[str]:
    """The comment on a licence at the head of a file of conf/model, quoted, or of the file that it refers to."""
    text = (CONF / "model" / f"{stem}.yaml").read_text(encoding="utf-8")
    comment = [line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")]
    if "licen" not in " ".join(comment).lower():
        return []
    other = re.search(r"see (\w+)\.yaml", " ".join(comment))
    return [f"> {line}" for line in comment] + (_comment(other[1]) if other and other[1] != stem else [])
