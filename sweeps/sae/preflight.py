"""What a launch checks before Ray starts: weights and shards are reachable and fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data.token_stream import PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.host.hub import LMUnavailable, require_hub, require_weights
from models.host.specs import HOST_LMS
from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.sae.lms import folder_of, hub_id_of, place_of, revision_of, spec_of
from sweeps.sae.sources import corrupt, longest_reads, open_stream, tokenizer_folder
from sweeps.sae.text import TextCheck

if TYPE_CHECKING:
    from sweeps.sae.cells import SAECell
_NEOX_VOCABULARY = 50304  # rows of Pythia's embeddings; the tokenizer has 50,277 ids


def preflight(cells: Sequence[SAECell], run: RunSettings) -> list[str]:
    """Warnings about weights and text, before anything starts.

    The training text of the largest budget is read once where it lies on this machine (`text.TextCheck`); from
    elsewhere each pack looks at what it reads.

    Raises UserError where weights or text are unreachable, do not fit, or are too short.
    """
    lines: list[str] = []
    vocabularies = {model: spec_of(model, run).d_vocab for model in sorted({c.model for c in cells})}
    try:
        for cell in {c.model: c for c in cells}.values():
            _require_model(cell, run)
        for model in sorted({c.model for c in cells if c.stream == "pile"}):
            _require_pile_ids(model, vocabularies[model], run.stream_path or PILE_HUB)
        wants_lm = any(c.model in HOST_LMS and hub_id_of(c.model, run) and not _cached(c.model) for c in cells)
        wants_text = not run.stream_path and any(c.stream == "pile" for c in cells)
        if wants_lm or wants_text:
            local = " ".join(["--set lm_path=DIR"] * wants_lm + ["--set stream_path=DIR"] * wants_text)
            require_hub(
                "use --preset local or --preset smollm2, which need no network, or give local copies with " + local
            )
        if run.stream_path:  # reads footers and held-out rows; on the hub that would be one request per shard
            for context, longest, n_eval in sorted(_needs(cells)):
                first = next(c for c in cells if c.stream == "pile" and c.context == context)
                readers = {c.model for c in cells if c.stream == "pile" and c.context == context}
                chosen = {m: vocabularies[m] for m in sorted(readers)}
                lines += _look_at(open_stream(first, run), longest, n_eval, first.shuffle_sequences, chosen)
        for longest_cell in longest_reads(cells):
            lines += _look_at_documents(longest_cell, run, vocabularies)
    except CorruptShard as error:
        raise corrupt(error) from error
    except (LMUnavailable, StreamUnavailable, ValueError) as error:
        raise UserError(str(error)) from error
    return lines


def _require_model(cell: SAECell, run: RunSettings) -> None:
    """Raise ValueError or LMUnavailable where a model cannot be read or has no such hook.

    Weights on this machine are looked at by their headers; they are loaded only where the architecture's hooks have to
    be looked for. Those of a model on the hub are not downloaded yet.
    """
    from models.host.host_lm import check_checkpoint, check_hook

    folder = folder_of(cell.model, run)
    named_itself = cell.model not in HOST_LMS and not hub_id_of(cell.model, run)
    if run.lm_path or named_itself or (cell.model in HOST_LMS and HOST_LMS[cell.model].origin == "file"):
        check_checkpoint(cell.model, folder or None)
        check_hook(cell.model, folder or None, place_of(cell))
    elif cell.model not in HOST_LMS:
        require_weights(cell.model, revision_of(cell.model, run))
    if cell.stream != "pile":
        tokenizer_folder(cell, run)


def _look_at(stream: TokenStream, longest: int, n_eval: int, block: int, vocabularies: Mapping[str, int]) -> list[str]:
    """Lines on a stream that is long enough and fits the models; its training text is read where that costs little."""
    stream.require(longest, n_eval)
    check = TextCheck(stream, stream.eval_sequences(n_eval), vocabularies)
    if stream.local:
        _read_once(stream, check, -(-longest // stream.context) + block)
    return [check.line()] * bool(check.line())


def _look_at_documents(cell: SAECell, run: RunSettings, vocabularies: Mapping[str, int]) -> list[str]:
    stream = open_stream(cell, run, say=lambda line: print(f"  {cell.model}: {line}", flush=True))
    return _look_at(
        stream, cell.tokens, cell.held_out_end, cell.shuffle_sequences, {cell.model: vocabularies[cell.model]}
    )


def _read_once(stream: TokenStream, check: TextCheck, sequences: int) -> None:
    """Show the first `sequences` training sequences to the check."""
    with stream.sequences(use_ray=False) as reader:
        for index, tokens_nT in reader:
            check.training(index, tokens_nT[: sequences - index])
            if index + len(tokens_nT) >= sequences:
                return


def _require_pile_ids(model: str, d_vocab: int, source: str) -> None:
    """Raise UserError where a model with another vocabulary than GPT-NeoX's would read the hub's Pile."""
    if source.startswith(PILE_HUB.removesuffix("/data")) and d_vocab != _NEOX_VOCABULARY:
        raise UserError(
            f"{source} holds GPT-NeoX ids but {model} has a vocabulary of {d_vocab:,}, not GPT-NeoX's "
            f"{_NEOX_VOCABULARY:,}; choose a Pythia model, or --set stream=embedded"
        )


def _needs(cells: Sequence[SAECell]) -> set[tuple[int, int, int]]:
    """(context, longest budget, evaluation sequences) of the cells on Parquet text."""
    piles = [c for c in cells if c.stream == "pile"]
    longest = {c.context: max(x.tokens for x in piles if x.context == c.context) for c in piles}
    return {(c.context, longest[c.context], c.held_out_end) for c in piles}


def _cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    hub_id = HOST_LMS[model].hub_id
    assert hub_id is not None
    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
