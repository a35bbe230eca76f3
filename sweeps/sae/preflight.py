"""What a launch checks before Ray starts: weights and shards are reachable and fit each other."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.token_stream import PILE_HUB, CorruptShard, StreamUnavailable, TokenStream
from models.host.specs import HOST_LMS
from sweeps.core.cells import UserError
from sweeps.core.settings import RunSettings
from sweeps.sae.origin import HUB_SECONDS
from sweeps.sae.sources import corrupt, open_stream
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
    from models.host.host_lm import LMUnavailable, check_checkpoint, host_lm_spec

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
        if run.stream_path:  # reads footers and held-out rows; on the hub that would be one request per shard
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
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; if it refuses a file, loading that file reports it
    except OSError as error:
        local = " ".join(["--set lm_path=DIR"] * wants_lm + ["--set stream_path=DIR"] * wants_text)
        raise UserError(
            f"the Hugging Face hub ({constants.ENDPOINT}) cannot be reached ({error}); use --preset local or --preset "
            f"smollm2, which need no network, or give local copies with {local}"
        ) from error
