"""The task-relevant dimension of the hooked layers, measured once per pack on the held-out sequences.

X is a token's activation at the hook, Y the model's logits at that token in their leading principal directions.

Shape suffixes: S sequences, T context, D = d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pandas as pd
import torch

from analysis.sae.task_dimension import numbers
from models.host.logit_directions import principal_logits
from models.host.next_token_loss import NextTokenLoss
from models.information.estimate import Information, measure
from models.information.settings import CriticSettings
from sweeps.core.cells import Row, UserError
from sweeps.ledger.published import parquet_bytes

SETTINGS = CriticSettings()
FILE = "information.parquet"
_UNITS = {"mi_nats": "nats", "mi_ceiling": "nats"}


@dataclass(frozen=True)
class LayerInformation:
    """What was measured, by layer; empty where nothing was asked for."""

    layers: Mapping[int, Information]

    def rows(self) -> list[Row]:
        """INFORMATION_COLUMNS of every layer, as the layers' geometry is published."""
        found = []
        for layer, of in self.layers.items():
            values = numbers(of.dimensions, of.estimate_FK, of.ratio_F, of.ceiling)
            at = {"geometry_layer": layer}
            found += [Row(f"{name}_of_layer", value, _UNITS.get(name, ""), at) for name, value in values.items()]
        return found

    def files(self) -> dict[str, bytes]:
        """{FILE: every estimate by layer, fold and k_z}, or nothing."""
        if not self.layers:
            return {}
        records = [
            {"layer": layer, "fold": fold, "k_z": k, "nats": float(of.estimate_FK[fold, i])}
            | {"step": int(of.step_FK[fold, i]), "one_shot": float(of.ratio_F[fold]), "ceiling": of.ceiling}
            for layer, of in self.layers.items()
            for fold in range(len(of.estimate_FK))
            for i, k in enumerate(of.dimensions)
        ]
        return {FILE: parquet_bytes(pd.DataFrame(records))}


def measure_layers(
    a_STD: Mapping[int, torch.Tensor],
    hidden_STD: torch.Tensor,
    head: NextTokenLoss,
    kept_ST: Mapping[int, torch.Tensor],
    tell: Callable[[str], None],
) -> LayerInformation:
    """I(activation; logits) of every layer by k_z.

    Args:
        a_STD: {layer: activations}. hidden_STD: final hidden states of the same tokens. kept_ST: {layer: tokens to look
            at}, layers that are not named look at all. tell: is called with a line of progress, and may raise.
    Raises:
        UserError: too few sequences or tokens.
    """
    y_STM = principal_logits(head, hidden_STD)
    width = min(hidden_STD.shape[2], y_STM.shape[2])
    settings = replace(SETTINGS, dimensions=tuple(k for k in SETTINGS.dimensions if k <= width))
    found = {}
    for layer, x_STD in a_STD.items():
        try:
            found[layer] = measure(
                x_STD,
                y_STM,
                settings,
                kept_ST=kept_ST.get(layer),
                tell=lambda line, layer=layer: tell(f"information of layer {layer}, {line}"),  # type: ignore[misc]
            )
        except ValueError as error:
            raise UserError(f"information=on, layer {layer}: {error}") from error
    return LayerInformation(found)
