"""Audits of SAEs that were trained elsewhere (`--preset released`): planned by their metadata, packed by hook, run."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from data._content import file_sha256
from data.token_stream import CorruptShard
from models.host.specs import HOOKS, HOST_LMS
from sweeps.core.cells import Estimate, Pack, UserError
from sweeps.core.machine import Machine
from sweeps.core.settings import RunSettings
from sweeps.launch.context import PackContext
from sweeps.sae.cells import Grid, ReleasedCell, SAECell
from sweeps.sae.lms import spec_of
from sweeps.sae.packs import pass_of

if TYPE_CHECKING:
    from models.sae.folders import Description

CONTEXT = 256  # of an SAE whose metadata gives none
_HOOK = re.compile(r"blocks\.(\d+)\.hook_(\w+)")
_PROCESS_BYTES = 3 * 2**30  # an interpreter with torch, transformers, Ray and SAELens loaded
_CORE_FLOPS = 5e10  # FLOP/s of a CPU core in float32, not measured
_PATCHED_PASSES = 8  # forward passes that all rungs of one SAE cost, about


def plan_released(preset: Grid) -> list[ReleasedCell]:
    """One cell per SAE, in the order given. Raises UserError (one line) for one that cannot be audited."""
    if not preset.saes:
        raise UserError("saes= names no SAE; give folders or RELEASE:ID on the hub: --set saes=DIR,RELEASE:ID")
    if len(preset.models) > 1:
        raise UserError(
            f"models={','.join(preset.models)} are several, but each SAE belongs to one model; give the one for all, "
            "or none to take what the SAEs name"
        )
    cells = [_cell(source, preset) for source in preset.saes]
    seen: dict[str, str] = {}
    for cell in cells:
        if cell.key in seen:
            raise UserError(f"saes: {cell.source} has the content of {seen[cell.key]}; name each SAE once")
        seen[cell.key] = cell.source
    return cells


def _cell(source: str, preset: Grid) -> ReleasedCell:
    about = _described(source)
    model = preset.models[0] if preset.models else _model(about, source)
    found = _HOOK.fullmatch(about.hook_name)
    if found is None or found[2] not in HOOKS:
        raise UserError(
            f"{source}: hook {about.hook_name or '(not named)'} is not supported; blocks.L.hook_X with X of "
            f"{', '.join(HOOKS)} are"
        )
    spec, layer = spec_of(model), int(found[1])
    if layer >= spec.n_layers:
        raise UserError(f"{source}: layer={layer} is out of range for {model}; it has layers 0 to {spec.n_layers - 1}")
    if about.d_in != spec.d_model:
        raise UserError(
            f"{source}: the SAE has d_in={about.d_in}, but {model} has width {spec.d_model}; give its own model with "
            "--set models="
        )
    return ReleasedCell(
        model=model,
        layer=layer,
        depth=f"L{layer}",
        k=about.k,
        seed=0,
        tokens=0,
        stream="text" if preset.text else preset.stream,
        context=preset.context or about.context or CONTEXT,
        d_sae=about.d_sae,
        batch_tokens=1,
        shuffle_sequences=1,
        lr=0.0,
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        aux_coefficient=0.0,
        dead_after_steps=0,
        eval_sequences=preset.eval_sequences,
        eval_part=preset.eval_part,
        lm_dtype=preset.lm_dtype,
        drop_positions=preset.drop_positions,
        max_norm_multiple=preset.max_norm_multiple,
        hook=found[2],
        blocks=preset.blocks,
        text=preset.text,
        text_column=preset.text_column,
        rungs=preset.rungs,
        legibility=preset.legibility,
        information=preset.information,
        sae=about.sae_class,
        sha256=content(about),
        source=_from_anywhere(source),
    )


def _from_anywhere(source: str) -> str:
    """The source as a worker finds it, which runs in another folder than the launch."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if folder.is_dir() else source


def _described(source: str) -> Description:
    from models.sae.folders import describe

    try:
        return describe(folder_of_sae(source))
    except ValueError as error:
        raise UserError(str(error)) from error


