"""Stand-ins for a language model: two small byte-level GPT-NeoX models, pretrained on first use (about a minute each).

They make the sweep runnable on a machine with no network and no GPU. They are real trained transformers (far
below the bigram entropy of their corpus), not models whose numbers mean anything for published ones.

Shape suffixes: B sequences, T tokens, N tokens in a row, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.cpu.bfloat16 import Products
from models.cpu.threads import torch_threads
from models.host.cache import cache_root, cached_directory
from models.host.specs import HOST_LMS

Tokens = Callable[[], tuple[np.ndarray, np.ndarray]]
SEPARATOR = 256
_PROBE_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stand-in is pretrained; part of its cache key, so a changed recipe never reads an old checkpoint."""

    phases: tuple[tuple[int, int, int], ...]
    """(steps, batch, context) one after another: many short windows first, the sweep's context last."""
    lr: float = 1e-2
    warmup: int = 20
    decay: float = 0.6  # the last share of the steps, linear to zero
    bigram_steps: int = 300
    seed: int = 0
    version: int = 1

    @property
    def steps(self) -> int:
        return sum(steps for steps, _, _ in self.phases)

    @property
    def tokens(self) -> int:
        return sum(steps * batch * context for steps, batch, context in self.phases)


RECIPES = {
    "standin-small": Recipe(phases=((300, 8, 64), (60, 4, 256))),
    "standin-large": Recipe(phases=((360, 8, 64), (60, 4, 256))),
}


def pretrained(
    name: str,
    corpus_fingerprint: str,
    tokens: Tokens,
    *,
    cache_dir: str | Path | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Directory (Hugging Face format) of the stand-in ``name``, pretrained on ``tokens()`` when not cached.

    The directory also holds ``training.json``: the recipe, held-out cross-entropy and the corpus' unigram and
    bigram cross-entropies in nats/byte. One thread and fixed seeds: the same machine makes the same weights.
    """
    if name not in RECIPES:
        raise ValueError(f"stand-in {name} is unknown; choose one of {', '.join(RECIPES)}")
    recipe = recipe or RECIPES[name]
    key = _key(name, corpus_fingerprint, recipe)

    def build(target: Path) -> None:
        train_N, heldout_N = tokens()
        model, summary = train(name, train_N, heldout_N, recipe, progress or _print_progress)
        _save(model, target)
        (target / "training.json").write_text(
            json.dumps({"recipe": asdict(recipe), **summary}, indent=1), encoding="utf-8"
        )

    return cached_directory(cache_root(cache_dir), key, build)


def _key(name: str, corpus_fingerprint: str, recipe: Recipe) -> str:
    identity = json.dumps([name, corpus_fingerprint, asdict(recipe)], sort_keys=True)
    return f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def pretraining_seconds(name: str, corpus_fingerprint: str, *, cache_dir: str | Path | None = None) -> float:
    """CPU-seconds that pretraining ``name`` takes here, from a few steps on random bytes; 0 where it is cached."""
    recipe = RECIPES[name]
    if (cache_root(cache_dir) / _key(name, corpus_fingerprint, recipe)).is_dir():
        return 0.0
    with torch_threads(1), torch.random.fork_rng(devices=[]):
        model = build_model(name)
        random_N = torch.randint(SEPARATOR, (10_000,))

        def blocks(steps: int, batch: int, context: int) -> float:
            few = replace(recipe, phases=((steps, batch, context),))
            return _cpu_seconds(lambda: _fit_blocks(name, model, random_N, few, lambda _: None))

        def bigram(steps: int) -> float:
            return _cpu_seconds(lambda: _fit_bigram(model, random_N, steps))

        bigram(1), blocks(1, *recipe.phases[0][1:])
        total = recipe.bigram_steps * bigram(_PROBE_STEPS) / _PROBE_STEPS
        for steps, batch, context in recipe.phases:
            total += steps * blocks(_PROBE_STEPS, batch, context) / _PROBE_STEPS
        return total


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _save(model: Any, target: Path) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(target)


def train(
    name: str, train_N: np.ndarray, heldout_N: np.ndarray, recipe: Recipe, progress: Callable[[str], None]
) -> tuple[Any, dict[str, float]]:
    """Pretrain ``name`` from scratch; returns the float32 model and its summary (cross-entropies, tokens/s).

    Embedding and head start at the optimum of the bigram model (LayerNorm of the embedding into the head), so that
    every step goes into the blocks; Muon moves their matrices and AdamW the rest.
    """
    with torch_threads(1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = build_model(name)
            train = torch.from_numpy(train_N.astype(np.int64))
            _fit_bigram(model, train, recipe.bigram_steps)
            rate = _fit_blocks(name, model, train, recipe, progress)
        heldout = torch.from_numpy(heldout_N.astype(np.int64))
        unigram, bigram = ngram_cross_entropies(train, heldout, HOST_LMS[name].d_vocab)
        summary = {
            "heldout_ce": evaluate(model, heldout, recipe.phases[-1][2]),
            "heldout_unigram_ce": unigram,
            "heldout_bigram_ce": bigram,
            "tokens": recipe.tokens,
            "tokens_per_second": rate,
        }
        progress(
            f"{name}: held-out {summary['heldout_ce']:.3f} nats/byte "
            f"(bigram {bigram:.3f}, unigram {unigram:.3f}), {rate:,.0f} tokens/s"
        )
        return model.eval(), summary


def build_model(name: str) -> Any:
    """A freshly initialised GPT-NeoX of the sizes of ``name``."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    spec = HOST_LMS[name]
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=spec.d_vocab,
            hidden_size=spec.d_model,
            num_hidden_layers=spec.n_layers,
            num_attention_heads=spec.n_heads,
            intermediate_size=spec.d_mlp,
            max_position_embeddings=2048,
            bos_token_id=SEPARATOR,
            eos_token_id=SEPARATOR,
        )
    )


