"""The command `beauty-bafe`, and `python -m beauty_bafe`."""

from __future__ import annotations

import difflib
import runpy
import sys

from . import __version__

COMMANDS = {
    "train": "train an extractor on catalogue photos, as train.py does",
    "retrieve": "answer queries from a gallery, as retrieve.py does",
    "verifier": "train a network that compares aligned pictures",
    "cache": "list or remove files that earlier commands have cached",
    "export": "write a checkpoint as safetensors and ONNX, with a model card",
    "cutout": "cut products out of pictures, as PNG files",
    "shards": "pack photos into a few large files, to train from (data=shards)",
    "serve": "answer searches over HTTP from a saved Retriever, with a page to try it",
}


def main() -> None:
    """Run the command named by the first argument with the others as its overrides. Exits if it is unknown."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:10}{what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: beauty-bafe COMMAND [override ...]", *lines, "beauty-bafe COMMAND --help lists its settings"]))
        return
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"error: '{name}' is not a command; type beauty-bafe {' or '.join(COMMANDS)}{hint}")
    sys.argv = [sys.argv[0], *words]
    # Like `python -m`, so that the processes of training on several GPUs are started by the same command.
    runpy.run_module(f"beauty_bafe.commands.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
