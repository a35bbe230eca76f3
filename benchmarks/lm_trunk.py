"""The trunk of a language model against the matrix products that it cannot do without.

Random weights of Qwen2.5-0.5B's block (d 896, 14 heads on 2, MLP 4864), four of them, run up to their deepest hook as
the sweep runs them: forward hooks on the block list, norms, rotary embedding, attention and activation included. The
baseline is the bare products of the same activations with the same weights. CPU-seconds, paired: a ratio of 0.8 means
that the trunk reaches 80% of the rate of the products.

    python benchmarks/lm_trunk.py [--tokens 2048] [--repeats 5] [--threads 1] [--quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks._paired import machine, markdown_table, paired, timed, write_report
from models.cpu.bfloat16 import multiplies_bfloat16

CONTEXT, BLOCKS, TARGET = 256, 4, 0.8
SIZES: dict[str, Any] = {
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
}


def arms(tokens: int, dtype: torch.dtype, blocks: int) -> dict[str, Callable[[], object]]:
    """{"trunk": activations at the deepest hook, "products": the same matrix products alone}."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from models.host.host_lm import HookPlace, HostLM
    from models.host.layout import find_layout
    from models.host.specs import HostLMSpec, depths_of

    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, vocab_size=1024, num_hidden_layers=blocks)
    model = Qwen2ForCausalLM(config).eval()
    layout = find_layout(model, blocks, SIZES["hidden_size"])
    spec = HostLMSpec(
        origin="directory",
        architecture="qwen2",
        d_model=SIZES["hidden_size"],
        n_layers=blocks,
        n_heads=SIZES["num_attention_heads"],
        d_mlp=SIZES["intermediate_size"],
        d_vocab=1024,
        depths=depths_of(blocks),
    )
    lm = HostLM("qwen2", model.to(dtype), spec, None, HookPlace(), layout)
    ids_BT = torch.randint(0, 1024, (tokens // CONTEXT, CONTEXT))
    weights = [p for p in layout.block_list(model).parameters() if p.ndim == 2]
    inputs = {p.shape[1]: torch.randn(tokens // CONTEXT * CONTEXT, p.shape[1], dtype=dtype) for p in weights}

    def products() -> None:
        for weight_FD in weights:
            torch.nn.functional.linear(inputs[weight_FD.shape[1]], weight_FD)

    return {"trunk": lambda: lm.activations(ids_BT, [blocks - 1]), "products": torch.no_grad()(products)}


def report(tokens: int, repeats: int, threads: int, blocks: int, with_target: bool) -> str:
    torch.set_num_threads(threads)
    dtypes = [torch.float32, *[torch.bfloat16] * multiplies_bfloat16(torch.device("cpu"))]  # elsewhere it is emulated
    results = {}
    for dtype in dtypes:
        case = f"{tokens:,} tokens, {str(dtype).removeprefix('torch.')}"
        made = {name: timed(work) for name, work in arms(tokens, dtype, blocks).items()}
        results[case] = paired(made, baseline="products", repeats=repeats)
    targets = {(case, "trunk"): TARGET for case in results} if with_target else {}
    return f"{machine()}\n\n{markdown_table(results, baseline='products', targets=targets)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small, one round, to see that it runs; no target")
    parser.add_argument("--out", help="also write the Markdown there")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.repeats = 256, 1
    write_report(report(args.tokens, args.repeats, args.threads, 1 if args.quick else BLOCKS, not args.quick), args.out)


if __name__ == "__main__":
    main()
