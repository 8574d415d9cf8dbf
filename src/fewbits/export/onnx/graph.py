"""A compressed model traced into an ONNX graph: what goes in and out, and what is made of the trace."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from fewbits.core.errors import InputError, reason_of
from fewbits.export.contents import Contents
from fewbits.export.grids import in_16_bits
from fewbits.export.onnx.layer import OWN_DOMAIN, GraphLinear, Operator
from fewbits.models.hf_cache import cache_keyword

OPSET = 21  # the first with scales for blocks and numbers of four bits
MODEL, DATA = "model.onnx", "model.onnx.data"
PRODUCER = "fewbits"
QUANTIZERS = "fewbits.quantizers"  # how the inputs of layers are rounded, which the graph computes, said once more for `reading`
_ONNXSCRIPT = (0, 7, 2)
_SMALL = 256  # numbers of an initializer that are not worth a node that widens them
_BATCH, _TOKENS, _PAST = 2, 3, 5  # of the traced call; all three vary in the graph
_PREFIX = "model."  # the traced module holds the model under this name
Layers = tuple[tuple[int, int, int], ...]  # of a cache: heads, size of keys, size of values


@dataclass(frozen=True)
class Call:
    """A traced call: arguments by position, names of what goes in and comes out, and which axes vary."""

    arguments: tuple[Any, ...]
    axes: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


class _Decoder(nn.Module):
    """Logits, and keys and values of all tokens so far, as a flat function."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.has_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.keyword = cache_keyword(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]) -> Any:
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        given |= {"position_ids": position_ids} if self.has_positions else {}
        found = self.model(**given, **{self.keyword: DynamicCache(past)}, use_cache=True)
        return found.logits, [(layer.keys, layer.values) for layer in found[self.keyword].layers]


class _Encoder(nn.Module):
    """The states of the last layer."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tokens: Tensor) -> Tensor:
        found: Tensor = self.model(**dict(zip(self.names, tokens, strict=True))).last_hidden_state
        return found


def package() -> tuple[ModuleType, ModuleType]:
    """onnx and onnx_ir. Raises InputError where a package is not installed or torch is too old."""
    try:
        import onnx
        import onnx_ir
        import onnxscript  # what torch traces with
    except ImportError as error:
        raise InputError(f"ONNX files need the package {error.name}; pip install 'fewbits[onnx]' would be right") from error
    if tuple(int(part) for part in onnxscript.__version__.split(".")[:3] if part.isdigit()) < _ONNXSCRIPT:
        known = ".".join(map(str, _ONNXSCRIPT))
        raise InputError(f"onnxscript {onnxscript.__version__} writes wrong nodes for inputs in groups; {known} or later would be right")
    if not hasattr(torch.onnx, "ops"):
        raise InputError(f"torch {torch.__version__} cannot write nodes of few bits; torch 2.8 or later would be right")
    return onnx, onnx_ir


def cache_layers(contents: Contents) -> Layers | str:
    """Heads and sizes of the keys and values of every layer of the model's cache; or why it has no such cache."""
    shell = contents.shell
    try:
        with torch.device("meta"):
            cache = shell(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=True)[cache_keyword(shell)]
        return tuple((one.keys.shape[1], one.keys.shape[3], one.values.shape[3]) for one in cache.layers)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError):
        return f"{type(shell).__name__} keeps no cache of keys and values for every layer, which its graph would take and give"


def write_graph(contents: Contents, operator: Operator, folder: Path) -> None:
    """model.onnx and model.onnx.data. Raises InputError where torch cannot trace the model."""
    _, onnx_ir = package()
    encoder = contents.source.is_encoder
    model = _with_nodes(contents, operator)
    if encoder:
        names = [name for name in contents.source.tokenizer().model_input_names if name in inspect.signature(model.forward).parameters]
        traced, call = _Encoder(model, names), _encoder_call(names)
    else:
        layers = cache_layers(contents)
        assert not isinstance(layers, str)  # `refuses_model` was asked
        traced, call = _Decoder(model), _decoder_call(layers)  # type: ignore[assignment]
    made = trace(traced, call, type(model).__name__)
    if not encoder:
        _name_axes(made, onnx_ir)
    save(made, model, folder)


def save(made: Any, model: nn.Module, folder: Path) -> None:
    """What `trace` made of `model`, as the two files."""
    _, onnx_ir = package()
    _simplify(made, onnx_ir)
    _finish(made, onnx_ir)
    made.producer_name = PRODUCER
    made.metadata_props[QUANTIZERS] = json.dumps(_quantizers(model))
    onnx_ir.save(made, folder / MODEL, external_data=DATA)


def _with_nodes(contents: Contents, operator: Operator) -> PreTrainedModel:
    shell = contents.source.shell()
    for name, stored in contents.layers():
        shell.set_submodule(name, GraphLinear(stored, operator, shell.get_submodule(name).bias))  # type: ignore[arg-type]
    contents.source.load_module(shell, "", torch.float32)
    shell.tie_weights()
    return shell.eval()


