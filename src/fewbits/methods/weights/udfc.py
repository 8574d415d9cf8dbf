"""UDFC: channels removed or rounded are replaced by combinations of those that are left, absorbed into the next layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fewbits.core.checks import check_range
from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import Paper, RewriteMethod
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.ranges import SEARCHES, fit_uniform
from fewbits.formats.uniform import Uniform
from fewbits.layers.conv import CompressedConv2d, StoredConv2d
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.layers.static_activation import StaticQuantizer
from fewbits.models.adapter import weight_matrix
from fewbits.models.batchnorm import fold
from fewbits.models.channels import Channels, find_channels
from fewbits.solvers.relu import relu_inner, relu_series
from fewbits.solvers.ridge import ridge

_REPAIRS = ("none", "merging", "pruned", "scalar", "full")
_CRITERIA = ("l2", "l1", "median")
_OFFSETS = ("mean", "bias")
_SPACES = ("filters", "activations")
_LEAST_SCALE = 2.0**-24  # of fp16: a filter that is smaller yet is stored as zeros


@dataclass(frozen=True)
class Udfc(RewriteMethod):
    """Prunes inner channels and rounds what is left, and mends the next layer by ridge regression between filters; no data.

    A channel is its filter w, with the batch normalization folded in, and its offset b. What the removed channel j did is
    approximated by kept ones, s_j = argmin ||w_j - sum s_ij w^_i||^2 + a1 (b_j - sum s_ij b_i)^2 + a2 ||s_j||^2, which the
    layers that read them absorb before they are rounded themselves; front to back. Gate and up of a gated MLP make one
    channel: given the gate it is linear in up, so its inner products are the products of both layers' inner products.

    `share` of the inner channels is removed, those with the smallest norm (`criterion`; "median": nearest to all others).
    `bits` None keeps the weights dense. `repair`: "none"; "merging", each removed channel to the one most alike; "pruned",
    the regression for removed channels; "scalar", also one factor for each rounded channel; "full", also the regression of
    its rounding error on all kept ones. a1 = `bias_weight` * mean diag(K K^T) / mean variance of the channels as the batch
    normalization gives it (1 without one), a2 = `penalty` * mean diag(K K^T), K the kept filters. `offset`: "mean", the
    channel's mean, the normalization's beta; "bias", the paper's folded bias. `space`: "filters", the paper's inner products;
    "activations", covariances of channels behind a ReLU (of any activation), the means that are missed go into biases.

    Stored: smaller convolutions and linear layers, one symmetric uniform term with an fp16 scale a row, biases in fp16; no
    masks or indices. With convolutions all layers are rounded, else MLPs alone. Depthwise convolutions are not pruned, and
    mended by the scalar. With `activation_bits` layers that read the channels of one normalized layer round their inputs, on
    a grid that reaches six standard deviations beyond the largest mean that the normalization gives. Raises InputError for
    values out of range and for a model in which no layer was found.
    """

    share: float = 0.3
    bits: int | None = 6
    activation_bits: int | None = None
    bias_weight: float = 0.1
    penalty: float = 0.1
    offset: Literal["mean", "bias"] = "mean"
    space: Literal["filters", "activations"] = "filters"
    criterion: Literal["l2", "l1", "median"] = "l2"
    repair: Literal["none", "merging", "pruned", "scalar", "full"] = "full"
    search: str = "minmax"

    paper: ClassVar[Paper] = Paper("Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning", "2308.07209", 2023)
    baseline: ClassVar[str | None] = "rtn"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise InputError(f"share={self.share} is out of range; 0 to less than 1 would be right")
        if self.bits is not None:
            check_range("bits", self.bits, 2, 8)
        if self.activation_bits is not None:
            check_range("activation_bits", self.activation_bits, 2, 16)
            if self.bits is None:
                raise InputError("activation_bits rounds what compressed layers read; bits for the weights as well would be right")
        chosen = (("criterion", self.criterion, _CRITERIA), ("repair", self.repair, _REPAIRS), ("offset", self.offset, _OFFSETS))
        for name, value, known in (*chosen, ("search", self.search, SEARCHES), ("space", self.space, _SPACES)):
            if value not in known:
                raise InputError(f"{name}={value!r} is not known; {', '.join(map(repr, known))} are")
        if self.bias_weight < 0 or self.penalty < 0:
            raise InputError(f"bias_weight={self.bias_weight} or penalty={self.penalty} is out of range; 0 or more would be right")

    @torch.no_grad()
    def rewrite(self, model: nn.Module) -> None:
        """Replaces the layers of `model` by smaller compressed ones (dense ones for `bits` None); folds batch normalizations."""
        channels = find_channels(model)
        if not channels.layers:
            raise InputError(f"{type(model).__name__} has no convolution, and no MLP that could be followed")
        layers = self._compressed(model, channels)
        for layer in channels.layers:
            model.set_submodule(layer.name, layers[layer.name].compressed())
            if layer.norm is not None:
                model.set_submodule(layer.norm, nn.Identity())

    def _compressed(self, model: nn.Module, channels: Channels) -> dict[str, _Layer]:
        layers = {}
        for one in channels.layers:
            norm = model.get_submodule(one.norm) if one.norm else None
            layers[one.name] = _Layer(model.get_submodule(one.name), norm, self.offset)
        order = list(layers)
        complete = {max(link.producers, key=order.index): link for link in channels.links}
        waiting = {name for link in channels.links for name in link.producers}
        for name, layer in layers.items():
            if name in complete:  # the last of its producers: all that they read is final by now
                link = complete[name]
                mixing, shift = self._prune([layers[one] for one in link.producers], link.one_to_one)
                for reader in link.consumers:
                    layers[reader].absorb(mixing, shift)
                    if self.activation_bits is not None and len(link.producers) == 1:
                        layers[reader].activation = layer.grid(self.activation_bits, link.rectified)
            elif name not in waiting:
                layer.round(self.bits, self.search)
        return layers

    def _prune(self, makers: list[_Layer], one_to_one: bool) -> tuple[Tensor, Tensor]:
        """Cuts and rounds the layers that make a link's channels; what its readers absorb.

        That is the factors `[kept, all]` by which kept channels stand in for all, and the constants `[all]` that they miss.
        """
        count = len(makers[0].weight)
        removed = 0 if one_to_one else min(round(self.share * count), count - 1)
        kept = _importance([layer.weight.flatten(1) for layer in makers], self.criterion).argsort(stable=True)[removed:].sort().values
        precisions = [layer.input_precision() for layer in makers]
        original = self._views(makers, precisions)
        for layer in makers:
            layer.keep(kept)
            layer.round(self.bits, self.search)
        identity = torch.eye(count, dtype=torch.float64, device=kept.device)[kept]
        nothing = torch.zeros_like(identity[0])
        if self.repair == "none" or (not removed and self.bits is None):
            return identity, nothing
        made = self._views(makers, precisions)
        gram, cross = _inner(made, made), _inner(made, original)
        if self.repair == "merging":
            return _merged(identity, gram, cross, _inner(original, original).diagonal()), nothing
        mixing = self._solved(identity, gram, cross, one_to_one)
        if made[0].mean is None or original[0].mean is None:
            return mixing, nothing
        return mixing, original[0].mean - made[0].mean @ mixing

    def _views(self, makers: list[_Layer], precisions: list[Tensor]) -> list[_View]:
        """What the regression sees of the channels; the gate of a gated MLP counts with its mean, up is linear."""
        if self.space == "filters" or self.repair == "merging":
            return [layer.filters(self.bias_weight * precision) for layer, precision in zip(makers, precisions, strict=True)]
        first = makers[0].rectified(precisions[0], centred=len(makers) == 1)
        return [first, *(layer.filters(self.bias_weight * one) for layer, one in zip(makers[1:], precisions[1:], strict=True))]

    def _solved(self, identity: Tensor, gram: Tensor, cross: Tensor, one_to_one: bool) -> Tensor:
        """The paper's closed form; `gram [kept, kept]` and `cross [kept, all]` hold inner products with what was made of the kept."""
        kept = identity.bool().any(0)
        penalty = float(self.penalty * gram.diagonal().mean())
        if not bool(gram.any()):
            return identity  # nothing is left that anything could be made of
        scalar = (cross[:, kept].diagonal() + penalty) / (gram.diagonal() + penalty).clamp(min=torch.finfo(gram.dtype).tiny)
        if one_to_one:
            return identity if self.repair == "pruned" else identity * scalar[:, None]
        damage = cross.clone()
        damage[:, kept] -= gram  # of the kept channels, what rounding took away
        if self.repair != "full":
            damage[:, kept] = 0
            identity = identity if self.repair == "pruned" else identity * scalar[:, None]
        return identity + ridge(gram, damage, penalty)


