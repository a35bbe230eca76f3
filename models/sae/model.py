"""The TopK sparse autoencoder: its configuration, its weights, and inference.

BatchTopK and Matryoshka SAEs are trained with the same weights; their inference is `models.sae.jumprelu`.

Shape suffixes: B tokens, D = d_in input width, M = d_sae features, k active features per token.

The model is SAELens' TopK SAE (Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3) with
decoder-norm rescaling. With n_j = ‖W_dec[j]‖ (n_j = 1 without rescaling):

    a_j = W_enc[j] · (x − b_dec) + b_enc[j]       support = the k largest a_j n_j
    h_j = relu(a_j n_j) on the support            x̂ = b_dec + Σ_j (h_j / n_j) W_dec[j]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

Schedule = Literal["constant", "wsd"]
Kind = Literal["topk", "batchtopk", "matryoshka"]

SCORE_BYTES = 32 * 2**20  # largest [rows, d_sae] block of scores that inference and the torch step hold at once
NORM_FLOOR = 1e-8  # SAELens' lower clamp of a decoder norm when norms are folded


KINDS: tuple[Kind, ...] = ("topk", "batchtopk", "matryoshka")


def matryoshka_widths(d_sae: int) -> tuple[int, ...]:
    """The nested widths that are used here: d_sae/16, /8, /4, /2 and d_sae (those of at least one feature)."""
    return tuple(sorted({d_sae // part for part in (16, 8, 4, 2, 1)} - {0}))


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Everything that decides the weights of one SAE, and nothing about where it runs.

    Defaults are those of SAELens 6.54 (`TopKTrainingSAEConfig`, `SAETrainerConfig`), so that the two agree.

    - `kind`: "topk" keeps k features of each token; "batchtopk" (Bussmann et al. 2024, arXiv:2412.06410) keeps the
      k·B largest positive activations of a batch of B tokens; "matryoshka" (Bussmann et al. 2025, arXiv:2503.17547)
      is batchtopk whose loss also counts the reconstruction by the first w features alone, for each w of
      `matryoshka_widths` (increasing, the last one d_sae).
    - `schedule`: "constant" (after `warmup_steps` of linear warm-up), or "wsd" (warm-up, stable, decay): a trunk at
      constant rate from which one linear decay of `decay_steps` branches off for each budget. Both make every
      smaller budget a prefix of the larger; a schedule that depends on the total length cannot be nested.
    - `aux_k`: dead features that take part in the auxiliary loss (None: d_in // 2, the heuristic of Gao et al.,
      appendix A.2, as in SAELens); `aux_coefficient` its weight (0 switches it off).
    - `dead_after_steps`: a feature is dead when it has not fired for more than this many steps.
    - `decoder_init_norm`: length of each decoder row at the start.

    Raises ValueError for any field out of range.
    """

    d_in: int
    d_sae: int
    k: int
    seed: int
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    aux_k: int | None = None
    aux_coefficient: float = 1.0
    dead_after_steps: int = 1000
    decoder_init_norm: float = 0.1
    rescale_acts_by_decoder_norm: bool = True
    apply_b_dec_to_input: bool = True
    kind: Kind = "topk"
    matryoshka_widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; choose {name} >= 1")
        if self.k > self.d_sae:
            raise ValueError(f"k={self.k} exceeds d_sae={self.d_sae}; choose k <= d_sae")
        self._check_kind()
        if self.schedule not in ("constant", "wsd"):
            raise ValueError(
                f"schedule={self.schedule!r} cannot be nested: its rate depends on the total budget; nested budgets "
                "need schedule='constant' or 'wsd'"
            )
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"decay_steps={self.decay_steps} does not fit schedule={self.schedule!r}; "
                "give decay_steps >= 1 with 'wsd' and 0 with 'constant'"
            )
        for name in ("warmup_steps", "decay_steps", "dead_after_steps", "aux_coefficient", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; choose {name} >= 0")
        for name in ("lr", "eps", "clip_norm", "decoder_init_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive; choose {name} > 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must be two numbers in [0, 1); Adam's usual are (0.9, 0.999)")
        if self.aux_k is not None and not 1 <= self.aux_k <= self.d_sae:
            raise ValueError(f"aux_k={self.aux_k} is outside 1..d_sae={self.d_sae}; leave it None for d_in // 2")

    def _check_kind(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; choose {', '.join(KINDS)}")
        widths = self.matryoshka_widths
        if self.kind != "matryoshka" and widths:
            raise ValueError(f"matryoshka_widths={widths} do not fit kind={self.kind!r}; leave them empty")
        nested = list(widths) == sorted(set(widths)) and widths[:1] > (0,) and widths[-1:] == (self.d_sae,)
        if self.kind == "matryoshka" and not nested:
            raise ValueError(
                f"matryoshka_widths={widths} must be positive, increase, and end with d_sae={self.d_sae}; "
                "matryoshka_widths(d_sae) gives the usual ones"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Features that each reconstruction in the loss uses, from the narrowest: d_sae alone unless nested."""
        return self.matryoshka_widths or (self.d_sae,)

    @property
    def n_aux(self) -> int:
        """Dead features that a token uses in the auxiliary loss, before the number of dead features limits it."""
        return self.aux_k if self.aux_k is not None else max(1, min(self.d_in // 2, self.d_sae))

    def branch_step(self, budget_steps: int) -> int:
        """Step of the trunk at which the run of `budget_steps` steps leaves it (the budget itself when constant).

        A constant-rate budget may end inside the warm-up: it is a prefix of the larger ones all the same.
        Raises ValueError when the budget is too short for warm-up and decay.
        """
        if self.schedule == "constant":
            return budget_steps
        step = budget_steps - self.decay_steps
        if step < self.warmup_steps:
            raise ValueError(
                f"budget of {budget_steps} steps is shorter than warmup_steps={self.warmup_steps} + "
                f"decay_steps={self.decay_steps}; choose a larger budget or shorter phases"
            )
        return step


class TopKSAE(nn.Module):
    """Weights of a TopK SAE (float32) and its exact inference.

    W_enc [d_sae, d_in] (stored like the decoder, transposed to SAELens), W_dec [d_sae, d_in], b_enc [d_sae],
    b_dec [d_in]. Built empty (zeros); `TopKSAE.from_config` gives the seeded initial weights.
    """

    def __init__(
        self,
        *,
        d_in: int,
        d_sae: int,
        k: int,
        rescale_acts_by_decoder_norm: bool = True,
        apply_b_dec_to_input: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if k > d_sae:
            raise ValueError(f"k={k} exceeds d_sae={d_sae}; choose k <= d_sae")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.norms_folded = False
        self.rescale_acts_by_decoder_norm = rescale_acts_by_decoder_norm
        self.apply_b_dec_to_input = apply_b_dec_to_input

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device), requires_grad=False)

        self.W_enc, self.W_dec = zeros(d_sae, d_in), zeros(d_sae, d_in)
        self.b_enc, self.b_dec = zeros(d_sae), zeros(d_in)

    @classmethod
    def from_config(cls, config: SAEConfig, device: torch.device | str = "cpu") -> TopKSAE:
        """Initial weights as SAELens makes them after `torch.manual_seed(config.seed)` on the CPU, bit for bit.

        Kaiming-uniform decoder rows scaled to length `decoder_init_norm`, encoder = decoder, zero biases. Drawn on
        the CPU from a generator of its own, so that they depend neither on the device nor on other SAEs.
        """
        sae = cls(
            d_in=config.d_in,
            d_sae=config.d_sae,
            k=config.k,
            rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm,
            apply_b_dec_to_input=config.apply_b_dec_to_input,
            device=device,
        )
        W_dec = torch.empty(config.d_sae, config.d_in)
        nn.init.kaiming_uniform_(W_dec, generator=torch.Generator().manual_seed(config.seed))
        W_dec /= W_dec.norm(dim=-1, keepdim=True)
        W_dec *= config.decoder_init_norm
        sae.W_dec.copy_(W_dec)
        sae.W_enc.copy_(W_dec)
        return sae

    def decoder_norms(self) -> torch.Tensor:
        """n [d_sae]: lengths of the decoder rows, or ones when activations are not rescaled."""
        if self.rescale_acts_by_decoder_norm:
            return self.W_dec.norm(dim=-1)
        return torch.ones_like(self.b_enc)

    def centred(self, x_BD: torch.Tensor) -> torch.Tensor:
        """What the encoder sees: x − b_dec, or x itself without `apply_b_dec_to_input`."""
        return x_BD - self.b_dec if self.apply_b_dec_to_input else x_BD

    def check_width(self, x_BD: torch.Tensor) -> None:
        """Raise ValueError when the activations x [..., D] are not this SAE's."""
        if x_BD.shape[-1] != self.d_in:
            raise ValueError(
                f"activations have width {x_BD.shape[-1]}, the SAE d_in={self.d_in}; check the hook's layer"
            )

    @torch.no_grad()
    def encode(self, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., d_in] -> feature indices (int64) and activations, both [..., k], k in no particular order.

        The activations are SAELens' (`h_j = relu(a_j n_j)`: the length of the feature's part in x̂). Rows are taken
        in chunks, so that no more than 32 MiB of scores exist at once. Raises ValueError on a wrong width.
        """
        self.check_width(x_BD)
        shape = (*x_BD.shape[:-1], self.k)
        xc = self.centred(x_BD.reshape(-1, self.d_in).to(self.W_enc.dtype))
        norm = self.decoder_norms()
        idx = torch.empty(len(xc), self.k, dtype=torch.int64, device=xc.device)
        h = torch.empty(len(xc), self.k, device=xc.device)
        for rows in row_chunks(len(xc), 4 * self.d_sae):
            scores = torch.addmm(self.b_enc, xc[rows], self.W_enc.T).mul_(norm)
            top = scores.topk(self.k, dim=-1, sorted=False)
            idx[rows] = top.indices
            h[rows] = top.values.relu_()
        return idx.view(shape), h.view(shape)

    @torch.no_grad()
    def decode(self, idx_Bk: torch.Tensor, h_Bk: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., d_in] of the activations h at the features idx (both [..., k])."""
        weights = (h_Bk / self.decoder_norms()[idx_Bk]).reshape(-1, idx_Bk.shape[-1])
        flat = idx_Bk.reshape(-1, idx_Bk.shape[-1])
        x_hat = F.embedding_bag(flat, self.W_dec, mode="sum", per_sample_weights=weights)
        return x_hat.add_(self.b_dec).view(*idx_Bk.shape[:-1], self.d_in)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """x̂ = decode(encode(x)), shape and device of x, float32."""
        return self.decode(*self.encode(x_BD))

    @torch.no_grad()
    def folded(self) -> TopKSAE:
        """The same function with unit decoder rows, the norms moved into the encoder (SAELens' inference form).

        An SAE that was folded already is returned as it is: rounding would change it again. Raises ValueError without
        rescaling: there the norms take part in the selection, and folding changes it.
        """
        if not self.rescale_acts_by_decoder_norm:
            raise ValueError("rescale_acts_by_decoder_norm=False: folding would change the selection; keep the norms")
        if self.norms_folded:
            return self
        sae = TopKSAE(**self.architecture(), device=self.W_enc.device)
        norm = self.W_dec.norm(dim=-1).clamp_(min=NORM_FLOOR)
        torch.mul(self.W_enc, norm[:, None], out=sae.W_enc)
        torch.div(self.W_dec, norm[:, None], out=sae.W_dec)
        torch.mul(self.b_enc, norm, out=sae.b_enc)
        sae.b_dec.copy_(self.b_dec)
        sae.norms_folded = True
        return sae

    def architecture(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this SAE without its weights."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "rescale_acts_by_decoder_norm": self.rescale_acts_by_decoder_norm,
            "apply_b_dec_to_input": self.apply_b_dec_to_input,
        }


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Slices that cover `rows` rows, each of at most SCORE_BYTES bytes (one row at least)."""
    size = max(1, SCORE_BYTES // bytes_per_row)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
