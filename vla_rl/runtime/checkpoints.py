"""Checkpoints are folders with a manifest of content hashes; safetensors and YAML, never pickle.

A folder is written aside and renamed, so it is whole or absent; on reading, every file is checked against the manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import disk_errors, read_json, sha256_file, sha256_text, write_directory, write_json

MANIFEST = "manifest.json"


def save_folder(
    path: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint folder that does not exist yet.

    Args:
        path: the folder.
        tensors: by file name (without suffix), the tensors of a safetensors file.
        texts: by file name, text files.
        meta: plain data kept in the manifest.
        files: by file name, other files.
    """

    def fill(folder: Path) -> None:
        for name, content in tensors.items():
            whole = {k: v.detach().cpu().contiguous().clone() for k, v in content.items()}
            try:
                safetensors.torch.save_file(whole, folder / f"{name}.safetensors")
            except safetensors.SafetensorError as error:  # it wraps the OSError of a full disk
                with disk_errors(path):
                    raise _as_os_error(error) from error
        for name, text in texts.items():
            (folder / name).write_text(text)
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        hashes = {p.name: sha256_file(p) for p in sorted(folder.iterdir())}
        listed = {"files": hashes, "meta": dict(meta)}
        write_json(folder / MANIFEST, {**listed, "sha256": _digest(listed)})

    write_directory(path, fill)


def _digest(content: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(content, sort_keys=True))


def _as_os_error(error: safetensors.SafetensorError) -> OSError:
    import errno
    import re

    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code.group(1)) if code else errno.EIO, str(error))


def verify_folder(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest's meta.

    Raises:
        UserError: no checkpoint there, a file is missing, cut short or changed.
    """
    if not (path / MANIFEST).exists():
        raise UserError(f"no checkpoint in {str(path)!r} ({MANIFEST} is missing)")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict):
        raise UserError(f"checkpoint {path} is damaged: its {MANIFEST} holds no table")
    content = {key: manifest.get(key) for key in ("files", "meta")}
    if manifest.keys() != {"files", "meta", "sha256"} or manifest["sha256"] != _digest(content):
        raise UserError(f"checkpoint {path} is damaged: its {MANIFEST} is not what was written")
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.exists():
            raise UserError(f"checkpoint {path} is damaged: {name} is missing")
        if sha256_file(file) != digest:
            raise UserError(
                f"checkpoint {path} is damaged: {name} is not what was written (its hash differs); restore it or train again"
            )
    return manifest["meta"]


def load_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read one safetensors file of a verified checkpoint folder."""
    return safetensors.torch.load_file(path / f"{name}.safetensors")


def folder_digest(path: Path) -> str:
    """The content hash by which other artefacts refer to a checkpoint."""
    verify_folder(path)
    return sha256_file(path / MANIFEST)


def keep_newest(root: Path, count: int) -> None:
    """Remove all but the newest ``count`` of the checkpoints ``step-00000100`` in a folder, and leftovers of kills."""
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    for old in sorted(root.glob("step-*"))[:-count]:
        shutil.rmtree(old)


def newest(root: Path) -> Path | None:
    """The newest checkpoint in a folder, if any."""
    found = sorted(p for p in root.glob("step-*") if p.suffix != ".tmp")
    return found[-1] if found else None


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a state whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