class _Layer:
    """A layer on its way: filters `[out, in, taps]` and biases `[out]` in float64, with its batch normalization folded in."""

    def __init__(self, module: Any, norm: Any, offset: str) -> None:
        weight = module.weight if isinstance(module, nn.Conv2d) else weight_matrix(module)
        self.module = module
        self.tensor: CompressedTensor | None = None
        self.weight, self.bias = weight.double(), None if module.bias is None else module.bias.double()
        self.activation: StaticQuantizer | None = None
        self.reach: Tensor | None = None  # how far each channel comes above and below zero
        self.power = torch.ones((), dtype=torch.float64, device=weight.device)  # variance of what the layer puts out
        if norm is not None and norm.weight is not None and norm.bias is not None:
            six = 6 * norm.weight.double().abs()
            self.reach = torch.stack([norm.bias.double() + six, six - norm.bias.double()])
        if norm is not None:
            self.weight, self.bias = fold(self.weight, self.bias, norm)
            self.power = self.power if norm.weight is None else norm.weight.double().square().mean()
        self.weight = self.weight.reshape(*self.weight.shape[:2], -1)
        self.offset = torch.zeros_like(self.weight[:, 0, 0]) if self.bias is None else self.bias
        if norm is not None and offset == "mean":
            self.offset = torch.zeros_like(self.offset) if norm.bias is None else norm.bias.double()

    def input_precision(self) -> Tensor:
        """One over the inputs' mean square, as far as filters and the variance of outputs tell."""
        return self.weight.square().sum((1, 2)).mean() / self.power.clamp(min=1e-30)

    def filters(self, bias_weight: Tensor) -> _View:
        """Squared distances between rows are the paper's error of one channel in place of another."""
        return _View(torch.cat([self.weight.flatten(1), bias_weight.sqrt() * self.offset[:, None]], dim=1))

    def rectified(self, precision: Tensor, centred: bool) -> _View:
        """The channels behind a ReLU, their inputs taken for independent and Gaussian."""
        flat = self.weight.flatten(1)
        norms = flat.norm(dim=1)
        series = relu_series(self.offset, norms / precision.sqrt().clamp(min=1e-30))
        mean = series[:, 0].clone()
        if centred:
            series[:, 0] = 0
        return _View(flat / norms.clamp(min=1e-30)[:, None], series, mean if centred else None)

    def grid(self, bits: int, rectified: bool) -> StaticQuantizer | None:
        """For what the layer puts out (DFQ, arXiv 1906.04721, section 4.3), None where no normalization says how far that reaches."""
        if self.reach is None:
            return None
        reach = self.reach[0] if rectified else self.reach.amax(0)
        return StaticQuantizer.for_largest(reach.max().clamp(min=0), bits, signed=not rectified)

    def keep(self, rows: Tensor) -> None:
        self.weight, self.offset = self.weight[rows], self.offset[rows]
        self.reach = None if self.reach is None else self.reach[:, rows]
        self.bias = None if self.bias is None else self.bias[rows]

    def absorb(self, mixing: Tensor, shift: Tensor) -> None:
        """Read kept channels in place of all by `mixing [kept, all]`, and the constants `shift [all]` besides.

        A flattened image has many columns a channel.
        """
        if bool(shift.any()):
            missed = self.weight.sum((1, 2)) * shift if self._is_depthwise() else self._by_channel(len(shift)).sum(2) @ shift
            self.bias = missed if self.bias is None else self.bias + missed
        if self._is_depthwise():
            self.weight = self.weight * mixing.diagonal()[:, None, None]
            return
        mixed = torch.einsum("kc,ocp->okp", mixing, self._by_channel(mixing.shape[1]))
        self.weight = mixed.reshape(len(mixed), -1, self.weight.shape[2])

    def _is_depthwise(self) -> bool:
        return isinstance(self.module, nn.Conv2d) and self.module.groups > 1

    def _by_channel(self, channels: int) -> Tensor:
        """`[out, channels, weights that read a channel]`."""
        return self.weight.reshape(len(self.weight), channels, -1)

    def round(self, bits: int | None, search: str) -> None:
        """Store the filters in `bits`, the biases in fp16, and go on with what is stored."""
        if bits is None:
            return
        flat = self.weight.flatten(1).float()
        scales, zeros = fit_uniform(flat, bits, symmetric=True, search=search)
        term = Uniform.nearest(flat, scales.clamp(min=_LEAST_SCALE), zeros, bits=bits, group_size=flat.shape[1], symmetric=True)
        self.tensor = CompressedTensor((term,))
        self.weight = term.decode().double().view_as(self.weight)
        if self.bias is not None:
            self.bias = self.bias.half().double()
            if not bool(torch.isfinite(self.bias).all()):
                raise NumericsError("a bias does not fit in fp16 after its batch normalization was folded in; bits=None would be right")

    def compressed(self) -> nn.Module:
        """The layer that takes the old one's place."""
        if self.tensor is None:
            return self._dense()
        bias = None if self.bias is None else self.bias.half()
        if isinstance(self.module, nn.Conv2d):
            return CompressedConv2d(StoredConv2d.like(self.module, self.tensor, self.activation), bias)
        return CompressedLinear(StoredLinear(self.tensor, self.activation), bias)

    def _dense(self) -> nn.Module:
        old, (outputs, inputs, _) = self.module, self.weight.shape
        options = {"bias": self.bias is not None, "device": self.weight.device, "dtype": old.weight.dtype}
        if isinstance(old, nn.Conv2d):
            options |= {"stride": old.stride, "padding": old.padding, "dilation": old.dilation, "padding_mode": old.padding_mode}
            made = skip_init(nn.Conv2d, inputs * old.groups, outputs, old.kernel_size, groups=old.groups, **options)
        else:
            made = skip_init(nn.Linear, inputs, outputs, **options)
        made.weight.copy_(self.weight.view_as(made.weight))
        if made.bias is not None:
            made.bias.copy_(self.bias)
        return made.requires_grad_(old.weight.requires_grad)


