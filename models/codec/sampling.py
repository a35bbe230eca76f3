"""Sampling from a codec language model: stateful decoding along the delay pattern.

Shapes: B batch, K codebooks, V vocabulary, T frames, L = T + K - 1 delayed steps, N samples per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.codec.decoding import Backend, Step, decoding, decoding_backend
from models.codec.delay import delay, undelay
from models.codec.loss import check_tokens
from models.codec.model import CodecLM, CodecLMConfig
from models.codec.text import Texts


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from its logits, in this order, and how many samples are drawn for each one kept.

    repetition_penalty: logits of tokens seen before in the same codebook are divided by it when positive and
    multiplied when negative (Keskar et al. 2019, CTRL, arXiv 1909.05858); 1 is off. temperature: divides the logits;
    0 takes the likeliest token. top_k: keeps the k likeliest. top_p: keeps the smallest set of likeliest tokens whose
    probability reaches p (Holtzman et al. 2020, arXiv 1904.09751).

    best_of: samples drawn for each one kept, by log_probability. Likelihood favours repetitive audio.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    best_of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}; choose a finite temperature >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps no token; choose top_k >= 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is outside (0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}; choose > 0, 1 for none")
        if self.best_of < 1:
            raise ValueError(f"best_of={self.best_of}; choose best_of >= 1")


def filtered_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits [..., V] whose softmax is the distribution to draw from; -inf where a token is excluded.

    seen: boolean [..., V], the tokens that the repetition penalty applies to.
    """
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        before = probability.cumsum(-1) - probability
        logits = torch.full_like(logits, -torch.inf).scatter(
            -1, index, ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        )
    return logits


def draw(probability: Tensor, generator: torch.Generator) -> Tensor:
    """One index [...] of each distribution [..., V], by inversion: the first whose cumulated share exceeds a number.

    One random number per distribution; `torch.multinomial` draws one per token, a tenth of a step's time on a CPU. An
    index of probability 0 is never drawn.
    """
    cumulated = probability.double().cumsum(-1)
    shape = (*probability.shape[:-1], 1)
    uniform = torch.rand(shape, dtype=torch.float64, device=probability.device, generator=generator)
    # the product may round up to the last sum, after which there is no index
    below = uniform * (1 - torch.finfo(torch.float64).eps) * cumulated[..., -1:]
    return torch.searchsorted(cumulated, below, right=True).squeeze(-1)


@dataclass(frozen=True)
class Generation:
    """Samples, prompt included.

    codes: [B, K, T] codes below codebook_size. log_probability: [B] mean over the drawn tokens of log p at temperature
    1 without filters, nats. When the best of N was kept, codes are the kept ones. backend: what took the steps.
    """

    codes: Tensor
    log_probability: Tensor
    backend: Literal["numba", "torch"]


def generate(
    model: CodecLM,
    n_frames: int,
    *,
    prompt: Tensor | None = None,
    batch: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
    backend: Backend = "auto",
    texts: Texts | None = None,
) -> Generation:
    """Continue prompts, or start from nothing, by `n_frames` frames; special tokens are never drawn.

    Every step reads one column with a recurrent state and a key/value cache; nothing is read twice.

    Args:
        model: in the mode (eval, device, autocast) of the caller's choice.
        n_frames: new frames, at least 1.
        prompt: [B, K, T0] codes below codebook_size, or None for `batch` samples from nothing.
        batch: number of samples without a prompt.
        sampling: how tokens are drawn, and samples kept; temperature 1 without filters when None.
        seed: of the random draws; the same seed, model, device and backend give the same samples.
        backend: "numba" takes the steps in compiled kernels, for float32 models on a CPU; "torch" with the model's own
            operations, anywhere; "auto" is numba where it can be. Both compute the same function; in an autocast
            region both round the weights, but only torch the activations.
        texts: one per kept sample, for a model with text conditioning; None: samples without a text.

    Raises:
        ValueError: a prompt longer than the context or too long for it with the new frames, a code outside the
            codebook, a wrong number of codebooks or texts, counts below 1, texts for a model without a text encoder,
            or a backend that cannot serve this model.
    """
    for name, value in (("n_frames", n_frames), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}; choose {name} >= 1")
    prompt = _checked_prompt(model.config, prompt, batch, n_frames)
    sampling = sampling or Sampling()
    device, best_of = model.heads.device, sampling.best_of
    prompt = prompt.to(device).long().repeat_interleave(best_of, 0)
    texts = None if texts is None else texts.to(device).repeated(best_of)
    decoder = _Decoder(model.config, prompt, n_frames, sampling, seed)
    taken_by = decoding_backend(model, backend)
    reading = decoding(model, decoder.known(), decoder.columns, taken_by, texts)
    with torch.inference_mode(), reading as (logits, step):
        codes, score = decoder.run(logits, step)
    if best_of > 1:
        codes, score = _best(codes, score, best_of)
    return Generation(codes, score, taken_by)