def _quantizers(model: nn.Module) -> dict[str, Any]:
    """Of every layer that rounds its inputs: how, and which terms read them as they are."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, GraphLinear) and module.activation is not None}
    return {
        name: {"settings": layer.activation.settings(), "unrounded": [place for place, own in enumerate(layer.unrounded) if own]}
        for name, layer in layers.items()
    }


def _encoder_call(names: list[str]) -> Call:
    varying = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    tokens = tuple(torch.ones(_BATCH, _TOKENS, dtype=torch.int64) for _ in names)
    return Call(tokens, (tuple(varying for _ in names),), names, ["last_hidden_state"])


def _decoder_call(layers: Layers) -> Call:
    batch, sequence, past = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    states = [(torch.zeros(_BATCH, heads, _PAST, keys), torch.zeros(_BATCH, heads, _PAST, values)) for heads, keys, values in layers]
    tokens = torch.zeros(_BATCH, _TOKENS, dtype=torch.int64)
    positions = torch.arange(_PAST, _PAST + _TOKENS).repeat(_BATCH, 1)
    mask = torch.ones(_BATCH, _PAST + _TOKENS, dtype=torch.int64)
    axes = ({0: batch, 1: sequence}, {0: batch, 1: torch.export.Dim.AUTO}, {0: batch, 1: sequence})
    held = [({0: batch, 2: past}, {0: batch, 2: past}) for _ in layers]
    numbered = [f"{index}.{kind}" for index in range(len(layers)) for kind in ("key", "value")]
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{one}" for one in numbered)]
    return Call((tokens, mask, positions, states), (*axes, held), names, ["logits", *(f"present.{one}" for one in numbered)])


def trace(module: nn.Module, call: Call, kind: str) -> Any:
    """The model of onnx_ir. Raises InputError where torch cannot trace it; `kind` names it there."""
    try:
        # torch warns of axes that it names anew and of tensors that it lifts, which is what is asked of it here.
        with torch.no_grad(), warnings.catch_warnings(), _quiet(logging.getLogger("torch.onnx")):
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                module,
                call.arguments,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes=call.axes,
                input_names=call.inputs,
                output_names=call.outputs,
            ).model  # type: ignore[union-attr]
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        reason = reason_of(error)
        raise InputError(f"torch cannot trace {kind} into an ONNX graph ({reason}); another format would be right") from error


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Errors only: torch logs every package that it could trace with and does not find."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _simplify(model: Any, onnx_ir: ModuleType) -> None:
    """What torch's own optimization does, but what is stored keeps its form and name, equal to another's or not."""
    from onnxscript import optimizer, rewriter  # `package` has been asked

    passes = onnx_ir.passes.common
    passes.InlinePass()(model)
    stored = set(model.graph.initializers)

    def keeps(node: Any) -> bool | None:
        return False if any(value is not None and value.name in stored for value in node.inputs) else None

    optimizer.fold_constants(model, should_fold=keeps)
    rewriter.rewrite(model)
    for one in (passes.RemoveUnusedNodesPass(), passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)):
        one(model)


def _finish(model: Any, onnx_ir: ModuleType) -> None:
    """Standard nodes for those that torch could not name, the model's own names, and 16 bits where they are as good as 32."""
    for node in list(model.graph):
        node.metadata_props.clear()  # where in whose Python it was traced
        if node.domain == OWN_DOMAIN:
            _standard(node, onnx_ir)
    model.opset_imports.pop(OWN_DOMAIN, None)
    for value in list(model.graph.initializers.values()):
        value.name = value.name.removeprefix(_PREFIX)
    for value in list(model.graph.initializers.values()):
        _narrow(model.graph, value, onnx_ir)


def _standard(node: Any, onnx_ir: ModuleType) -> None:
    """DequantizeLinear, its codes and zero points in the type that they are written as."""
    bits, signed = node.attributes.pop("bits").as_int(), node.attributes.pop("signed").as_int()
    kind = getattr(onnx_ir.DataType, f"{'' if signed else 'U'}INT{bits}")
    scales = node.inputs[1].const_value
    for place in (0, 2)[: len(node.inputs) - 1]:
        value = node.inputs[place]
        shape = list(node.outputs[0].shape if place == 0 else scales.shape)
        stored = value.const_value.numpy()
        value.const_value = (
            onnx_ir.PackedTensor(stored, kind, shape=onnx_ir.Shape(shape), name=value.name)
            if bits < 8
            else onnx_ir.tensor(stored.view("int8" if signed else "uint8"), name=value.name)
        )
        value.shape, value.dtype = onnx_ir.Shape(shape), kind
    node.domain, node.version = "", None


def _narrow(graph: Any, value: Any, onnx_ir: ModuleType) -> None:
    """Store float32 numbers that 16 bits hold in 16 bits, behind a node that widens them, which engines run once, in loading."""
    if value.dtype != onnx_ir.DataType.FLOAT or value.const_value.size < _SMALL:
        return
    held = in_16_bits(torch.from_numpy(value.const_value.numpy().copy()))
    if held is None:
        return
    wide = onnx_ir.node("Cast", [value], {"to": onnx_ir.DataType.FLOAT}, name=f"{value.name}.widened")
    wide.outputs[0].name, wide.outputs[0].shape, wide.outputs[0].dtype = f"{value.name}.float32", value.shape, value.dtype
    for node, place in [use for use in value.uses() if use.node is not wide]:
        node.replace_input_with(place, wide.outputs[0])
    graph.insert_before(next(iter(graph)), wide)
    value.const_value = onnx_ir.tensor(held, name=value.name)
    value.dtype = value.const_value.dtype


def _name_axes(model: Any, onnx_ir: ModuleType) -> None:
    """The mask covers what is past and what is new."""
    batch, _ = model.graph.inputs[0].shape
    model.graph.inputs[1].shape = onnx_ir.Shape([batch, "past + sequence"])