def folder_of_sae(source: str) -> Path:
    """The folder of an SAE: the one that is named, or the download of RELEASE:ID. Raises UserError."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    release, colon, sae_id = source.partition(":")
    if not colon or not release or not sae_id:
        raise UserError(f"saes: {source} is no folder and no RELEASE:ID; name the folder with the SAE's config")
    from models.sae.releases import fetch

    try:
        return fetch(release, sae_id)
    except ValueError as error:
        raise UserError(str(error)) from error


def content(about: Description) -> str:
    """SHA-256 over the contents of config and weights."""
    return _content(tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in about.files))


@functools.cache
def _content(files: tuple[tuple[str, int, int], ...]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(file_sha256(name)) for name, _, _ in files)).hexdigest()


def _model(about: Description, source: str) -> str:
    """The model that the metadata names, under a name that `models.host` knows."""
    name = about.model
    if not name:
        raise UserError(f"{source}: the metadata does not name the SAE's language model; give it with --set models=")
    short = name.rsplit("/", 1)[-1]
    if name in HOST_LMS or short in HOST_LMS:
        return name if name in HOST_LMS else short
    if "/" in name:
        return name
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(name))
    except ValueError as error:
        raise UserError(
            f"{source}: model_name={name!r} is not known; give OWNER/NAME or a folder with --set models="
        ) from error


def pack_released(cells: Sequence[ReleasedCell], machine: Machine, run: RunSettings) -> list[Pack[SAECell]]:
    """A pack per model, hook and text: one pass of the language model serves all its SAEs, whatever their layers."""
    groups: dict[tuple[object, ...], list[ReleasedCell]] = {}
    for cell in cells:
        groups.setdefault(pass_of(cell), []).append(cell)
    size = run.cells_per_pack or len(cells)
    parts = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return [
        Pack(
            name=f"{part[0].model.rsplit('/', 1)[-1]}-{part[0].hook}-{i:02d}",
            cells=tuple(part),
            cpus=threads_released(machine, run),
            gpus=1.0 if machine.gpus else 0.0,
            memory_bytes=_bytes(part, run),
        )
        for i, part in enumerate(parts)
    ]


def threads_released(machine: Machine, run: RunSettings) -> int:
    """CPU threads of a pack: a node's cores, or its GPU's share of them."""
    return run.threads or max(1, machine.cpus // (machine.gpus or machine.nodes))


def _bytes(cells: Sequence[ReleasedCell], run: RunSettings) -> int:
    first, spec = cells[0], spec_of(cells[0].model, run)
    layers, tokens = len({c.layer for c in cells}), first.eval_sequences * first.context
    lm = spec.n_parameters * (2 if first.lm_dtype == "bfloat16" else 4)
    kept = (3 * layers + 2) * tokens * spec.d_model * 4 + spec.n_layers * spec.d_model**2 * 8
    return _PROCESS_BYTES + lm + kept + 4 * 4 * spec.d_model * max(c.d_sae for c in cells)


def estimate_released(cells: Sequence[ReleasedCell], machine: Machine, run: RunSettings) -> Estimate:
    """Work left, by arithmetic."""
    if not cells:
        return Estimate(seconds=0.0, basis="nothing to do")
    packs = pack_released(cells, machine, run)
    tokens, flops = 0, 0.0
    for pack in packs:
        first = pack.cells[0]
        held_out = first.eval_sequences * first.context
        passes = 3 + _PATCHED_PASSES * len(pack.cells)
        tokens += held_out
        flops += held_out * 2.0 * spec_of(first.model, run).n_parameters * passes
        flops += sum(held_out * 4.0 * spec_of(c.model, run).d_model * c.d_sae for c in pack.cells)
    return Estimate(
        lm_passes=len(packs),
        tokens=tokens,
        flops=flops,
        memory_bytes=max(p.memory_bytes for p in packs),
        seconds=flops / (_CORE_FLOPS * machine.cpus),
        basis=f"assuming {_CORE_FLOPS:.0e} FLOP/s a core, not measured",
    )


def audit_pack(cells: Sequence[ReleasedCell], context: PackContext) -> None:
    """Evaluate and publish every SAE of a pack on one pass of their language model.

    An SAE whose outputs are no numbers is recorded as failed and the others are still audited. Raises UserError.
    """
    from models.sae.folders import read_folder
    from sweeps.ledger.published import parquet_bytes
    from sweeps.sae.evaluate import Evaluation
    from sweeps.sae.sources import corrupt, open_stream, start_pack

    left, lm = start_pack(cells, context)
    if lm is None:
        return
    first = left[0]
    try:
        stream = open_stream(first, context.run, lm.tokenizer_dir, say=context.note)
        evaluation = Evaluation(lm, stream, sorted({c.layer for c in left}), first, context)
    except CorruptShard as error:
        raise corrupt(error) from error
    best = float("-inf")
    for i, cell in enumerate(left):
        context.progress(force=True, phase=f"SAE {i + 1} of {len(left)}: {cell.source}", done=i, total=len(left))
        about = _described(cell.source)
        if content(about) != cell.sha256:
            raise UserError(f"{cell.source} changed after this launch began; start it again")
        try:
            rows, tables, ce_rec = evaluation.run(cell, read_folder(about.folder, context.device))
        except ValueError as error:  # this SAE is damaged; the others are still audited
            context.fail(cell, str(error))
            continue
        best = max(best, ce_rec)
        context.publish(cell, rows, tables | {"sae.parquet": parquet_bytes(_name_card(cell, about))})
        context.progress(best=best)


def _name_card(cell: ReleasedCell, about: Description) -> pd.DataFrame:
    """What the report prints of an SAE besides its numbers."""
    return pd.DataFrame(
        [{"sae": cell.source, "sae_class": cell.sae, "hook_name": about.hook_name, "named_model": about.model}]
    )
