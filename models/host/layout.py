"""How a language model is put together, found by running it on a few tokens: its blocks, hooks and read-out.

Nothing is known of the architecture beforehand. What is found has been seen in numbers: that the blocks hand [B, T, D]
on from one to the next, that no position reads a later one, that a block's attention and MLP add up to what the block
adds to the residual stream, and how the logits follow from the unembedding.

Shape suffixes: B sequences, T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.host.specs import ATTN_OUT, MLP_OUT, RESID_POST, RESID_PRE

_B, _T = 2, 6
_SAME = 1e-4  # relative difference up to which float32 sums of other order count as equal
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # names in transformers' configs


@dataclass(frozen=True)
class Readout:
    """logits = cap · tanh(scale · head(h) / cap); without a cap, scale · head(h)."""

    scale: float = 1.0
    cap: float = 0.0


@dataclass(frozen=True)
class Layout:
    """blocks: name of the block list. arities: per block the elements of its output tuple, 0 where it is a tensor.
    inner: per block {`MLP_OUT` or `ATTN_OUT`: the child whose output it is}. skips: whether the later blocks do without
    anything but the residual stream from the earlier ones."""

    blocks: str
    arities: tuple[int, ...]
    inner: tuple[dict[str, str], ...]
    skips: bool
    readout: Readout

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.blocks)  # type: ignore[return-value]

    def site(self, blocks: nn.ModuleList, layer: int, hook: str) -> tuple[nn.Module, bool]:
        """(module, whether the activation is its input instead of its output); ValueError where there is no such."""
        if hook in (RESID_POST, RESID_PRE):
            return blocks[layer], hook == RESID_PRE
        child = self.inner[layer].get(hook)
        if child is None:
            raise ValueError(
                f"hook={hook} is not in block {layer} ({type(blocks[layer]).__name__}): no two of its modules add up "
                f"to what the block adds to the residual stream; choose {RESID_POST} or {RESID_PRE}"
            )
        return blocks[layer].get_submodule(child), False


def first(out: Any) -> Any:
    """The hidden states of a module's output: the output itself or its first element."""
    return out[0] if isinstance(out, tuple | list) and out else out


@contextmanager
def passing(block: nn.Module, arity: int) -> Iterator[None]:
    """Let a block hand on its input, in the form of its output, instead of computing."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden_BTD = args[0] if args else next(iter(kwargs.values()))
        return (hidden_BTD, *[None] * (arity - 1)) if arity else hidden_BTD

    block.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.forward


@dataclass
class _Call:
    """One module's call: its number in the order of calls, hidden states before and after, the output's form."""

    number: int
    before: Tensor | None
    after: Tensor | None
    arity: int


class _Recorder:
    """The calls of modules during a pass, by name; a module that ran twice stands for nothing."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.calls: dict[str, list[_Call]] = {}
        self._number = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.calls.clear()
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(self._after(name), with_kwargs=True).remove)
            yield

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            result = first(out)
            arity = len(out) if isinstance(out, tuple | list) else 0
            after = result.detach() if isinstance(result, Tensor) else None
            self.calls.setdefault(name, []).append(
                _Call(self._number, inputs[0].detach() if inputs else None, after, arity)
            )
            self._number += 1

        return hook

    def only(self, name: str) -> _Call | None:
        calls = self.calls.get(name, [])
        return calls[0] if len(calls) == 1 else None


