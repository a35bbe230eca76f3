"""Evaluates SAEs on the held-out sequences: one LM pass and one backward serve every cell of the pack.

Shape suffixes: S sequences, B sequences of a chunk, T context, D = d_model, k active features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from analysis.sae.budget import FeatureCounts
from analysis.sae.cells import cell_numbers
from analysis.sae.columns import LAYER_COLUMNS, SETS
from analysis.sae.fidelity import SequenceSums
from analysis.sae.geometry import CovarianceSums
from analysis.sae.variance import ControlledErrors, Controls, VarianceSums
from data.token_stream import TokenStream
from models.sae.folders import AnySAE, reconstructor
from models.sae.saelens import save_saelens
from models.sae.trainer import JumpReLUSAE, TopKSAE
from sweeps.core.cells import Row, UserError
from sweeps.launch.context import PackContext
from sweeps.launch.stop import PackStopped
from sweeps.ledger.published import parquet_bytes
from sweeps.sae.information import LayerInformation, measure_layers
from sweeps.sae.rungs import FREE, CellRungs, Clock, SharedPass
from sweeps.sae.sources import begins_with_bos, held_out_labels
from sweeps.sae.text import TextCheck
from sweeps.sae.tokens import kept_tokens, leaves_out

if TYPE_CHECKING:
    from models.host.host_lm import HostLM
    from sweeps.sae.cells import SAECell
    from sweeps.sae.legibility import CellLegibility, LayerProbes

_CHUNK = 8  # sequences evaluated at once
_UNITS = {"mse": "squared norm / d_model", "loss_orig": "nats/token", "loss_recon": "nats/token"} | {
    "loss_zero": "nats/token",
    "rate_bits": "bits/token",
    "rate_bits_entropy": "bits/token",
    "swd": "nats²",
    "abs_gdelta": "nats",
    **dict.fromkeys(("kl", "first_order"), "nats/token"),
    **dict.fromkeys(("fisher", "fisher_diag", "fisher_sampled"), "nats²/token"),
    **dict.fromkeys(("attention_plan", "attention_cost"), "nats"),
}


# what SAELens writes of an SAE that is published as a JumpReLU SAE
TRAINED_AS = {
    "batchtopk": {"training_architecture": "batchtopk"},
    "matryoshka": {"training_architecture": "matryoshka_batchtopk"},
}


class Evaluation:
    """The held-out sequences of a stream, with what all SAEs of a pack share, computed once.

    Holds activations, gradients and scores of the hooked layers, and final hidden states with their gradients:
    (3 · layers + 2) · S · T · D float32 on the device (2 · layers + 2 with rungs=free). Tokens that the
    cells leave out keep their own activations in the patched pass, and no metric counts them; the geometry of the
    layers is that of all tokens.
    """

    def __init__(
        self, lm: HostLM, stream: TokenStream, layers: Sequence[int], cell: SAECell, context: PackContext
    ) -> None:
        self.lm, self.layers = lm, layers
        self.cell, self.stream, self.context = cell, stream, context
        self.logits_dtype = torch.bfloat16 if cell.lm_dtype == "bfloat16" else torch.float32
        try:
            tokens = stream.eval_sequences(cell.held_out_end)[-cell.eval_sequences :]
        except ValueError as error:
            raise UserError(str(error)) from error
        documents = stream.held_out_documents(cell.held_out_end)
        self._documents_S = None if documents is None else documents[-cell.eval_sequences :]
        first = cell.held_out_end - cell.eval_sequences
        self.text = TextCheck(stream, tokens, {cell.model: lm.d_vocab}, first)
        self.tokens_ST = torch.from_numpy(tokens.astype("int64")).to(context.device)
        self._pass()
        self._probes: dict[int, LayerProbes] = self._layer_probes() if cell.legibility != "off" else {}

    def _chunks(self) -> list[slice]:
        return [slice(i, i + _CHUNK) for i in range(0, len(self.tokens_ST), _CHUNK)]

    def _pass(self) -> None:
        sums = {layer: VarianceSums(self.tokens_ST.numel()) for layer in range(self.lm.n_layers)}
        losses: list[torch.Tensor] = []
        acts, grads, zero_losses = (_lists(self.layers) for _ in range(3))
        self.shared = SharedPass(self.lm, self.logits_dtype, self.cell.rungs != FREE, Clock(self.context.device))
        self.shared.time_passes(self.tokens_ST, list(self.layers))
        for rows in self._chunks():
            self.context.progress(phase=f"unpatched model, sequence {rows.start} of {len(self.tokens_ST)}")
            tokens_BT = self.tokens_ST[rows]
            found = self.shared.run(rows, tokens_BT, list(self.layers), list(sums))
            losses.append(found.loss_B)
            for layer, a_BTD in found.activations.items():
                sums[layer].update(a_BTD)
            for layer in self.layers:
                acts[layer].append(found.activations[layer])
                grads[layer].append(found.gradients[layer])
                zero_losses[layer].append(self.lm.zero_loss(layer, tokens_BT))
        self.loss_orig_S = torch.cat(losses)
        self._require_finite(sums)
        self.a_STD = {layer: torch.cat(parts) for layer, parts in acts.items()}
        self.g_STD = {layer: torch.cat(parts) for layer, parts in grads.items()}
        self.loss_zero_S = {layer: torch.cat(parts) for layer, parts in zero_losses.items()}
        self.geometry = {layer: s.summary() for layer, s in sums.items()}
        self.kept_ST: dict[int, torch.Tensor] = {}
        self.mean_D: dict[int, torch.Tensor] = {}
        self.controls: dict[int, Controls] = {}
        for layer in self.layers:
            a_STD, norm_ST, covariance = self.a_STD[layer], sums[layer].norm_ST, sums[layer].covariance
            kept_ST = torch.ones_like(norm_ST, dtype=torch.bool)
            if leaves_out(self.cell):
                kept_ST = self.kept_ST[layer] = kept_tokens(norm_ST, self.cell)
                covariance = _covariance(a_STD, kept_ST)
            self.mean_D[layer] = covariance.mean_D
            self.controls[layer] = Controls.of(a_STD, norm_ST, covariance, kept_ST)
        self.information = self._information() if self.cell.information == "on" else LayerInformation({})

    def _information(self) -> LayerInformation:
        hidden_STD = torch.cat([self.shared.predictions[rows.start].hidden_BTD for rows in self._chunks()])
        return measure_layers(self.a_STD, hidden_STD, self.lm.head, self.kept_ST, self._tell)

    def _tell(self, line: str) -> None:
        self.context.progress(phase=line)
        if self.context.stopping():
            raise PackStopped("stopped while information was measured; it is measured again")

    def _layer_probes(self) -> dict[int, LayerProbes]:
        from sweeps.sae.legibility import LayerProbes  # here: scikit-learn is loaded by those who ask for probes

        labels = held_out_labels(self.cell, self.context.run, self.lm.tokenizer_dir)
        if not np.array_equal(labels.tokens_ST, self.tokens_ST.cpu().numpy()):
            raise RuntimeError(f"the classes of {self.stream.source} belong to other tokens than its held-out ones")
        self.context.progress(phase="probes on the activations")
        no_sinks = SETS.index("no_sinks")
        return {
            layer: LayerProbes.of(labels, self.a_STD[layer], self.controls[layer].keep_PST[no_sinks].bool())
            for layer in self.layers
        }

    def _legibility(self, cell: SAECell) -> CellLegibility | None:
        if not self._probes:
            return None
        from sweeps.sae.legibility import CellLegibility

        return CellLegibility(self._probes[cell.layer], cell.d_sae)

    def _require_finite(self, sums: dict[int, VarianceSums]) -> None:
        """UserError that names the lowest block, or the head, where the unpatched model's numbers go wrong."""
        places = {f"layer {layer}": s.covariance.mean_D for layer, s in sums.items()} | {"loss": self.loss_orig_S}
        for place, values in places.items():
            if not bool(torch.isfinite(values).all()):
                raise UserError(
                    f"{self.cell.model} {place}: the held-out text gives NaN or inf; check the weights, or choose "
                    f"another lm_dtype than {self.cell.lm_dtype}"
                )

    def run(self, cell: SAECell, sae: AnySAE) -> tuple[list[Row], dict[str, bytes], float]:
        """Rows, tables ({file name: content}) and CE_rec of one SAE.

        Raises ValueError when its reconstructions are not finite or none of its features fires.
        """
        sums, controlled = SequenceSums(self.mean_D[cell.layer]), ControlledErrors(self.controls[cell.layer])
        kept_ST = self.kept_ST.get(cell.layer)
        features = FeatureCounts(cell.d_sae)
        rungs = CellRungs(self.shared, cell.layer, len(self.tokens_ST), self.context.device)
        reconstruct = reconstructor(sae)
        legibility = self._legibility(cell)
        for rows in self._chunks():
            a_BTD = self.a_STD[cell.layer][rows]
            a_hat_BTD, index_BTk, value_BTk = reconstruct(a_BTD)
            if not bool(torch.isfinite(a_hat_BTD).all()):
                raise ValueError(f"layer {cell.layer}: the SAE's reconstructions hold NaN or inf; {cell.remedy}")
            kept_BT = None if kept_ST is None else kept_ST[rows]
            if kept_BT is not None:
                a_hat_BTD = torch.where(kept_BT[..., None], a_hat_BTD, a_BTD)
            sequence_B = torch.arange(rows.start, rows.start + len(a_BTD))
            sums.update(a_BTD, a_hat_BTD, sequence_B, self.g_STD[cell.layer][rows], kept_BT)
            controlled.update(a_BTD, a_hat_BTD, rows)
            counted = slice(None) if kept_BT is None else kept_BT.flatten()
            features.update(index_BTk.flatten(0, -2)[counted], value_BTk.flatten(0, -2)[counted])
            if legibility is not None:
                legibility.update(rows, index_BTk, value_BTk)
            recon_B = rungs.patched_loss(rows, a_BTD, a_hat_BTD, self.g_STD[cell.layer][rows])
            sums.add_losses(sequence_B, self.loss_orig_S[rows], recon_B, self.loss_zero_S[cell.layer][rows])
        sequences = sums.table()
        audit = self.geometry[cell.layer] | controlled.metrics() | rungs.numbers(sequences)
        audit |= features.density(int(sequences["n_tokens"].sum()))
        numbers = cell_numbers(cell.k or max(1, round(audit["l0"])), sums, features, audit, self._documents_S)
        rows_out = [Row(name, value, _UNITS.get(name, "")) for name, value in numbers.items()]
        for layer, summary in self.geometry.items():
            at = {"geometry_layer": layer}
            rows_out += [Row(f"{n}_of_layer", summary[n], "", at) for n in ("pr", "pr_deflated", *LAYER_COLUMNS)]
        rows_out += self.information.rows() + rungs.layer_rows()
        sequences = sequences.assign(**controlled.by_sequence(), **rungs.table())
        if self._documents_S is not None:
            sequences = sequences.assign(document=self._documents_S)
        tables = {"sequences.parquet": parquet_bytes(sequences), "rungs.parquet": parquet_bytes(rungs.costs())}
        if legibility is not None:
            probed, table = legibility.published()
            rows_out, tables = rows_out + probed, tables | table
        tables |= self.information.files()
        return rows_out, tables, numbers["ce_rec"]

    def saelens_files(self, cell: SAECell, sae: TopKSAE | JumpReLUSAE) -> dict[str, bytes]:
        """{file name: content} of a trained SAE as SAELens reads it."""
        with tempfile.TemporaryDirectory() as folder:
            save_saelens(
                sae,
                Path(folder),
                {
                    "model_name": cell.model,
                    "hook_name": self.lm.hook_name(cell.layer),
                    "hook_layer": cell.layer,
                    "context_size": cell.context,
                    "dataset_path": cell.text or self.stream.source,
                    "training_tokens": cell.tokens,
                    "prepend_bos": begins_with_bos(cell, self.context.run, self.lm.tokenizer_dir),
                    "plumbline_cell": cell.key,
                    **TRAINED_AS.get(cell.sae, {}),
                },
            )
            return {f"sae/{p.name}": p.read_bytes() for p in Path(folder).iterdir()}


def _covariance(a_STD: torch.Tensor, kept_ST: torch.Tensor) -> CovarianceSums:
    """Mean and covariance of the kept tokens."""
    sums = CovarianceSums()
    for a_BTD, kept_BT in zip(a_STD.split(_CHUNK), kept_ST.split(_CHUNK), strict=True):
        sums.update(a_BTD[kept_BT])
    return sums


def _lists(layers: Sequence[int]) -> dict[int, list[torch.Tensor]]:
    return {layer: [] for layer in layers}
