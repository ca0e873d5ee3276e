"""The model card of an exported network: use, data and recipe, figures, licence, limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CONF, compose

FIGURES = {  # of metrics.json
    "val/mAP@7": "mAP@7, street views of held-out photos against the catalogue",
    "val/iou": "mask IoU",
    "val/f_beta": "mask F-beta",
    "val/mae": "mask mean absolute error",
}


def read_answers(folder: Path) -> dict[str, Any]:
    """The figures that retrieve.py wrote to `folder` with truth=FILE. Raises ValueError if there are none."""
    try:
        found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"answers='{folder}': {error}; type a folder that retrieve.py wrote with truth=FILE") from error
    if not any(f"{key}_interval" in found for key in found):
        raise ValueError(f"answers='{folder}' was written without truth=FILE; type retrieve.py again with it")
    return found


def write_card(
    file: Path,
    content: Mapping[str, Any],
    checkpoint: Path,
    files: Mapping[str, Any],
    drawn: bool,
    answers: Mapping[str, Any] | None = None,
) -> None:
    """Write the card of a checkpoint's `content` (see `read_checkpoint`), read from `checkpoint`.

    `files`: what `export` returned about each ONNX file. `drawn`: whether they were compared on drawn pictures.
    `answers`: the figures of `read_answers`.
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
        "Computes a descriptor of the product in a picture and a mask of where it is. Exported by `beauty-bafe export`.",
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
        "| file | S | input | lowest cosine | largest mask difference | pictures |",
        "| --- | --- | --- | --- | --- | --- |",
        *agreement,
        "",
        *(
            [
                "`query.onnx` first finds the product, then describes a view of it, see `conf/query`.",
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
        *([] if answers is None else _measured(answers)),
        "",
        "## Licence",
        "",
        *_licence(model["name"]),
        "",
        "## Limits",
        "",
        "* Learned from catalogue photos with pasted backgrounds; photographs differ. Measure on your own before use.",
        "* Made for one product per picture; of several it may describe any, or all.",
        "* Scores rank answers; they are not probabilities.",
        "* Runs in bfloat16 or compiled give slightly different descriptors: do not mix them with these in one index.",
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(content: Mapping[str, Any]) -> list[str]:
    """The settings of the training, as a list; a checkpoint does not store which pictures it used."""
    run, rest = content.get("run", {}), content["hyper_parameters"]
    rows = {"objective": content.get("objective"), "epochs": content.get("epoch", -1) + 1 or None}
    rows |= {key: value for key, value in rest.items() if key != "model"} | run
    rows |= {f"retrieval.{key}": value for key, value in (content.get("retrieval") or {}).items()}
    kept = [f"* {key}: `{json.dumps(value)}`" for key, value in rows.items() if value not in (None, {}, [])]
    return [
        "The checkpoint does not store which photos it was trained on: add them here. It was trained with these settings, "
        "which `conf/objective` and `conf/train.yaml` explain:",
        "",
        *kept,
    ]


def _figures(checkpoint: Path) -> list[str]:
    """The figures of metrics.json beside the checkpoint or in the folder of its run."""
    places = [folder / "metrics.json" for folder in (checkpoint.parent, checkpoint.parent.parent)]
    found: dict[str, Any] = next((json.loads(file.read_text(encoding="utf-8")) for file in places if file.is_file()), {})
    rows = [f"| {meaning} | {found[key]:.4f} |" for key, meaning in FIGURES.items() if key in found]
    if not rows:
        return ["None: there was no metrics.json beside the checkpoint."]
    return [
        "After the last epoch, on photos held out from training; without intervals.",
        "",
        "| figure | value |",
        "| --- | --- |",
        *rows,
    ]


def _measured(answers: Mapping[str, Any]) -> list[str]:
    """The figures of a retrieval run that have an interval."""
    rows = {key: answers[f"{key}_interval"] for key in answers if answers.get(f"{key}_interval") is not None}
    return [
        "",
        f"Measured by retrieve.py on {answers['queries']} queries with known answers; intervals by bootstrap over queries:",
        "",
        "| figure | value | 95 % interval |",
        "| --- | --- | --- |",
        *(f"| {key} | {answers[key]:.4f} | {low:.4f} – {high:.4f} |" for key, (low, high) in rows.items()),
    ]


def _licence(name: str) -> list[str]:
    """The licence information of timm and conf/model about the backbone `name`."""
    import timm

    config = timm.get_pretrained_cfg(name)
    says = (config.license if config is not None else None) or "no licence is given"
    lines = [
        "The trained weights: not specified here; their publisher decides, within the licence of the backbone and the rights "
        "in the photos.",
        "",
        f"The backbone, {name}: {says}, according to timm.",
    ]
    for file in sorted((CONF / "model").glob("*.yaml")):
        if compose("train", [f"model={file.stem}"]).model.name == name and (comment := _comment(file.stem)):
            lines += ["", f"`conf/model/{file.stem}.yaml` says:", "", *comment]
    return lines


def _comment(stem: str) -> list[str]:
    """The comment about the licence at the top of a file of conf/model, quoted, with that of a file that it refers to."""
    text = (CONF / "model" / f"{stem}.yaml").read_text(encoding="utf-8")
    comment = [line.removeprefix("# ") for line in text.splitlines()[1:] if line.startswith("# ")]
    if "licen" not in " ".join(comment).lower():
        return []
    other = re.search(r"see (\w+)\.yaml", " ".join(comment))
    return [f"> {line}" for line in comment] + (_comment(other[1]) if other and other[1] != stem else [])