@torch.no_grad()
def find_layout(model: Any, n_layers: int, d_model: int, blocks: str = "") -> Layout:
    """The layout of a decoder-only model in float32, in evaluation mode; ``blocks`` names its block list if given.

    Raises ValueError, in one line, where there is no such list or more than one, where positions read later ones, or
    where the logits are no function of the unembedding's output that `Readout` has.
    """
    candidates = block_lists(model, n_layers, blocks)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding to read logits from; choose another model")
    modules: dict[str, nn.Module] = {"head": head}
    for name, children in candidates.items():
        for i, block in enumerate(children):
            modules[f"{name}.{i}"] = block
            modules |= {f"{name}.{i}.{child}": module for child, module in block.named_children()}
    recorder = _Recorder(modules)
    tokens_BT = _tokens(model, head)
    try:
        with recorder.recording():
            logits_BTV = model(input_ids=tokens_BT).logits
    except Exception as error:  # the architecture's own code: whatever it raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{type(model).__name__} cannot be run on tokens ({reason}); check its config, or choose another model"
        ) from error
    name = _the_chain(recorder, candidates, d_model, type(model).__name__)
    head_call = recorder.only("head")
    if head_call is None or head_call.before is None or head_call.after is None:
        raise ValueError(f"{type(model).__name__} does not run its output embedding once; choose another model")
    found = Layout(
        blocks=name,
        arities=tuple(_call(recorder, f"{name}.{i}").arity for i in range(n_layers)),
        inner=tuple(_inner(recorder, f"{name}.{i}", candidates[name][i]) for i in range(n_layers)),
        skips=_skips(model, recorder, name, candidates[name], tokens_BT),
        readout=_readout(model, head_call.after, logits_BTV),
    )
    _require_causal(model, recorder, tokens_BT, head_call.before)
    return found


def block_lists(model: nn.Module, n_layers: int, blocks: str = "") -> dict[str, nn.ModuleList]:
    """The module lists that may be a model's blocks, by name: those as long as it is deep, or the one that is named.

    Raises ValueError where there is none.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if blocks:
        if blocks not in lists:
            raise ValueError(
                f"blocks={blocks} is no module list of {type(model).__name__}; it has {', '.join(lists) or 'none'}"
            )
        lists = {blocks: lists[blocks]}
    fitting = {name: m for name, m in lists.items() if len(m) == n_layers}
    if not fitting:
        raise ValueError(
            f"the blocks of {type(model).__name__} are not found: no module list of {n_layers} blocks among "
            f"{', '.join(f'{n} ({len(m)})' for n, m in lists.items()) or 'none'}; name it with --set blocks=NAME, or "
            "choose another model"
        )
    return fitting


def _tokens(model: Any, head: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings()
    size = min(len(embedding.weight), len(head.weight))
    return torch.randint(0, size, (_B, _T), generator=generator).to(embedding.weight.device)


def _call(recorder: _Recorder, name: str) -> _Call:
    call = recorder.only(name)
    assert call is not None
    return call


def _the_chain(recorder: _Recorder, candidates: dict[str, nn.ModuleList], d_model: int, kind: str) -> str:
    """The one list whose modules map hidden states to hidden states, in order; each the next one's, if need be."""
    shape = (_B, _T, d_model)

    def fits(name: str) -> bool:
        calls = [recorder.only(f"{name}.{i}") for i in range(len(candidates[name]))]
        numbers = [c.number for c in calls if c is not None]
        shapes = {tuple(x.shape) for c in calls if c is not None for x in (c.before, c.after) if x is not None}
        return None not in calls and numbers == sorted(numbers) and shapes == {shape}

    def chained(name: str) -> bool:
        calls = [_call(recorder, f"{name}.{i}") for i in range(len(candidates[name]))]
        return all(torch.equal(a.after, b.before) for a, b in itertools.pairwise(calls))  # type: ignore[arg-type]

    fitting = [name for name in candidates if fits(name)]
    found = fitting if len(fitting) < 2 else [name for name in fitting if chained(name)]
    if len(found) != 1:
        raise ValueError(
            f"the blocks of {kind} are not found: {len(found) or 'none'} of its module lists ({', '.join(candidates)}) "
            f"hands on hidden states [B, T, {d_model}]; name the right one with --set blocks=NAME, or choose another "
            "model"
        )
    return found[0]