def _checked_prompt(config: CodecLMConfig, prompt: Tensor | None, batch: int, n_frames: int) -> Tensor:
    """The prompt, or an empty one for each sample: [B, K, T0]."""
    K = config.n_codebooks
    if prompt is None:
        prompt = torch.zeros(batch, K, 0, dtype=torch.long)
    if prompt.dim() != 3 or prompt.shape[1] != K:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, expected [B, K, T] with K={K} codebooks")
    check_tokens(prompt, config.codebook_size, force=True)
    given = prompt.shape[-1]
    if given + n_frames > config.max_frames:
        raise ValueError(
            f"prompt of {given} frames plus {n_frames} new ones exceed the context of {config.context} steps, which "
            f"holds {config.max_frames} frames; choose a prompt and n_frames of at most {config.max_frames} together"
        )
    return prompt


def _best(codes: Tensor, score: Tensor, best_of: int) -> tuple[Tensor, Tensor]:
    """The likeliest of each `best_of` samples in a row, and its score."""
    best = score.unflatten(0, (-1, best_of)).argmax(1)
    rows = torch.arange(len(best), device=score.device) * best_of + best
    return codes[rows], score[rows]


class _Decoder:
    """One batch of samples in the making, on the delayed grid [B, K, L]."""

    def __init__(self, config: CodecLMConfig, prompt_BKT: Tensor, n_frames: int, sampling: Sampling, seed: int) -> None:
        self.config, self.sampling = config, sampling
        B, K, self.given = prompt_BKT.shape
        self.n_frames = self.given + n_frames
        device = prompt_BKT.device
        self.generator = torch.Generator(device).manual_seed(seed)
        frames = torch.cat([prompt_BKT, prompt_BKT.new_zeros(B, K, n_frames)], -1)
        self.grid = delay(frames, pad=self.config.pad)
        self.log_probability = torch.zeros(B, dtype=torch.float64, device=device)
        self.drawn = torch.zeros((), device=device)
        self.codebooks = torch.arange(K, device=device)
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(B, K, self.config.vocabulary, dtype=torch.bool, device=device)
            self.seen.scatter_(2, prompt_BKT, True)
        self.special_V = torch.arange(self.config.vocabulary, device=device) >= self.config.codebook_size

    @property
    def columns(self) -> int:
        """Delayed steps in all."""
        return self.grid.shape[-1]

    def known(self) -> Tensor:
        """[B, K, 1 + given] columns to read before the first draw."""
        first = torch.full_like(self.grid[..., :1], self.config.bos)
        return torch.cat([first, self.grid[..., : self.given]], -1)

    def run(self, logits: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Draw column after column, beginning with the logits [B, K, V] after the known ones."""
        for column in range(self.given, self.columns):
            self._draw(logits, column)
            if column + 1 < self.columns:
                logits = step(self.grid[..., column])
        return undelay(self.grid), self.log_probability / self.drawn

    def _draw(self, logits_BKV: Tensor, column: int) -> None:
        """Fill a column: codebook k holds frame column - k; frames of the prompt and outside the clip stay."""
        frame_K = column - self.codebooks
        new_K = (frame_K >= self.given) & (frame_K < self.n_frames)
        logits = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32))
        log_p = logits.log_softmax(-1)
        allowed = filtered_logits(logits.masked_fill(self.special_V, -torch.inf), self.sampling, self.seen)
        drawn = draw(allowed.softmax(-1), self.generator)
        self.log_probability += (log_p.gather(-1, drawn[..., None])[..., 0] * new_K).double().sum(1)
        self.drawn += new_K.sum()
        if self.seen is not None:
            self.seen.scatter_(2, drawn[..., None], new_K[:, None] | self.seen.gather(2, drawn[..., None]))
        self.grid[..., column] = torch.where(new_K, drawn, self.grid[..., column])
