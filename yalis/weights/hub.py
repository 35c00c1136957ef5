"""From what the user calls a model to a local folder."""

from __future__ import annotations

import re
from pathlib import Path

from yalis.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Weights in other formats (.bin, .pth, .gguf) are often beside the safetensors and as large.
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
# The same weights once more under other names (Mistral's own format), and whatever is in subfolders.
_IGNORED = ["consolidated*.safetensors", "*/*"]


def resolve_model_path(model: str, revision: str | None = None) -> Path:
    """Local folder of ``model``: a folder, or else a hub id, fetched through huggingface_hub into its cache.

    Args:
        model: folder or hub id.
        revision: branch, tag or commit of a hub id; default the newest.

    Raises:
        CheckpointError: a folder with a revision; neither a folder nor a model that the hub (or its cache) gives: says
            what was tried.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"revision={revision}: {model} is a folder, which has none; leave it out")
        return folder
    if folder.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and the safetensors files")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"no folder {model}, and it is not a hub id (owner/name) either; check the path")
    # Slow to import, and not needed for local folders.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED))
    except Exception as error:  # The hub client raises errors of several libraries; all of them mean "not there".
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"no folder {folder.absolute()}, and the hub did not give {model!r} ({type(error).__name__}: {reason}); "
            "check the spelling, the network and the access rights (HF_TOKEN), or download it elsewhere and give the "
            "folder"
        ) from error
