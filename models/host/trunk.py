"""The blocks of a language model run in part: up to a hook, from a hook on, or all of them with one hook cut open.

Both ways give the bits of forward hooks on the whole model, and both leave out the blocks that do not matter:

`Segments`  the base model with a part of its block list; GPT-NeoX and Llama, whose base models do nothing but run the
            list between embedding and last norm (a test holds the equality)
`Hooks`     forward hooks on any model's block list; a block whose output is replaced hands its input on instead of
            computing, where the model has been seen to allow that, and nothing runs after what was asked for

Shape suffixes: B sequences, T tokens, D d_model. Final hidden states are the input of the unembedding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.host.layout import Layout, first, passing
from models.host.specs import RESID_POST, RESID_PRE

SEGMENTED = ("gpt_neox", "llama")
"""Architectures whose base models `Segments` may cut."""

FLAT_WHEN_CONSTANT = (*SEGMENTED, "gpt2", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi")
"""Architectures whose blocks map a residual stream that is the same at all positions to one that is, too: causal
attention over equal values returns that value whatever its weights, and position enters through these alone."""


class Trunk(Protocol):
    """What `models.host.host_lm.HostLM` runs. ``layers`` are sorted and not empty."""

    def climb(self, tokens_BT: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """(layer, activation a_BTD) from the lowest of ``layers`` on; nothing above the highest runs."""

    def through(self, tokens_BT: Tensor, stops: Sequence[int], leaf: int) -> tuple[dict[int, Tensor], Tensor]:
        """({stop: a_BTD}, final hidden states), the latter and all stops above ``leaf`` as functions of ``leaf``'s
        activation, a new leaf of autograd's graph."""

    def tail(self, layer: int, tokens_BT: Tensor) -> Callable[[Tensor], Tensor]:
        """a_BTD -> final hidden states, differentiable in both modes, with the hook of ``layer`` replaced."""


class Segments:
    """See the module's text. ``norm`` is the attribute of the base model that holds its last norm."""

    def __init__(self, model: Any, norm: str) -> None:
        self._base, self._norm = model.base_model, norm
        self.n_layers = len(self._base.layers)

    def climb(self, tokens_BT: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        inputs = {"input_ids": tokens_BT}
        for start, stop in pairwise([0, *(layer + 1 for layer in layers)]):
            a_BTD = self._segment(start, stop)(**inputs)
            yield stop - 1, a_BTD
            inputs = {"inputs_embeds": a_BTD}

    def through(self, tokens_BT: Tensor, stops: Sequence[int], leaf: int) -> tuple[dict[int, Tensor], Tensor]:
        seen: dict[int, Tensor] = {}
        with torch.no_grad():
            for layer, a_BTD in self.climb(tokens_BT, [s for s in stops if s <= leaf]):
                seen[layer] = a_BTD.detach()
        with torch.enable_grad():
            seen[leaf].requires_grad_(True)
            for below, layer in pairwise([s for s in stops if s >= leaf]):
                seen[layer] = self._segment(below + 1, layer + 1)(inputs_embeds=seen[below])
            return seen, self.tail(stops[-1], tokens_BT)(seen[stops[-1]])

    def tail(self, layer: int, tokens_BT: Tensor) -> Callable[[Tensor], Tensor]:
        run = self._segment(layer + 1, self.n_layers, norm=True)
        return lambda a_BTD: run(inputs_embeds=a_BTD)

    def _segment(self, start: int, stop: int, *, norm: bool = False) -> Callable[..., Tensor]:
        """Blocks start..stop−1 as a function of ``input_ids`` or ``inputs_embeds`` (shares the weights)."""
        part = copy.copy(self._base)
        part._modules = dict(self._base._modules)
        part._modules["layers"] = self._base.layers[start:stop]
        if not norm:
            part._modules[self._norm] = nn.Identity()
        return lambda **inputs: part(**inputs, use_cache=False).last_hidden_state


class _Reached(Exception):
    """Ends a pass whose result is there."""

    def __init__(self, a_BTD: Tensor) -> None:
        super().__init__()
        self.a_BTD = a_BTD


Visit = Callable[[int, Tensor], Tensor | None]
"""Called with the layer and the activation at its hook; what it returns replaces the activation."""


class Hooks:
    """See the module's text. ``hook`` is one of `models.host.specs.HOOKS`."""

    def __init__(self, model: Any, layout: Layout, hook: str) -> None:
        self._model, self._layout, self._hook = model, layout, hook
        self._blocks = layout.block_list(model)
        self._head = model.get_output_embeddings()
        parameters = inspect.signature(model.forward).parameters
        takes_cache = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._options: dict[str, Any] = {"use_cache": False} if takes_cache else {}

    def climb(self, tokens_BT: Tensor, layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        seen: dict[int, Tensor] = {}

        def visit(layer: int, a_BTD: Tensor) -> None:
            seen[layer] = a_BTD
            if layer == layers[-1]:
                raise _Reached(a_BTD)

        self._run(tokens_BT, dict.fromkeys(layers, visit))
        yield from seen.items()

    def through(self, tokens_BT: Tensor, stops: Sequence[int], leaf: int) -> tuple[dict[int, Tensor], Tensor]:
        seen: dict[int, Tensor] = {}

        def visit(layer: int, a_BTD: Tensor) -> Tensor:
            seen[layer] = a_BTD.detach().requires_grad_(True) if layer == leaf else a_BTD
            return seen[layer]

        with torch.enable_grad():
            return seen, self._run(tokens_BT, dict.fromkeys(stops, visit))

    def tail(self, layer: int, tokens_BT: Tensor) -> Callable[[Tensor], Tensor]:
        # a hook inside a block adds to the stream that reaches the block, which therefore has to be computed
        skipped = {RESID_POST: layer + 1, RESID_PRE: layer}.get(self._hook, 0) if self._layout.skips else 0
        return lambda a_BTD: self._run(tokens_BT, {layer: lambda *_: a_BTD}, skipped)

    def _run(self, tokens_BT: Tensor, visits: Mapping[int, Visit], skipped: int = 0) -> Tensor:
        """The final hidden states of a pass that makes these visits and computes none of the first blocks."""
        with ExitStack() as stack:
            for layer, visit in visits.items():
                module, at_input = self._layout.site(self._blocks, layer, self._hook)
                stack.enter_context(_visiting(module, at_input, layer, visit))
            for block, arity in zip(self._blocks[:skipped], self._layout.arities, strict=False):
                stack.enter_context(passing(block, arity))

            def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                raise _Reached(args[0] if args else next(iter(kwargs.values())))

            stack.callback(self._head.register_forward_pre_hook(end, with_kwargs=True).remove)
            try:
                self._model(input_ids=tokens_BT, **self._options)
            except _Reached as reached:
                return reached.a_BTD
        raise RuntimeError(f"{type(self._model).__name__} ended without calling its unembedding")


@contextmanager
def _visiting(module: nn.Module, at_input: bool, layer: int, visit: Visit) -> Iterator[None]:
    """Show a module's input or output to ``visit`` and put what it returns in its place."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        name = None if args else next(iter(kwargs))
        new = visit(layer, args[0] if name is None else kwargs[name])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if name is None else (args, kwargs | {name: new})

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        new = visit(layer, first(out))
        if new is None:
            return None
        return new if isinstance(out, Tensor) else (new, *out[1:])

    if at_input:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
