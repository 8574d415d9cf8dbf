"""Caches of few bits for transformers' own generate(): exact tokens that a method seals run by run, never twice."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from fewbits.core.cache_method import CacheMethod, CacheRun, Side
from fewbits.core.errors import InputError, NumericsError
from fewbits.core.tensor import CompressedTensor
from fewbits.models.attention_probe import watch_attention
from fewbits.models.cache_side import SideState, decode_together
from fewbits.models.packed_attention import FEW_TOKENS, PackedStates, attend_natively
from fewbits.models.projection_probe import Projection, watch_projections, with_handed
from fewbits.models.rotary import Rotary
from fewbits.models.sequences import Sequences

Tables = Mapping[int, Mapping[str, Tensor]]  # calibrated tensors by layer


class CompressedLayer(CacheLayerMixin):
    """One decoder layer's keys and values. Raises NumericsError where a sealed run is not finite.

    The prompt, in however many pieces it comes, is sealed at the first step of a single token, unless `chunked`: then at the
    next step, whatever its length.
    """

    is_compileable = False
    is_croppable = False  # only tokens that are not sealed yet can be taken back
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, method: CacheMethod, index: int, sequences: Sequences, *, tables: Mapping[str, Tensor], rotary: Rotary | None, chunked: bool
    ) -> None:
        super().__init__()
        self.method, self.index, self.sequences, self.tables = method, index, sequences, dict(tables)
        self.rotary, self.chunked = rotary, chunked
        self.probe_share = method.probe_share
        self.packed = False  # whether the model's attention reads what lies packed
        self.projection: Projection | None = None
        self.handed: dict[Side, Tensor] = {}
        self._empty()

    def _empty(self) -> None:
        self.sides: dict[Side, SideState] = {"keys": SideState("keys"), "values": SideState("values")}
        self.settled: list[dict[str, Tensor]] = []
        self.in_prompt = True
        self.is_initialized = False
        self._attention: tuple[Tensor, Tensor] | None = None  # to the exact keys: sums [batch, heads, tokens], probes [batch, tokens]
        self.returned: Callable[[], Tensor | None] = lambda: None

    def attended(self, sums: Tensor, counts: Tensor) -> None:
        """What models/attention_probe.py saw of the keys that were returned last."""
        waiting = cast(Tensor, self.sides["keys"].exact).shape[2]
        sums, counts = sums[:, :, -waiting:], counts[:, -waiting:]
        if self._attention is not None:
            before = self._attention[0].shape[2]
            sums, counts = sums.clone(), counts.clone()
            sums[:, :, :before] += self._attention[0]
            counts[:, :before] += self._attention[1]
        self._attention = sums, counts

    @property
    def salience(self) -> Tensor | None:
        """`[batch, heads, tokens]` of the exact keys: their attention over how many probe queries saw them."""
        return None if self._attention is None else self._attention[0] / self._attention[1].clamp(min=1)[:, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.heads, self.head_dim = key_states.dtype, key_states.shape[1], key_states.shape[3]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequences, old ones as they are stored, `[batch, heads, tokens, head_dim]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.get_seq_length() and (key_states.shape[2] == 1 or self.chunked):
            self.flush()
        for state, new in zip(self.sides.values(), (key_states, value_states), strict=True):
            # Latents wait with the exact tokens that they will replace.
            state.append(with_handed(self, state.side, new) if self.method.uses_inputs else new)
        found = self._given("keys", key_states.shape[2]), self._given("values", key_states.shape[2])
        if self.method.uses_salience:
            self.returned = weakref.ref(found[0])
        if not self.in_prompt and not self.method.uses_salience:
            self.seal()
        return found

    def flush(self) -> None:
        """Seal what is due, the prompt's rest among it."""
        self.seal()
        self.in_prompt = False

    def seal(self) -> None:
        """Ask the method what is due, and write it."""
        salience, sealed = self.salience, 0
        for state in self.sides.values():
            if state.exact is None:
                continue
            due = self.method.due(state.exact.shape[2], state.side, self.in_prompt)
            if due:
                self._seal_run(state, due, salience)
                sealed = due if state.side == "keys" else sealed
        if self._attention is not None and sealed:
            self._attention = self._attention[0][:, :, sealed:].clone(), self._attention[1][:, sealed:].clone()

    def _seal_run(self, state: SideState, count: int, attended: Tensor | None) -> None:
        start, runs = state.sealed_tokens, []
        exact = cast(Tensor, state.exact)
        if not self.settled:
            self.settled = [{} for _ in range(len(exact))]
        write = self.method.seal_keys if state.side == "keys" else self.method.seal_values
        for row in range(len(exact)):
            matrix = self._as_sealed(state.side, row, start, count)
            self._check_finite([matrix], state.side, start)  # codes alone would not show it
            salience = None if attended is None else attended[row, :, :count]
            padding = self.sequences.padding(row)
            run = CacheRun(self.index, start, self.in_prompt, self.heads, salience, self.tables, self.settled[row], padding)
            if not run.settled and state.side == "keys":
                values = self._as_sealed("values", row, start, min(count, cast(Tensor, self.sides["values"].exact).shape[2]))
                self.settled[row] = dict(self.method.settle(matrix, values, run))
                run = replace(run, settled=self.settled[row])
            runs.append(write(matrix, run))
            self._check_finite(runs[-1].tensors().values(), state.side, start)
        state.push(runs)

    def _check_finite(self, tensors: Iterable[Tensor], side: Side, start: int) -> None:
        if not all(bool(torch.isfinite(one).all()) for one in tensors if one.is_floating_point()):
            raise NumericsError(f"layer {self.index}: the {side} of token {start} and those behind it are not finite")

    def _as_sealed(self, side: Side, row: int, start: int, count: int) -> Tensor:
        """float32 `[tokens, channels]` of the oldest exact tokens of a sequence; padding repeats the first token of text."""
        exact = cast(Tensor, self.sides[side].exact)[row, :, :count].float()
        if self.method.uses_inputs:
            exact = exact[..., self.head_dim :]
        elif side == "keys" and self.rotary is not None:
            exact = self.rotary.undo(exact[None], self._positions(start, count)[row : row + 1])[0]
        matrix = exact.transpose(0, 1).reshape(count, -1)
        text = self.sequences.text
        if text is None or bool(text[row, start : start + count].all()):
            return matrix
        inside = text[row, start : start + count].nonzero().flatten()
        stand_in = matrix[inside[0]] if len(inside) else torch.zeros_like(matrix[0])
        return torch.where(text[row, start : start + count, None], matrix, stand_in)

    def _positions(self, start: int, count: int) -> Tensor:
        if self.sequences.positions is None:
            raise InputError("the cache was not opened for this model; fewbits.caches.open(model, ...) would be right")
        return self.sequences.positions[:, start : start + count]

    def _given(self, side: Side, fresh: int) -> Tensor:
        """What the attention gets at a step of `fresh` tokens: a stand-in for packed states where it reads such."""
        state = self.sides[side]
        sealed_tokens = sum(each.sealed_tokens for each in self.sides.values())
        if not self.packed or fresh > FEW_TOKENS or not sealed_tokens or cast(Tensor, state.exact).requires_grad:
            return self.read(side)
        exact, sealed = cast(Tensor, state.exact), [list(chain) for chain in state.sealed]
        return PackedStates(side, sealed, exact, partial(self._numbers, side, sealed, exact))

    def read(self, side: Side) -> Tensor:
        """All keys or values, `[batch, heads, tokens, head_dim]` in the model's dtype."""
        state = self.sides[side]
        return self._numbers(side, state.sealed, cast(Tensor, state.exact)[..., : self.head_dim])

    def _numbers(self, side: Side, sealed: list[list[CompressedTensor]], exact: Tensor) -> Tensor:
        if not sealed or not sealed[0]:
            return exact
        old = torch.cat([decode_together(batch) for batch in zip(*sealed, strict=True)], 1)
        count = old.shape[1]
        if self.projection is not None:
            old = self.projection.finished(side, self.method.restore(old, side, self.tables))
        old = old.view(len(exact), count, self.heads, -1).transpose(1, 2)
        if side == "keys" and self.rotary is not None:
            old = self.rotary.apply(old, self._positions(0, count))
        return torch.cat([old.to(self.dtype), exact], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.sides["keys"].tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._empty()

    def choose(self, rows: Tensor) -> None:
        """The batch is now made of these of its sequences."""
        for state in self.sides.values():
            state.choose(rows)
        if self._attention is not None:
            self._attention = self._attention[0][rows], self._attention[1][rows]
        self.settled = [self.settled[row] for row in rows.tolist()] if self.settled else []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.choose(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.choose(torch.arange(self._batch())[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.choose(torch.arange(self._batch()).repeat_interleave(repeats))

    def _batch(self) -> int:
        exact = self.sides["keys"].exact
        return 0 if exact is None else len(exact)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back. Raises InputError where some of them are sealed."""
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        kept = min(cast(Tensor, state.exact).shape[2] for state in self.sides.values())
        if count > kept:
            raise InputError(f"layer {self.index}: {count} tokens cannot be taken back, the last {kept} can; the others are sealed")
        for state in self.sides.values():
            state.exact = cast(Tensor, state.exact)[:, :, :-count].clone()
        if self._attention is not None:
            self._attention = self._attention[0][:, :, :-count], self._attention[1][:, :-count]

    def elements(self, sealed: bool) -> int:
        """How many numbers the keys and values of all sequences have, or those of their sealed tokens."""
        tokens = sum(state.sealed_tokens if sealed else state.tokens for state in self.sides.values())
        return self._batch() * tokens * self.heads * self.head_dim if tokens else 0

    def tensors(self) -> dict[str, list[Tensor]]:
        """What is stored, by what it is: codes, scales, ..., `exact` tokens, the attention to them, and what the first run `settled`.

        A tensor that many runs share, such as a layer's calibrated levels, is one.
        """
        found: dict[str, list[Tensor]] = {}
        for state in self.sides.values():
            runs = [run.tensors().items() for chain in state.sealed for run in chain]
            for tensor, name in {id(tensor): (tensor, name) for run in runs for name, tensor in run}.values():
                found.setdefault(f"{state.side}.{name.rpartition('.')[2]}", []).append(tensor)
            if state.exact is not None:
                found.setdefault(f"{state.side}.exact", []).append(state.exact)
        settled = [tensor for row in {id(row): row for row in self.settled}.values() for tensor in row.values()]
        found |= {"settled": settled} if settled else {}
        return found | ({"attention.exact": list(self._attention)} if self._attention is not None else {})


class CompressedCache(Cache):
    """A cache whose full-attention layers are written in few bits by a method; other layers keep their own layout."""

    def __init__(self, model: PreTrainedModel, method: CacheMethod, *, tables: Tables | None = None, chunked: bool = False) -> None:
        rotary = None if method.rotated_keys else Rotary.of(model)
        self.method, self.sequences = method, Sequences(placed=rotary is not None)
        layers = list(DynamicCache(config=model.config).layers)
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                mine = {} if tables is None else tables.get(index, {})
                layers[index] = CompressedLayer(method, index, self.sequences, tables=mine, rotary=rotary, chunked=chunked)
        if not any(isinstance(layer, CompressedLayer) for layer in layers):
            raise InputError(f"{type(model).__name__} has no layer of full attention whose keys and values could be compressed")
        super().__init__(layers=layers)
        _watch(model)
        if method.rotated_keys and not method.uses_inputs and not method.uses_salience and attend_natively(model):
            for layer in self.compressed():
                layer.packed = True
        if method.uses_salience:
            watch_attention(model, self.compressed())
        if method.uses_inputs:
            watch_projections(model, self.compressed())

    def compressed(self) -> list[CompressedLayer]:
        """The layers that are written in few bits."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def observe(self, mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int]) -> None:
        """What a forward of `shape` (batch, new tokens) is given, before it runs."""
        self.sequences.observe(mask, positions, shape, self.compressed()[0].get_seq_length())

    def flush(self) -> None:
        """Seal what is due, such as the prompt before its first step."""
        for layer in self.compressed():
            layer.flush()

    def reset(self) -> None:
        super().reset()
        self.sequences.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(cast(torch.LongTensor, beam_idx))
        self.sequences.choose(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.compressed()[0]._batch()).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self.sequences.choose(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.sequences.choose(indices)

    def memory(self) -> dict[str, Any]:
        """What the compressed layers store: `bytes`, `bits` by what they are, and `bits_per_element` of keys and values.

        Counted from the stored tensors. `sealed_bits_per_element` leaves the exact tokens out on both sides. `tables_bytes`, what
        the method was calibrated to, is the same for all of a model's caches and in the others only where runs hold it.
        """
        bits = {name: 8 * tensor.nbytes for name, tensor in self.sequences.tensors().items()}
        for layer in self.compressed():
            for name, tensors in layer.tensors().items():
                bits[name] = bits.get(name, 0) + sum(8 * tensor.nbytes for tensor in tensors)
        elements = sum(layer.elements(sealed=False) for layer in self.compressed())
        sealed = sum(layer.elements(sealed=True) for layer in self.compressed())
        total, exact = sum(bits.values()), sum(count for name, count in bits.items() if name.endswith(".exact"))
        return {
            "bytes": total // 8,
            "tables_bytes": sum(tensor.nbytes for layer in self.compressed() for tensor in layer.tables.values()),
            "bits": bits,
            "bits_per_element": total / elements if elements else 0.0,
            "sealed_bits_per_element": (total - exact) / sealed if sealed else 0.0,
        }


def cache_keyword(model: nn.Module) -> str:
    """What `model`'s forward and generate call a cache, which differs between versions of transformers."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


_WATCHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _watch(model: PreTrainedModel) -> None:
    """Let the caches given to a model's forward see its mask and positions, which the layers are not told."""
    if model in _WATCHED:
        return
    _WATCHED.add(model)

    def tell(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        cache = next((value for value in keywords.values() if isinstance(value, CompressedCache)), None)
        if cache is None:
            return
        tokens = keywords.get("input_ids", arguments[0] if arguments else None)
        tokens = keywords["inputs_embeds"] if tokens is None else tokens
        mask = keywords.get("attention_mask")
        cache.observe(mask if isinstance(mask, Tensor) else None, keywords.get("position_ids"), (tokens.shape[0], tokens.shape[1]))

    hook: Callable[..., None] = tell
    model.register_forward_pre_hook(hook, with_kwargs=True)
