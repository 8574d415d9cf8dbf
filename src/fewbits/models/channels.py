"""Inner channels of a model, found by following its tensors: who makes them, and who reads them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from fewbits.models.adapter import LINEAR
from fewbits.models.batchnorm import NORMS, can_fold

LAYERS = (nn.Conv2d, *LINEAR)

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOLINGS = {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"}
_STRAIGHT = (nn.Identity, nn.Dropout, nn.Dropout2d)
_BENDS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardswish, nn.Hardtanh)
_BENDINGS = {"relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus", "hardswish", "hardtanh"}
_ELEMENTWISE = {"add", "iadd", "sub", "mul", "imul", "truediv", "div", "pow", "neg", "square"}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer and the batch normalization right behind it, by their names."""

    name: str
    norm: str | None


@dataclass(frozen=True)
class Link:
    """Channels that `consumers` read and nothing else does, behind at most a batch normalization, activation and pooling.

    `producers` is one layer, or gate and up of a gated MLP. `one_to_one`: one side is a depthwise convolution, each of
    whose filters has an input of its own, so channels cannot stand in for each other. A consumer's input may hold several
    columns for each channel, one after another, where a flattened image lies between. `rectified`: all that is read lies
    behind a ReLU, at most with pooling in between.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    one_to_one: bool = False
    rectified: bool = False


@dataclass(frozen=True)
class Channels:
    """What was found, in the order of execution. `layers` holds all layers of graphs with convolutions, else those in links."""

    layers: tuple[Layer, ...]
    links: tuple[Link, ...]


def find_channels(model: nn.Module) -> Channels:
    """Trace `model`, or where that fails each of its children in turn, and follow every layer's outputs.

    Layers called more than once or with a weight that something else holds too are left out. In a residual network the
    inner convolutions of a block are linked; what is added up is not. Nothing is changed.
    """
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared = {id(module) for module in model.modules() if isinstance(module, LAYERS) and names[id(module.weight)] > 1}
    layers: list[Layer] = []
    links: list[Link] = []
    for prefix, graph, root in _graphs("", model):
        walk = _Walk(root, graph, shared)
        found = walk.links()
        inside = {name for link in found for name in (*link.producers, *link.consumers)}
        images = any(isinstance(root.get_submodule(name), nn.Conv2d) for name in walk.layers)
        layers += [Layer(prefix + n, prefix + norm if norm else None) for n, norm in walk.layers.items() if images or n in inside]
        for link in found:
            producers, consumers = (tuple(prefix + name for name in side) for side in (link.producers, link.consumers))
            links.append(replace(link, producers=producers, consumers=consumers))
    return Channels(tuple(layers), tuple(links))


class _Tracer(fx.Tracer):
    """Stops at layers of transformers too, which are not PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LAYERS) or super().is_leaf_module(m, module_qualified_name)


def _graphs(prefix: str, module: nn.Module) -> Iterator[tuple[str, fx.Graph, nn.Module]]:
    """Graphs of the largest parts of `module` that can be traced, each with its name (ending in a dot) and module."""
    if isinstance(module, LAYERS) or not any(isinstance(child, LAYERS) for child in module.modules()):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(module)
    except Exception:  # running foreign code on stand-ins for tensors may fail in any way; its parts may still be followed
        for name, child in module.named_children():
            yield from _graphs(f"{prefix}{name}.", child)
        return
    yield prefix, graph, module


@dataclass(frozen=True)
class _Flow:
    """A tensor that holds a layer's channels: which layers', and what happened to them on the way."""

    sources: tuple[str, ...]
    image: bool  # [batch, channels, height, width]; else channels are last, in a flattened image with their pixels
    flattened: bool = False
    bent: bool = False  # an activation or pooling lies behind the layer
    rectified: bool = False  # the last activation was a ReLU, so that nothing is negative


