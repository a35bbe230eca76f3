"""SAELens' on-disk format: what we write SAELens reads, what SAELens writes we read, with equal functions."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.sae.saelens import UNPROCESSED, load_saelens, sae_lens_version, save_saelens
from models.sae.trainer import SAEConfig, SparseTrainer, TopKSAE

METADATA = {
    "model_name": "pythia-70m",
    "hook_name": "blocks.3.hook_resid_post",
    "context_size": 256,
    "dataset_path": "NeelNanda/pile-small-tokenized-2b",
    "prepend_bos": False,
    "tokens": 10_000_000,
}


def trained_sae(rescale: bool = True) -> tuple[TopKSAE, torch.Tensor]:
    """An SAE with decoder norms that differ, and fresh activations."""
    config = SAEConfig(d_in=32, d_sae=256, k=8, seed=0, lr=1e-2, rescale_acts_by_decoder_norm=rescale)
    trainer = SparseTrainer(config, backend="torch")
    for _ in range(8):
        trainer.step(torch.randn(128, 32) * 2 + 1)
    assert trainer.sae.W_dec.norm(dim=-1).std() > 1e-3
    return trainer.sae, torch.randn(300, 32) * 2 + 1


def densify(sae: TopKSAE, x: torch.Tensor) -> torch.Tensor:
    idx, h = sae.encode(x)
    return torch.zeros(len(x), sae.d_sae).scatter(-1, idx, h)


@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_reads_what_we_write(rescale: bool, tmp_path: Path) -> None:
    from sae_lens import SAE

    sae, x = trained_sae(rescale)
    save_saelens(sae, tmp_path / "sae", METADATA)
    theirs = SAE.load_from_disk(tmp_path / "sae")
    assert type(theirs).__name__ == "TopKSAE"
    assert theirs.cfg.k == 8
    assert theirs.cfg.rescale_acts_by_decoder_norm is rescale
    assert {key: theirs.cfg.metadata[key] for key in METADATA} == METADATA
    assert theirs.cfg.metadata.sae_lens_version == sae_lens_version()
    with torch.no_grad():
        acts = theirs.encode(x)
        torch.testing.assert_close(densify(sae, x), acts, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sae(x), theirs.decode(acts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rescale", [True, False])
def test_round_trip(rescale: bool, tmp_path: Path) -> None:
    sae, x = trained_sae(rescale)
    save_saelens(sae, tmp_path, METADATA)
    again, metadata = load_saelens(tmp_path)
    versions = {"sae_lens_version": sae_lens_version(), "sae_lens_training_version": None}
    assert metadata == {**versions, **UNPROCESSED, **METADATA}
    torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(densify(again, x), densify(sae, x), rtol=1e-4, atol=1e-5)


def test_saelens_evaluates_what_we_write_on_unprocessed_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sae_lens.evals` on a folder of ours: the model it asks for, and its own metrics."""
    from datasets import Dataset
    from sae_lens import SAE
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.load_model import load_model
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sae, _ = trained_sae()
    save_saelens(sae, tmp_path, {**METADATA, "hook_name": "blocks.0.hook_resid_post", "context_size": 16})
    theirs = SAE.load_from_disk(tmp_path)
    asked: dict[str, object] = {}
    real = inspect.signature(HookedTransformer.from_pretrained)
    config = HookedTransformerConfig(n_layers=1, d_model=32, n_ctx=16, d_head=8, d_vocab=50, act_fn="gelu", seed=0)

    def loaded(model_name: str, **arguments: object) -> HookedTransformer:
        asked.update(real.bind(model_name, **arguments).arguments)
        return HookedTransformer(config)

    monkeypatch.setattr(HookedTransformer, "from_pretrained", loaded)
    metadata = theirs.cfg.metadata
    model = load_model(
        metadata.model_class_name,
        metadata.model_name,
        device="cpu",
        model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
    )
    # sae_lens.evals.multiple_evals loads without a class name, and needs a mapping
    HookedTransformer.from_pretrained_no_processing(metadata.model_name, **metadata.model_from_pretrained_kwargs)
    processing = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    assert asked["model_name"] == "pythia-70m"
    assert {name: asked[name] for name in processing} == dict.fromkeys(processing, False)
    text = Dataset.from_dict({"tokens": [torch.randint(0, 50, (16,)).tolist() for _ in range(32)]})
    store = ActivationsStore.from_sae(model, theirs, dataset=text, store_batch_size_prompts=4, device="cpu")
    settings = EvalConfig(batch_size_prompts=4, n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1)
    settings.compute_ce_loss = settings.compute_variance_metrics = True
    metrics, _ = run_evals(theirs, store, model, ActivationScaler(), settings, exclude_special_tokens=False)
    assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0
    assert metrics["reconstruction_quality"]["explained_variance"] < 1


def test_we_read_what_saelens_trained(tmp_path: Path) -> None:
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=32, d_sae=256, k=8))
    with torch.no_grad():
        theirs.W_dec *= torch.rand(256, 1) + 0.5
        theirs.b_enc += 0.1 * torch.randn(256)
        theirs.b_dec += torch.randn(32)
    theirs.save_inference_model(tmp_path)
    ours, metadata = load_saelens(tmp_path)
    x = torch.randn(100, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(densify(ours, x), theirs.encode(x), rtol=1e-4, atol=1e-5)
    assert metadata["training_architecture"] == "topk"


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no cfg\.json"):
        load_saelens(tmp_path)
    sae, _ = trained_sae()
    save_saelens(sae, tmp_path, METADATA)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for change, message in (
        ({"architecture": "jumprelu"}, "architecture='jumprelu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"d_sae": 255}, "config and weights do not fit"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            load_saelens(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    for stored, message in (
        ({name: t for name, t in tensors.items() if name != "b_dec"}, "lacks b_dec and holds nothing besides"),
        (tensors | {"threshold": torch.zeros(3)}, "lacks nothing and holds threshold besides"),
    ):
        save_file(stored, tmp_path / "sae_weights.safetensors")
        with pytest.raises(ValueError, match=message):
            load_saelens(tmp_path)
    with pytest.raises(ValueError, match="metadata of the SAE is not JSON"):
        save_saelens(sae, tmp_path, {"model_name": object()})