def _fit_bigram(model: Any, train_N: Tensor, steps: int) -> None:
    embedding, head = model.gpt_neox.embed_in.weight, model.lm_head.weight
    V = len(embedding)
    counts_VV = torch.bincount(train_N[:-1] * V + train_N[1:], minlength=V * V).view(V, V)
    joint_VV = counts_VV / counts_VV.sum()
    optimizer = torch.optim.Adam([embedding, head], lr=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        logits_VV = model.gpt_neox.final_layer_norm(embedding) @ head.T
        loss = -(joint_VV * logits_VV.log_softmax(-1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()


def _fit_blocks(name: str, model: Any, train_N: Tensor, recipe: Recipe, progress: Callable[[str], None]) -> float:
    named = list(model.named_parameters())
    matrices = [p for key, p in named if p.ndim == 2 and ".layers." in key]
    rest = [p for key, p in named if not (p.ndim == 2 and ".layers." in key)]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    started = reported = time.monotonic()
    done = 0
    for step, x_BT in enumerate(_batches(train_N, recipe)):
        left = (recipe.steps - step) / (recipe.decay * recipe.steps)
        scale = min(1.0, (step + 1) / recipe.warmup, left)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = recipe.lr * scale
        loss = _cross_entropy(model, x_BT).mean()
        loss.backward()
        with Products():  # Muon's bfloat16 takes 95% of a step where the processor has no instructions for it
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        done += x_BT.numel()
        now = time.monotonic()
        if now - reported > 5.0:
            reported = now
            rate = done / (now - started)
            progress(
                f"{name}: pretraining step {step + 1}/{recipe.steps}, loss {loss.item():.3f}, "
                f"{rate:,.0f} tokens/s, ETA {(recipe.tokens - done) / rate:.0f} s"
            )
    return recipe.tokens / (time.monotonic() - started)


def _batches(train_N: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(recipe.seed)
    for steps, batch, context in recipe.phases:
        offsets_T = torch.arange(context)
        for _ in range(steps):
            starts_B = torch.randint(len(train_N) - context, (batch,), generator=generator)
            yield train_N[starts_B[:, None] + offsets_T]


def _cross_entropy(model: Any, x_BT: Tensor) -> Tensor:
    logits_BTV = model(x_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), x_BT[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def evaluate(model: Any, heldout_N: Tensor, context: int, *, n_sequences: int = 128) -> float:
    """Mean next-token cross-entropy in nats over ``n_sequences`` windows spread evenly over ``heldout_N``."""
    rows_ST = heldout_N[: len(heldout_N) // context * context].view(-1, context)
    picked_ST = rows_ST[torch.linspace(0, len(rows_ST) - 1, min(n_sequences, len(rows_ST))).long()]
    return torch.cat([_cross_entropy(model, chunk) for chunk in picked_ST.split(16)]).mean().item()


def ngram_cross_entropies(train_N: Tensor, heldout_N: Tensor, d_vocab: int) -> tuple[float, float]:
    """Held-out cross-entropy (nats/token) of unigram and bigram models counted on ``train_N``, add-0.1."""
    V = d_vocab
    unigram_V = torch.bincount(train_N, minlength=V).double() + 0.1
    bigram_VV = torch.bincount(train_N[:-1] * V + train_N[1:], minlength=V * V).view(V, V).double() + 0.1
    unigram = -(unigram_V / unigram_V.sum()).log()[heldout_N].mean().item()
    bigram = -(bigram_VV / bigram_VV.sum(1, keepdim=True)).log()[heldout_N[:-1], heldout_N[1:]].mean().item()
    return unigram, bigram


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
