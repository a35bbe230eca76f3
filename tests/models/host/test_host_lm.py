"""Host LMs: hooks equal TransformerLens and Hugging Face; patches and gradients equal the slow full passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from models.host.host_lm import HostLM, check_layer, host_lm_spec, lm_flops_per_token, load_host_lm
from models.host.specs import HOST_LMS

B, T = 3, 40


def _tiny_config(architecture: str):
    sizes = dict(vocab_size=211, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**sizes, bos_token_id=0, eos_token_id=0)
    return LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def lm(request, tmp_path_factory) -> HostLM:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(_tiny_config(request.param))
    for p in model.parameters():  # untrained norms are all ones: make every parameter count
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return load_host_lm(f"tiny-{request.param}", lm_path=path)


@pytest.fixture
def tokens_BT() -> Tensor:
    return torch.randint(0, 211, (B, T), generator=torch.Generator().manual_seed(2))


def _loss(lm: HostLM, tokens_BT: Tensor, **how: torch.dtype) -> Tensor:
    return lm.loss_and_gradients(tokens_BT, [1], **how)[0]


def _reference_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    flat = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
    return flat.view(len(tokens_BT), -1).mean(1)


def _with_hook(lm: HostLM, layer: int, tokens_BT: Tensor, replace) -> Tensor:
    """Full Hugging Face pass whose block output is ``replace(output)``: the slow way to patch."""
    handle = lm.model.base_model.layers[layer].register_forward_hook(lambda module, args, out: replace(out))
    try:
        return _reference_loss(lm.model(tokens_BT).logits, tokens_BT)
    finally:
        handle.remove()


def test_activations_equal_hugging_face_hidden_states(lm, tokens_BT):
    hidden = lm.model(tokens_BT, output_hidden_states=True).hidden_states
    ours = lm.activations(tokens_BT, [0, 2])
    for layer in (0, 2):
        assert torch.equal(ours[layer], hidden[layer + 1])


def test_activations_equal_transformer_bridge(lm, tokens_BT, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    hub_id = "EleutherAI/pythia-70m" if lm.spec.architecture == "gpt_neox" else "HuggingFaceTB/SmolLM2-135M"
    tokenizer = _char_tokenizer(tmp_path)
    bridge = TransformerBridge.boot_transformers(hub_id, hf_model=lm.model, tokenizer=tokenizer)
    layers = [1, 3]
    _, cache = bridge.run_with_cache(tokens_BT, names_filter=[lm.hook_name(layer) for layer in layers])
    ours = lm.activations(tokens_BT, layers)
    for layer in layers:
        torch.testing.assert_close(ours[layer], cache[lm.hook_name(layer)], rtol=1e-6, atol=1e-6)


def _char_tokenizer(folder):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {chr(32 + i): i for i in range(90)} | {"<e>": 90}
    special = {f"{role}_token": "<e>" for role in ("bos", "eos", "unk", "pad")}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_nothing_runs_above_the_deepest_hook(lm, tokens_BT):
    ran: list[int] = []
    layers = lm.model.base_model.layers
    handles = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(layers)]
    lm.activations(tokens_BT, [1, 0])
    first = list(ran)
    lm.patched_loss(torch.zeros(B, T, lm.d_model), 2, tokens_BT)
    for handle in handles:
        handle.remove()
    assert first == [0, 1]
    assert ran[2:] == [3]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_patched_loss_equals_a_full_pass_with_the_activation_replaced(lm, tokens_BT, layer):
    a_BTD = lm.activations(tokens_BT, [layer])[layer]
    moved_BTD = a_BTD + 0.3 * torch.randn(a_BTD.shape, generator=torch.Generator().manual_seed(3))
    expected = _with_hook(lm, layer, tokens_BT, lambda out: moved_BTD)
    torch.testing.assert_close(lm.patched_loss(moved_BTD, layer, tokens_BT), expected, rtol=1e-5, atol=1e-5)
    zero = _with_hook(lm, layer, tokens_BT, torch.zeros_like)
    torch.testing.assert_close(lm.patched_loss(torch.zeros_like(a_BTD), layer, tokens_BT), zero, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lm.patched_loss(a_BTD, layer, tokens_BT), _loss(lm, tokens_BT), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_zero_loss_of_one_token_equals_the_zero_patch(lm, tokens_BT, layer):
    slow = lm.patched_loss(torch.zeros(B, T, lm.d_model), layer, tokens_BT)
    torch.testing.assert_close(lm.zero_loss(layer, tokens_BT), slow, rtol=1e-5, atol=1e-5)


def test_further_layers_of_the_shared_pass_change_nothing(lm, tokens_BT):
    loss_B, _, g = lm.loss_and_gradients(tokens_BT, [1, 2])
    loss_all_B, a_all, g_all = lm.loss_and_gradients(tokens_BT, [1, 2], also=range(4))
    assert sorted(a_all) == [0, 1, 2, 3]
    assert sorted(g_all) == [1, 2]
    torch.testing.assert_close(loss_all_B, loss_B, rtol=0, atol=0)
    for layer in (1, 2):
        torch.testing.assert_close(g_all[layer], g[layer], rtol=0, atol=0)
    for layer, expected in lm.activations(tokens_BT, range(4)).items():
        torch.testing.assert_close(a_all[layer], expected, rtol=0, atol=0)
        assert not a_all[layer].requires_grad


def test_patched_loss_of_stacked_cells_equals_each_alone(lm, tokens_BT):
    a_BTD = lm.activations(tokens_BT, [1])[1]
    cells = [a_BTD * scale for scale in (0.5, 1.0, 2.0)]
    stacked = lm.patched_loss(torch.cat(cells), 1, tokens_BT.repeat(3, 1)).view(3, B)
    alone = torch.stack([lm.patched_loss(cell, 1, tokens_BT) for cell in cells])
    torch.testing.assert_close(stacked, alone, rtol=1e-5, atol=1e-5)


def test_loss_and_gradients_equal_autograd_through_hooks(lm, tokens_BT):
    layers = [0, 1, 3]
    caught: dict[int, Tensor] = {}

    def catch(layer):
        def hook(module, args, out):
            if not out.requires_grad:
                out.requires_grad_(True)
            out.retain_grad()
            caught[layer] = out
            return out

        return hook

    handles = [lm.model.base_model.layers[i].register_forward_hook(catch(i)) for i in layers]
    loss_B = _reference_loss(lm.model(tokens_BT).logits, tokens_BT)
    (loss_B.sum() * (T - 1)).backward()
    for handle in handles:
        handle.remove()
    ours_B, a, g = lm.loss_and_gradients(tokens_BT, layers)
    torch.testing.assert_close(ours_B, loss_B.detach(), rtol=1e-5, atol=1e-6)
    for layer in layers:
        gradient = caught[layer].grad
        assert gradient is not None
        assert not a[layer].requires_grad
        torch.testing.assert_close(a[layer], caught[layer].detach(), rtol=0, atol=0)
        torch.testing.assert_close(g[layer], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_gradient_predicts_the_change_of_the_summed_loss(lm, tokens_BT):
    _, a, g = lm.loss_and_gradients(tokens_BT, [1])
    delta_BTD = torch.randn(a[1].shape, generator=torch.Generator().manual_seed(4))
    h = 1e-3
    up, down = (lm.patched_loss(a[1] + s * h * delta_BTD, 1, tokens_BT).double() for s in (1, -1))
    slope_B = (up - down) * (T - 1) / (2 * h)
    torch.testing.assert_close(slope_B, (g[1] * delta_BTD).sum((1, 2)).double(), rtol=2e-2, atol=2e-2)


def test_gradients_do_not_depend_on_the_batch(lm, tokens_BT):
    _, _, together = lm.loss_and_gradients(tokens_BT, [2])
    _, _, alone = lm.loss_and_gradients(tokens_BT[:1], [2])
    torch.testing.assert_close(together[2][:1], alone[2], rtol=1e-4, atol=1e-5)


def test_loss_in_tiles_equals_full_logits(lm, tokens_BT, monkeypatch):
    expected = _reference_loss(lm.model(tokens_BT).logits, tokens_BT)
    torch.testing.assert_close(_loss(lm, tokens_BT), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("models.host.next_token_loss._ROWS", 16)  # uneven tails both ways
    monkeypatch.setattr("models.host.next_token_loss._COLUMNS", 50)
    torch.testing.assert_close(_loss(lm, tokens_BT), expected, rtol=1e-5, atol=1e-6)
    _, _, g_small = lm.loss_and_gradients(tokens_BT, [1])
    monkeypatch.undo()
    _, _, g_large = lm.loss_and_gradients(tokens_BT, [1])
    torch.testing.assert_close(g_small[1], g_large[1], rtol=1e-4, atol=1e-5)


def test_bf16_logits_stay_near_float32(lm, tokens_BT):
    exact = _loss(lm, tokens_BT)
    rounded = _loss(lm, tokens_BT, logits_dtype=torch.bfloat16)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=5e-3)


def test_bf16_logits_are_the_same_where_products_of_bf16_would_be_emulated(lm, tokens_BT, monkeypatch):
    losses = []
    for has in (True, False):
        monkeypatch.setattr("models.host.next_token_loss.multiplies_bfloat16", lambda device, has=has: has)
        losses.append(_loss(lm, tokens_BT, logits_dtype=torch.bfloat16))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


def test_uniform_head_gives_log_of_the_vocabulary(lm, tokens_BT):
    before = lm._head._weight_VD
    lm._head._weight_VD = torch.zeros_like(before)
    try:
        losses = _loss(lm, tokens_BT)
    finally:
        lm._head._weight_VD = before
    torch.testing.assert_close(losses, torch.full((B,), math.log(211)), rtol=1e-6, atol=1e-6)


def test_layer_out_of_range_names_the_range():
    with pytest.raises(ValueError, match=r"layer=9 is out of range for pythia-70m \(0\.\.5\)"):
        check_layer("pythia-70m", 9)
    with pytest.raises(ValueError, match=r"layer=-1 is out of range"):
        check_layer("pythia-70m", -1)


def test_unknown_model_suggests_the_nearest():
    with pytest.raises(ValueError, match="pythia-7m is unknown; did you mean pythia-70m"):
        host_lm_spec("pythia-7m")
    with pytest.raises(ValueError, match="pythia-7m is unknown; did you mean pythia-70m"):
        load_host_lm("pythia-7m")


def test_directory_that_is_not_the_named_model_is_refused(tmp_path):
    _tiny_config("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not pythia-70m: d_model=32 \(expected 512\)"):
        load_host_lm("pythia-70m", lm_path=tmp_path)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_host_lm("pythia-70m", lm_path=tmp_path / "nowhere")


def test_hub_model_without_network_names_what_works(tmp_path, monkeypatch):
    from models.host.host_lm import LMUnavailable

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LMUnavailable, match="--preset local"):
        load_host_lm("pythia-70m")


@pytest.mark.parametrize("name", list(HOST_LMS))
def test_table_equals_the_architecture_on_the_meta_device(name):
    spec = HOST_LMS[name]
    sizes = dict(
        vocab_size=spec.d_vocab,
        hidden_size=spec.d_model,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        intermediate_size=spec.d_mlp,
        tie_word_embeddings=spec.tied_head,
    )
    if spec.architecture != "gpt_neox":
        sizes["num_key_value_heads"] = spec.n_key_value_heads
    if name == "gemma-3-270m":
        sizes["head_dim"] = 256
    config = AutoConfig.for_model(spec.architecture, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert spec.n_parameters == sum(p.numel() for p in model.parameters())
    weights = [p for key, p in model.base_model.layers[0].named_parameters() if p.ndim == 2]
    per_block = 2 * sum(p.numel() for p in weights)
    context = 128
    expected = 2 * (per_block + 2 * spec.d_model * context)
    assert lm_flops_per_token(name, 1, context=context) == expected
    head = 2 * spec.d_model * spec.d_vocab
    assert lm_flops_per_token(name, context=context) == expected / 2 * spec.n_layers + head
    assert all(0 <= layer < spec.n_layers for layer in spec.depths.values())