def _inner(recorder: _Recorder, place: str, block: nn.Module) -> dict[str, str]:
    """The two children whose outputs add up to what the block adds: attention, which runs first, and MLP.

    Of several pairs that do (a dropout after a projection) the last to run is taken.
    """
    whole = _call(recorder, place)
    assert whole.before is not None
    assert whole.after is not None
    added_BTD = whole.after - whole.before
    calls = [(child, recorder.only(f"{place}.{child}")) for child, _ in block.named_children()]
    outputs = [
        (c.number, child, c.after)
        for child, c in calls
        if c is not None and c.after is not None and c.after.shape == added_BTD.shape
    ]
    outputs.sort(key=lambda o: o[0])
    for i in range(len(outputs) - 1, -1, -1):
        for j in range(i - 1, -1, -1):
            if _same(outputs[i][2] + outputs[j][2], added_BTD):
                return {ATTN_OUT: outputs[j][1], MLP_OUT: outputs[i][1]}
    return {}


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= _SAME * b.norm())


def _skips(model: Any, recorder: _Recorder, name: str, blocks: nn.ModuleList, tokens_BT: Tensor) -> bool:
    """Whether the pass is the same, bit for bit, when the first half of the blocks only hands on its input."""
    half = max(1, len(blocks) // 2)
    kept, wanted = _call(recorder, f"{name}.{half - 1}"), _call(recorder, "head").before
    arities = [_call(recorder, f"{name}.{i}").arity for i in range(half)]
    assert kept.after is not None
    assert wanted is not None
    hidden_BTD = kept.after

    def put_back(module: nn.Module, args: Any, out: Any) -> Any:
        return hidden_BTD if isinstance(out, Tensor) else (hidden_BTD, *out[1:])

    found: list[Tensor] = []
    with ExitStack() as stack:
        for block, arity in zip(blocks[:half], arities, strict=True):
            stack.enter_context(passing(block, arity))
        stack.callback(blocks[half - 1].register_forward_hook(put_back).remove)
        head = recorder.modules["head"]
        stack.callback(head.register_forward_hook(lambda m, args, out: found.append(args[0])).remove)
        try:
            model(input_ids=tokens_BT)
        except Exception:  # a later block wants more of an earlier one than the stream: whatever it raises
            return False
    return len(found) == 1 and torch.equal(found[0], wanted)


def _readout(model: Any, head_BTV: Tensor, logits_BTV: Tensor) -> Readout:
    config = model.config.get_text_config()
    head_BTV, logits_BTV = head_BTV.float(), logits_BTV.float()
    for name in _CAPS:  # before the scale, which small logits cannot tell from a cap
        if (cap := getattr(config, name, None)) and _same(cap * torch.tanh(head_BTV / cap), logits_BTV):
            return Readout(cap=float(cap))
    scale = float((head_BTV.double() * logits_BTV).sum() / head_BTV.double().square().sum())
    scale = round(scale, 6) if abs(scale - round(scale, 6)) < 1e-6 * abs(scale) else scale
    if _same(scale * head_BTV, logits_BTV):
        return Readout(scale)
    raise ValueError(
        f"the logits of {type(model).__name__} are neither a multiple of its output embedding's nor soft-capped by a "
        f"known field ({', '.join(_CAPS)}); choose another model"
    )


def _require_causal(model: Any, recorder: _Recorder, tokens_BT: Tensor, hidden_BTD: Tensor) -> None:
    """Raise ValueError where an earlier position's final hidden state depends on a later token."""
    changed_BT = tokens_BT.clone()
    changed_BT[:, -1] = (changed_BT[:, -1] + 1) % len(model.get_input_embeddings().weight)
    with recorder.recording():
        model(input_ids=changed_BT)
    again = _call(recorder, "head").before
    assert again is not None
    if not _same(again[:, :-1], hidden_BTD[:, :-1]):
        raise ValueError(
            f"{type(model).__name__} is no decoder: its positions read later tokens, so its next-token loss means "
            "nothing; choose a decoder-only model"
        )
