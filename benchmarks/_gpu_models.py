"""Parts of `gpu.py`: the language model under study with patches, training of the audio-token models, sampling."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks._gpu_kernels import MUSIC_BATCH, SPEECH_BATCH, delta_case
from benchmarks._gpu_parts import Plan, Record, host_waits, milliseconds, peak_gib
from models.codec.model import CodecLM, CodecLMConfig, build_codec_lm
from models.codec.presets import LOCAL, MUSIC, SPEECH
from models.codec.sampling import Sampling, generate
from models.host.host_lm import HostLM
from models.host.specs import HOST_LMS
from models.ops.preflight import preflight
from sweeps.codec.loop import Batch, TrainConfig, Trainer

PUBLISHED = "18,000 tokens/s on an A100"
DISTINCT = 64  # codes that the random batches draw from: few, so that their share is learned within steps
SPEECH_STEPS, MUSIC_STEPS = 200, 20
MUSIC_CLIPS, MUSIC_DROPOUT = 32, 0.1  # as in sweeps' music_a100; SPEECH_BATCH clips are speech_a100's whole batch
RESUME_AFTER = 2
CE_LIMIT, CE_LIMIT_BFLOAT16 = 1e-5, 2e-2  # of a patched loss, compared with the whole model in float64


def host(plan: Plan, record: Record) -> None:
    """Losses of a GPT-NeoX of Pythia-410M's shape (random weights) with a patched residual stream."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    spec = HOST_LMS["pythia-410m"]
    sequences, context, reference_sequences = (2, 16, 1) if plan.tiny else (32, 256, 2)
    if plan.tiny:
        spec = replace(spec, d_model=32, n_layers=3, n_heads=4, d_mlp=64, d_vocab=101)
    torch.manual_seed(0)
    with plan.device:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=spec.d_vocab,
                hidden_size=spec.d_model,
                num_hidden_layers=spec.n_layers,
                num_attention_heads=spec.n_heads,
                intermediate_size=spec.d_mlp,
            )
        )
    with torch.no_grad():
        model.lm_head.weight *= 5.0  # logits of a few nats: rounding them must show
    layer = spec.n_layers // 2
    tokens = torch.randint(spec.d_vocab, (sequences, context), device=plan.device)
    record.note(f"GPT-NeoX of Pythia-410M's shape with random weights, {spec.n_parameters:,} parameters as planned")
    patch = torch.randn(sequences, context, spec.d_model, device=plan.device)
    few = slice(reference_sequences)
    expected = _patched_whole(copy.deepcopy(model).double(), layer, tokens[few], patch[few])
    for dtype, limit in ((torch.float32, CE_LIMIT), (torch.bfloat16, CE_LIMIT_BFLOAT16)):
        twin: torch.nn.Module = copy.deepcopy(model)
        lm = HostLM("random 410M", twin.to(dtype), spec, None)
        name = str(dtype).removeprefix("torch.")
        found = lm.patched_loss(patch[few], layer, tokens[few]).double()
        record.gate(f"{name}: patched loss compared with float64", float((found / expected - 1).abs().max()), limit)
        _time_host(record, f"{name}, {sequences} × {context} tokens", lm, layer, tokens, patch, plan)


def _patched_whole(model: torch.nn.Module, layer: int, tokens_BT: Tensor, patch_BTD: Tensor) -> Tensor:
    """Mean next-token losses [B] of the whole model, with the output of a block replaced by a hook."""

    def replaced(module: torch.nn.Module, args: object, out: object) -> object:
        patch = patch_BTD.to(next(model.parameters()).dtype)
        return (patch, *out[1:]) if isinstance(out, tuple) else patch

    handle = model.base_model.layers[layer].register_forward_hook(replaced)  # type: ignore[index, union-attr]
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens_BT).logits[:, :-1]
    finally:
        handle.remove()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens_BT), -1).mean(1)


def _time_host(record: Record, case: str, lm: HostLM, layer: int, tokens: Tensor, patch: Tensor, plan: Plan) -> None:
    def patched() -> object:
        return lm.patched_loss(patch, layer, tokens)

    works: dict[str, Callable[[], object]] = {
        "activations": lambda: lm.activations(tokens, [layer]),
        "patched loss": patched,
        "loss and gradients": lambda: lm.loss_and_gradients(tokens, [layer]),
    }
    for name, work in works.items():
        ms = milliseconds(work, plan, calls=3)
        record.row(f"{case}: {name}", ms=ms, tokens_per_s=1e3 * tokens.numel() / ms, peak_GiB=peak_gib(work, plan))


def speech_chunked(plan: Plan, record: Record) -> None:
    """Training at the speech scale without the fused kernel."""
    _training("speech", "chunked", plan, record)


def speech_fused(plan: Plan, record: Record) -> None:
    """Training at the speech scale with the fused kernel, where its preflight passes."""
    _training("speech", "fused", plan, record)


def music_chunked(plan: Plan, record: Record) -> None:
    """Training at the music scale without the fused kernel."""
    _training("music", "chunked", plan, record)


def music_fused(plan: Plan, record: Record) -> None:
    """Training at the music scale with the fused kernel, where its preflight passes."""
    _training("music", "fused", plan, record)


