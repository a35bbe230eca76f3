"""The proxy gap at tiny size: local copies in place of the hub's, with random weights and tokens, and a grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.host.specs import HOST_LMS

MODEL = "standin-small"


def settings(**values: object) -> list[str]:
    """`--set` arguments."""
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


def tiny_grid(lms: Path, shards: Path, **changes: object) -> list[str]:
    """Two SAEs with two nested budgets on a random stand-in and random bytes: seconds of work."""
    grid: dict[str, object] = {
        "models": MODEL,
        "lm_path": lms,
        "stream": "pile",
        "stream_path": shards,
        "depths": "mid",
        "k": "4,8",
        "seeds": 0,
        "tokens": "65536,196608",
        "context": 64,
        "expansion": 2,
        "batch_tokens": 256,
        "shuffle_sequences": 16,
        "warmup_steps": 10,
        "eval_sequences": 8,
        "threads": 1,
    }
    return ["--preset", "local", *settings(**grid | changes)]


def save_lm(folder: Path, name: str) -> Path:
    """Random weights of a model's architecture, in Hugging Face format, under `folder`/`name`; returns `folder`."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    spec = HOST_LMS[name]
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=spec.d_model,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        intermediate_size=spec.d_mlp,
        vocab_size=spec.d_vocab,
        max_position_embeddings=2048,
        rotary_pct=0.25,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder / name)
    return folder


def save_shards(folder: Path, *, shards: int, rows: int, length: int, vocab: int) -> Path:
    """Parquet shards of the hub data set's schema, of six row groups each, with random tokens; returns `folder`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(shards):
        tokens = list(rng.integers(0, vocab, (rows, length), dtype=np.int32))
        table = pa.table({"tokens": pa.array(tokens, pa.list_(pa.int32()))})
        pq.write_table(table, folder / f"train-{i:05d}-of-{shards:05d}.parquet", row_group_size=max(1, rows // 6))
    return folder