@dataclass(frozen=True)
class _View:
    """Channels as vectors `[channels, size]`; with a series, directions whose inner products are correlations before a ReLU."""

    vectors: Tensor
    series: Tensor | None = None
    mean: Tensor | None = None  # behind the ReLU, where inner products are covariances


def _inner(left: list[_View], right: list[_View]) -> Tensor:
    """Inner products of channels; those of a gated channel are the product of both layers' (given the gate, up is linear)."""
    product = torch.ones((), dtype=torch.float64, device=left[0].vectors.device)
    for one, other in zip(left, right, strict=True):
        plain = one.vectors @ other.vectors.T
        if one.series is not None and other.series is not None:
            plain = relu_inner(one.series, other.series, plain.clamp(-1, 1))
        product = product * plain
    return product


def _importance(filters: list[Tensor], criterion: str) -> Tensor:
    """What a channel is worth, `[channels]`, from the filters `[channels, inputs]` of each layer that makes it."""
    if criterion == "median":  # FPGM: the filter nearest to all others is the one that they can stand in for
        joined = torch.cat(filters, dim=1)
        return torch.cdist(joined, joined).sum(1)
    norms = torch.stack([one.norm(p=1 if criterion == "l1" else 2, dim=1) for one in filters])
    return norms.prod(0)


def _merged(identity: Tensor, gram: Tensor, cross: Tensor, lengths: Tensor) -> Tensor:
    """Neuron merging: each removed channel is taken for the kept one of the largest cosine, scaled by the ratio of norms."""
    own = gram.diagonal().sqrt().clamp(min=1e-30)
    cosine = cross / own[:, None] / lengths.sqrt().clamp(min=1e-30)
    best = cosine.argmax(0)
    columns = torch.arange(len(lengths), device=best.device)
    alike = (cosine[best, columns] > 0) & ~identity.bool().any(0)  # one that is like none of the kept stays away
    merged = identity.clone()
    merged[best[alike], columns[alike]] = lengths.sqrt()[alike] / own[best[alike]]
    return merged