def _training(scale: str, impl: str, plan: Plan, record: Record) -> None:
    """Gates: finite and falling loss on one repeated batch; the bits of a continued run."""
    if impl == "fused" and not _fused_is_trusted(scale, plan, record):
        return
    config, clips, steps = (
        (SPEECH, SPEECH_BATCH, SPEECH_STEPS) if scale == "speech" else (MUSIC, MUSIC_CLIPS, MUSIC_STEPS)
    )
    config = replace(config, impl=impl, dropout=MUSIC_DROPOUT if scale == "music" else 0.0)
    micro = MUSIC_BATCH if scale == "music" else 0
    if plan.tiny:
        config, clips, steps, micro = replace(LOCAL, impl=impl, context=32, dropout=config.dropout), 2, 6, micro and 1
    settings = TrainConfig(
        steps=10_000, lr=3e-4, lr_end=0.0, warmup_steps=5, precision="float32" if plan.tiny else "bfloat16",
        micro_batch=micro, max_loss_jump=math.inf,
    )  # fmt: skip
    batch = random_batch(config, clips, plan)
    name = f"{scale}, {impl}"
    model = build_codec_lm(config, device=plan.device, seed=0)
    _resumed(record, name, model, settings, batch)
    trainer = trainer_of(model, settings)
    losses = [trainer.step(batch).loss]
    start, done = time.perf_counter(), 1
    while done < steps and (plan.left() > 5 or done < 2):
        losses.append(trainer.step(batch).loss)
        done += 1
    seconds = time.perf_counter() - start
    record.gate(f"{name}: losses that are not finite", sum(not math.isfinite(loss) for loss in losses), 0)
    record.gate(f"{name}: last loss over the first, repeated batch", losses[-1] / losses[0], 1 - 1e-3)
    columns = (done - 1) * clips * batch.inputs_BKT.shape[-1] / seconds
    record.row(
        f"{name}, {settings.precision}",
        steps=done,
        ms=1e3 * seconds / (done - 1),
        columns_per_s=columns,
        codes_per_s=columns * config.n_codebooks,
        published=PUBLISHED if scale == "speech" else None,
        first_loss=losses[0],
        last_loss=losses[-1],
        host_waits=host_waits(lambda: trainer.step(batch), plan),
        peak_GiB=peak_gib(lambda: trainer.step(batch), plan),
    )


def _fused_is_trusted(scale: str, plan: Plan, record: Record) -> bool:
    if not plan.on_gpu:
        record.note("fused kernels need CUDA")
        return False
    verdict = preflight(delta_case(scale, plan), timeout_s=max(20.0, plan.left() - 30))
    if not verdict.trusted:
        record.note(f"{scale}: the fused kernel is not used: {verdict.reason}")
    return verdict.trusted


def random_batch(config: CodecLMConfig, clips: int, plan: Plan) -> Batch:
    """Columns of a few codes, drawn at random."""
    gen = torch.Generator().manual_seed(0)
    shape = (clips, config.n_codebooks, config.context + 1)
    codes = torch.randint(min(DISTINCT, config.codebook_size), shape, generator=gen).to(plan.device)
    return Batch(codes[..., :-1].contiguous(), codes[..., 1:].contiguous(), codes[..., 1:].numel())


def trainer_of(model: CodecLM, settings: TrainConfig) -> Trainer:
    """A trainer of a copy of the model."""
    return Trainer(copy.deepcopy(model), settings)


def _resumed(record: Record, name: str, model: CodecLM, settings: TrainConfig, batch: Batch) -> None:
    """Gate: numbers of all weights that differ between a run and one continued from its checkpoint."""
    whole = trainer_of(model, settings)
    for _ in range(RESUME_AFTER):
        whole.step(batch)
    state = copy.deepcopy(whole.state())
    for _ in range(RESUME_AFTER):
        whole.step(batch)
    expected = [p.detach().clone() for p in whole.model.parameters()]
    del whole
    continued = trainer_of(model, settings)
    continued.restore(state)
    for _ in range(RESUME_AFTER):
        continued.step(batch)
    pairs = zip(continued.model.parameters(), expected, strict=True)
    record.gate(f"{name}: weights that differ after a resume", sum(int((p != e).sum()) for p, e in pairs), 0)


def sample(plan: Plan, record: Record) -> None:
    """Frames per second of the speech model (random weights); a seed gives the same samples twice."""
    config = replace(LOCAL, context=40) if plan.tiny else SPEECH
    model = build_codec_lm(config, device=plan.device, seed=0).eval()
    frames, batches = (8, (1, 2)) if plan.tiny else (128, (1, 8, 64))
    _steps_equal_forward(record, config, plan)
    for precision in ("float32", "bfloat16"):
        for batch in batches:
            if precision == "bfloat16" and plan.tiny:
                continue
            with torch.autocast(plan.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                options = {"batch": batch, "sampling": Sampling(top_k=50), "backend": "torch"}
                first = generate(model, frames, **options)  # type: ignore[arg-type]
                start = time.perf_counter()
                second = generate(model, frames, **options)  # type: ignore[arg-type]
                differ = int((first.codes != second.codes).sum())  # waits for the device
                seconds = time.perf_counter() - start
            record.gate(f"{precision}, batch {batch}: codes that differ between two runs of one seed", differ, 0)
            record.row(
                f"speech, {precision}, batch {batch}",
                ms_per_frame=1e3 * seconds / frames,
                frames_per_s=batch * frames / seconds,
            )


def _steps_equal_forward(record: Record, config: CodecLMConfig, plan: Plan) -> None:
    """Gate: logits taken token by token compared with one pass over the sequence, float32."""
    model = build_codec_lm(config, device=plan.device, seed=1).eval()
    tokens = torch.randint(config.codebook_size, (2, config.n_codebooks, 24), device=plan.device)
    with torch.no_grad():
        whole = model(tokens)
        logits, state = model.prefill(tokens[..., :8], 24)
        stepped = [logits]
        for column in range(8, 24):
            logits, state = model.step(tokens[..., column], state)
            stepped.append(logits)
    difference = (torch.stack(stepped, 1) - whole[:, 7:]).abs().max() / whole.abs().max()
    record.gate("logits of steps compared with one pass", float(difference), 1e-3)