@dataclass
class _Walk:
    """Follows channels through one graph, node by node."""

    root: nn.Module
    graph: fx.Graph
    shared: set[int]
    layers: dict[str, str | None] = field(default_factory=dict)  # every layer, and the norm that folds into it
    flows: dict[fx.Node, _Flow] = field(default_factory=dict)
    readers: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    signed: set[tuple[str, ...]] = field(default_factory=set)  # sources of which somebody reads what may be negative
    lost: set[str] = field(default_factory=set)  # layers whose channels are read by something that cannot be mended

    def __post_init__(self) -> None:
        self.calls = Counter(str(node.target) for node in self.graph.nodes if node.op == "call_module")
        for node in self.graph.nodes:
            flow = self._step(node)
            if flow is not None:
                self.flows[node] = flow

    def links(self) -> list[Link]:
        """Sources that are read by layers alone; the sources of a pair by nothing beside the pair's product."""
        pairs = [sources for sources in self.readers if len(sources) == 2]
        paired = Counter(name for pair in pairs for name in pair)
        found = []
        for sources, readers in self.readers.items():
            alone = all(paired[name] == len(sources) - 1 for name in sources)
            pair_alone = len(sources) == 1 or not any((name,) in self.readers for name in sources)
            if not alone or not pair_alone or self.lost.intersection(sources):
                continue
            one_to_one = any(_is_depthwise(self.root.get_submodule(name)) for name in (*sources, *readers))
            if one_to_one and len(sources) == 2:
                continue
            found.append(Link(sources, tuple(readers), one_to_one, sources not in self.signed))
        order = list(self.layers)
        return sorted(found, key=lambda link: max(order.index(name) for name in link.producers))

    def _step(self, node: fx.Node) -> _Flow | None:
        """The channels that the node's output holds, None where they are nobody's."""
        if node.op == "get_attr":
            self.lost.add(str(node.target).rpartition(".")[0])  # somebody reads a layer's weight past the layer
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return self._layer(node, module) if isinstance(module, LAYERS) else self._module(node, module)
        name = _called(node)
        if _asks_size(node):
            return None  # sizes of images and batches stay as they are, and that of the channels is asked for anew each time
        flows = self._inputs(node)
        if name in _ELEMENTWISE and flows:
            return self._combine(node, flows)
        if len(flows) == 1 and node.args and isinstance(node.args[0], fx.Node) and node.args[0] in self.flows:
            made = _single(node, name, flows[0])
            if made is not None:
                return made
        return self._lose(node)

    def _inputs(self, node: fx.Node) -> list[_Flow]:
        return [self.flows[one] for one in node.all_input_nodes if one in self.flows]

    def _lose(self, node: fx.Node) -> _Flow | None:
        for flow in self._inputs(node):
            self.lost.update(flow.sources)
        return None

    def _layer(self, node: fx.Node, layer: Any) -> _Flow | None:
        """A convolution or linear layer reads channels and makes new ones."""
        name, flows = str(node.target), self._inputs(node)
        if self.calls[name] > 1 or id(layer) in self.shared:
            return self._lose(node)
        for flow in flows:
            if self._reads(layer, flow):
                self.readers.setdefault(flow.sources, []).append(name)
                if not flow.rectified:
                    self.signed.add(flow.sources)
            else:
                self._lose(node)
        self.layers[name] = None
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and not _is_depthwise(layer)
        if grouped:
            self.lost.add(name)  # filters of different groups read different inputs
        return _Flow((name,), isinstance(layer, nn.Conv2d))

    def _reads(self, layer: Any, flow: _Flow) -> bool:
        if isinstance(layer, nn.Conv2d):
            return flow.image and (layer.groups == 1 or _is_depthwise(layer))
        return not flow.image

    def _module(self, node: fx.Node, module: nn.Module) -> _Flow | None:
        flows = self._inputs(node)
        if len(flows) != 1:
            return self._lose(node)
        flow = flows[0]
        if isinstance(module, NORMS):
            source = flow.sources[0]
            behind = node.all_input_nodes[0]
            only = all(user is node or _asks_size(user) for user in behind.users)
            plain = str(behind.target) == source and self.calls[str(node.target)] == 1
            if plain and only and can_fold(module, _outputs(self.root.get_submodule(source))):
                self.layers[source] = str(node.target)
                return flow
        elif isinstance(module, _STRAIGHT):
            return flow
        elif isinstance(module, _BENDS):
            return replace(flow, bent=True, rectified=isinstance(module, (nn.ReLU, nn.ReLU6)))
        elif isinstance(module, _POOLS) and flow.image:
            return replace(flow, bent=True)
        elif isinstance(module, nn.Flatten) and flow.image and (module.start_dim, module.end_dim) == (1, -1):
            return replace(flow, image=False, flattened=True)
        return self._lose(node)

    def _combine(self, node: fx.Node, flows: list[_Flow]) -> _Flow | None:
        """Elementwise arithmetic: with numbers, of one layer's channels with themselves, or of a gate with what it gates."""
        if len(flows) < len(node.all_input_nodes):
            return self._lose(node)  # the other tensor is nobody's
        first = flows[0]
        if all((flow.sources, flow.image, flow.flattened) == (first.sources, first.image, first.flattened) for flow in flows):
            return replace(first, bent=True, rectified=False)
        straight = [flow for flow in flows if not flow.bent]
        if _called(node) in ("mul", "imul") and len(flows) == 2 and len(straight) == 1 and all(len(flow.sources) == 1 for flow in flows):
            gate, up = (next(flow for flow in flows if flow is not straight[0]), straight[0])
            widths = {_outputs(self.root.get_submodule(flow.sources[0])) for flow in flows}
            if len(widths) == 1 and (gate.image, gate.flattened) == (up.image, up.flattened):
                return _Flow((*gate.sources, *up.sources), up.image, up.flattened, bent=True)
        return self._lose(node)


def _single(node: fx.Node, name: str, flow: _Flow) -> _Flow | None:
    """What a function of one tensor does to its channels; None where they are lost."""
    rest = node.args[1:]
    if name in ("dropout", "contiguous"):
        return flow
    if name in _BENDINGS:
        return replace(flow, bent=True, rectified=name.startswith("relu"))
    if not flow.image:
        return None
    if name in _POOLINGS or node.target is nn.functional.max_pool2d:
        return replace(flow, bent=True)
    if name == "flatten" and (rest == (1,) or (not rest and node.kwargs == {"start_dim": 1})):
        return replace(flow, image=False, flattened=True)
    if name in ("view", "reshape") and len(rest) == 2 and isinstance(rest[1], int) and rest[1] == -1:
        return replace(flow, image=False, flattened=True)
    if name == "mean" and not node.kwargs.get("keepdim"):
        axes = rest[0] if len(rest) == 1 else node.kwargs.get("dim")
        if isinstance(axes, (list, tuple)) and sorted(axis % 4 for axis in axes) == [2, 3]:
            return replace(flow, image=False, bent=True)
    return None


def _asks_size(node: fx.Node) -> bool:
    name = _called(node)
    return name in ("size", "dim") or (name == "getattr" and node.args[1] in ("shape", "ndim", "dtype", "device"))


def _called(node: fx.Node) -> str:
    """The name of the function or method of a node, without marks of in-place variants; "" for a module."""
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _outputs(layer: Any) -> int:
    """Channels that a layer makes."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.nf)


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1
