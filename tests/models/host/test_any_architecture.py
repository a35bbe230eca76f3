"""Any decoder-only model, tiny and with random weights: hooks, patches, gradients, losses against the plain way.

The plain way is a forward hook on the whole Hugging Face model, written here without the product's modules.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from models.host.host_lm import HookPlace, HostLM
from models.host.layout import find_layout
from models.host.specs import HostLMSpec, depths_of

B, T, D, LAYERS, VOCAB = 2, 12, 32, 4, 97
SIZES = dict(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, bos_token_id=0, eos_token_id=0, pad_token_id=0)
HEADS = SIZES | dict(num_attention_heads=4, intermediate_size=48)
GROUPED = HEADS | dict(num_key_value_heads=2, head_dim=8)

# model_type: (config, block list, attention's and MLP's module in a block)
ZOO: dict[str, tuple[Any, str, str | None, str | None]] = {
    "gpt2": (
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=64),
        "transformer.h",
        "attn",
        "mlp",
    ),
    "gpt_neox": (transformers.GPTNeoXConfig(**HEADS), "gpt_neox.layers", "attention", "mlp"),
    "llama": (transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True), "model.layers", "self_attn", "mlp"),
    "qwen2": (transformers.Qwen2Config(**HEADS, num_key_value_heads=2), "model.layers", "self_attn", "mlp"),
    "qwen3": (transformers.Qwen3Config(**GROUPED), "model.layers", "self_attn", "mlp"),
    "gemma2": (
        transformers.Gemma2Config(**GROUPED, sliding_window=8, final_logit_softcapping=2.0),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig(**GROUPED, sliding_window=8),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "olmo2": (
        transformers.Olmo2Config(**HEADS),
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "phi": (transformers.PhiConfig(**HEADS), "model.layers", "self_attn", "mlp"),
    "cohere": (
        transformers.CohereConfig(**HEADS, num_key_value_heads=2, logit_scale=0.25),
        "model.layers",
        "self_attn",
        "mlp",
    ),
    "mamba": (transformers.MambaConfig(**SIZES, state_size=4, conv_kernel=3), "backbone.layers", None, None),
}


def random_model(config: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():  # untrained norms and biases are ones and zeros: let every one count
        if not name.endswith(("A_log", ".D")):
            nn.init.normal_(p, mean=1.0 if p.ndim == 1 and "bias" not in name else 0.0, std=0.2)
    return model


def host(name: str, hook: str = "resid_post") -> HostLM:
    spec = HostLMSpec(
        origin="directory",
        architecture=name,
        d_model=D,
        n_layers=LAYERS,
        n_heads=4,
        d_mlp=48,
        d_vocab=VOCAB,
        depths=depths_of(LAYERS),
    )
    return HostLM(name, random_model(ZOO[name][0]), spec, None, HookPlace(hook))


@pytest.fixture(scope="module")
def lms() -> dict[tuple[str, str], HostLM]:
    return {}


@pytest.fixture(params=list(ZOO))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def lm(name: str, lms: dict[tuple[str, str], HostLM]) -> HostLM:
    if (name, "resid_post") not in lms:
        lms[name, "resid_post"] = host(name)
    return lms[name, "resid_post"]


@pytest.fixture
def tokens_BT() -> Tensor:
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))


Edit = Callable[[Tensor], Tensor | None]


def plain(lm: HostLM, tokens_BT: Tensor, layer: int, edit: Edit, hook: str = "resid_post") -> tuple[Tensor, Tensor]:
    """(input of the unembedding, logits) of the whole model with a forward hook in block ``layer``."""
    _, path, attention, mlp = ZOO[lm.name]
    block = lm.model.get_submodule(path)[layer]  # type: ignore[index]
    hidden: list[Tensor] = []

    def after(module: nn.Module, args: Any, out: Any) -> Any:
        new = edit(out if isinstance(out, Tensor) else out[0])
        return None if new is None else new if isinstance(out, Tensor) else (new, *out[1:])

    def before(module: nn.Module, args: Any) -> Any:
        new = edit(args[0])
        return None if new is None else (new, *args[1:])

    with ExitStack() as stack:
        if hook == "resid_pre":
            handle = block.register_forward_pre_hook(before)
        else:
            child = {"attn_out": attention, "mlp_out": mlp}.get(hook)
            handle = (block if child is None else block.get_submodule(child)).register_forward_hook(after)
        stack.callback(handle.remove)
        head = lm.model.get_output_embeddings()  # type: ignore[operator]
        stack.callback(head.register_forward_pre_hook(lambda module, args: hidden.append(args[0])).remove)
        logits_BTV = lm.model(tokens_BT, use_cache=False).logits
    return hidden[0], logits_BTV


def loss_of(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    flat = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens_BT), -1).mean(1)


def read(lm: HostLM, tokens_BT: Tensor, layer: int, hook: str = "resid_post") -> Tensor:
    seen: list[Tensor] = []
    plain(lm, tokens_BT, layer, lambda a_BTD: seen.append(a_BTD.clone()), hook)
    return seen[0]


def test_activations_are_the_bits_of_plain_forward_hooks(lm: HostLM, tokens_BT: Tensor) -> None:
    ours = lm.activations(tokens_BT, [0, 2, 3])
    for layer in (0, 2, 3):
        assert torch.equal(ours[layer], read(lm, tokens_BT, layer))


def test_the_loss_is_hugging_faces_own(lm: HostLM, tokens_BT: Tensor) -> None:
    own = torch.stack([lm.model(row[None], labels=row[None]).loss for row in tokens_BT])
    torch.testing.assert_close(lm.loss_and_gradients(tokens_BT, [1])[0], own, rtol=1e-5, atol=1e-6)
    rounded = lm.loss_and_gradients(tokens_BT, [1], logits_dtype=torch.bfloat16)[0]
    torch.testing.assert_close(rounded, own, rtol=0, atol=5e-3)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_patched_pass_has_the_bits_of_plain_forward_hooks(lm: HostLM, tokens_BT: Tensor, layer: int) -> None:
    a_BTD = lm.activations(tokens_BT, [layer])[layer]
    moved_BTD = a_BTD + 0.3 * torch.randn(a_BTD.shape, generator=torch.Generator().manual_seed(3))
    for patch_BTD in (moved_BTD, torch.zeros_like(a_BTD)):
        hidden_BTD, logits_BTV = plain(lm, tokens_BT, layer, lambda a, p=patch_BTD: p)  # type: ignore[misc]
        assert torch.equal(lm.tail(layer, tokens_BT)(patch_BTD), hidden_BTD)
        torch.testing.assert_close(
            lm.patched_loss(patch_BTD, layer, tokens_BT), loss_of(logits_BTV, tokens_BT), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(lm.zero_loss(layer, tokens_BT), loss_of(logits_BTV, tokens_BT), rtol=1e-5, atol=1e-6)


def test_gradients_are_the_slopes_of_the_loss(lm: HostLM, tokens_BT: Tensor) -> None:
    _, a, g = lm.loss_and_gradients(tokens_BT, [1, 3], also=range(LAYERS))
    assert sorted(a) == list(range(LAYERS))
    delta_BTD = torch.randn(a[1].shape, generator=torch.Generator().manual_seed(4))
    h = 1e-3
    for layer in (1, 3):
        assert torch.equal(a[layer], read(lm, tokens_BT, layer))
        up, down = (lm.patched_loss(a[layer] + s * h * delta_BTD, layer, tokens_BT).double() for s in (1, -1))
        slope_B = (up - down) * (T - 1) / (2 * h)
        expected_B = (g[layer] * delta_BTD).sum((1, 2)).double()
        torch.testing.assert_close(slope_B, expected_B, rtol=2e-2, atol=2e-2 * float(expected_B.abs().max()))


def test_only_the_blocks_that_matter_run(lm: HostLM, tokens_BT: Tensor) -> None:
    ran: list[int] = []
    blocks = lm.model.get_submodule(ZOO[lm.name][1])
    norms = [next(m for m in block.modules() if not list(m.children())) for block in blocks]  # type: ignore[union-attr]
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(norms)]
    lm.activations(tokens_BT, [1])
    first = list(ran)
    lm.patched_loss(torch.zeros(B, T, D), 2, tokens_BT)
    for handle in handles:
        handle.remove()
    assert (sorted(set(first)), sorted(set(ran[len(first) :]))) == ([0, 1], [3])


@pytest.mark.parametrize("hook", ["resid_pre", "attn_out", "mlp_out"])
def test_other_hooks_have_the_bits_of_plain_forward_hooks(name: str, hook: str, tokens_BT: Tensor) -> None:
    if name == "mamba" and hook != "resid_pre":
        with pytest.raises(ValueError, match=rf"^hook={hook} is not in block 0 \(MambaBlock\).*choose resid_post"):
            host(name, hook)
        return
    lm = host(name, hook)
    assert lm.hook_name(2) == f"blocks.2.hook_{hook}"
    _, a, g = lm.loss_and_gradients(tokens_BT, [1, 2])
    for layer in (1, 2):
        assert torch.equal(a[layer], read(lm, tokens_BT, layer, hook))
        assert torch.equal(lm.activations(tokens_BT, [layer])[layer], a[layer])
    zeros_BTD = torch.zeros_like(a[1])
    hidden_BTD, logits_BTV = plain(lm, tokens_BT, 1, lambda _: zeros_BTD, hook)
    assert torch.equal(lm.tail(1, tokens_BT)(zeros_BTD), hidden_BTD)
    torch.testing.assert_close(lm.zero_loss(1, tokens_BT), loss_of(logits_BTV, tokens_BT), rtol=1e-5, atol=1e-6)
    delta_BTD, h = torch.randn(a[1].shape, generator=torch.Generator().manual_seed(4)), 1e-3
    up, down = (lm.patched_loss(a[1] + s * h * delta_BTD, 1, tokens_BT).double() for s in (1, -1))
    expected_B = (g[1] * delta_BTD).sum((1, 2)).double()
    slope_B = (up - down) * (T - 1) / (2 * h)
    torch.testing.assert_close(slope_B, expected_B, rtol=2e-2, atol=2e-2 * float(expected_B.abs().max()))


def test_forward_mode_goes_through_the_tail(lm: HostLM, tokens_BT: Tensor) -> None:
    if lm.name == "mamba":
        pytest.skip("its scan updates a state in place, which forward mode does not follow")
    a_BTD = lm.activations(tokens_BT, [1])[1]
    delta_BTD = torch.randn(a_BTD.shape, generator=torch.Generator().manual_seed(5))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, moved = torch.func.jvp(lm.tail(1, tokens_BT), (a_BTD,), (delta_BTD,))
        up, down = (lm.tail(1, tokens_BT)(a_BTD + s * 1e-3 * delta_BTD) for s in (1, -1))
    assert float((moved - (up - down) / 2e-3).norm() / moved.norm()) < 1e-2


def test_a_model_that_reads_later_tokens_is_refused() -> None:
    model = random_model(transformers.BertConfig(**HEADS))
    with pytest.raises(ValueError, match=r"^BertLMHeadModel is no decoder: .*choose a decoder-only model$"):
        find_layout(model, LAYERS, D)


def test_blocks_that_are_not_found_ask_for_their_name() -> None:
    model = random_model(ZOO["qwen2"][0])
    with pytest.raises(ValueError, match=r"no module list of 5 blocks among model\.layers \(4\); name it with --set"):
        find_layout(model, 5, D)
    with pytest.raises(ValueError, match=r"^blocks=model\.h is no module list of Qwen2ForCausalLM; it has model\.lay"):
        find_layout(model, LAYERS, D, "model.h")
    assert find_layout(model, LAYERS, D, "model.layers") == find_layout(model, LAYERS, D)


def test_a_model_that_cannot_run_is_one_line() -> None:
    model = random_model(transformers.Qwen2Config(**HEADS, num_key_value_heads=3))
    with pytest.raises(ValueError, match=r"^Qwen2ForCausalLM cannot be run on tokens \(.*choose another model$"):
        find_layout(model, LAYERS, D)
