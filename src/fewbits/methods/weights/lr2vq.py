"""LR2VQ: subvectors of weights trained as short vectors times one decoder, and clustered in the shorter dimension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import Paper, Stage, TrainingMethod
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.additive import Additive
from fewbits.formats.decoded_codes import DecodedCodes
from fewbits.layers.learned_weight import Layer, LearnedWeight, filters
from fewbits.layers.straight_through import straight_through
from fewbits.solvers.low_rank import low_rank
from fewbits.solvers.vector_kmeans import cluster_vectors, nearest

_COLDEST = 0.01  # of the first temperature, where soft codes are made hard


@dataclass(frozen=True)
class Lr2vq(TrainingMethod):
    """Vector quantization of convolutions and linear layers through a trained low-rank form; `prepare` changes the model in place.

    A layer's weight is cut into N subvectors of length m: `kernels` neighbouring input channels' whole kernels of a filter,
    `pointwise` channels of a 1 x 1 convolution, `linear` inputs of a linear layer. They are R D, R `[N, d]` and one decoder D
    `[d, m]` a layer, from singular values, and R, D and all other parameters are trained for `pretrain_steps`. D is then made
    orthonormal, so that distances between rows of R are those between subvectors, and R is clustered into C `[k, d]`; with the
    codes fixed, C, D and the rest are trained for `finetune_steps`, or, `assignments="soft"`, the first half of these with
    R attending to C (softmax of -distance / temperature), ever colder. `share` is d / m: 1 is plain vector quantization, with
    D = I; None takes each layer's smallest d whose low-rank error is no larger than its clustering error.

    Stored: codes of log2 k bits, and C D `[k, m]` in fp16 ("merged"), C and D ("factored"), or whichever is smaller. A
    layer's k is lowered to a power of two of at most N / 4. Kept dense: the first convolution, layers of fewer than `least`
    weights or of rows shorter than m; the record names them. Statistics of batch normalizations are gathered anew at the end.
    Departures: no weight decay, since decay of R and D is none of the weights. `train_decoder=False` and `codebook="random"`
    are ablations. Raises InputError for values out of range, and where no layer can be compressed.
    """

    share: float | None = 0.5
    entries: int = 256
    linear_entries: int = 2048
    kernels: int = 2
    pointwise: int = 4
    linear: int = 4
    least: int = 2048
    pretrain_steps: int = 1000
    finetune_steps: int = 1000
    norm_steps: int = 50
    rate: float = 1e-3
    train_decoder: bool = True
    codebook: Literal["kmeans", "random"] = "kmeans"
    assignments: Literal["fixed", "soft"] = "fixed"
    temperature: float = 1.0  # of soft codes, over the mean squared distance between a vector and its centroid
    storage: Literal["merged", "factored", "smaller"] = "merged"
    seed: int = 0

    paper: ClassVar[Paper] = Paper("LR2VQ: Learning Low-Rank Representations for Model Compression", "2211.11397", 2022)

    def __post_init__(self) -> None:
        if self.share is not None and not 0 < self.share <= 1:
            raise InputError(f"share={self.share} is out of range; above 0 to 1, or none to choose, would be right")
        check_range("entries", self.entries, 2, 2**16)
        check_range("linear_entries", self.linear_entries, 2, 2**16)
        for name in ("kernels", "pointwise", "linear", "rate", "temperature", "norm_steps"):
            check_positive(name, getattr(self, name), getattr(Lr2vq, name))
        for name in ("least", "pretrain_steps", "finetune_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)} is out of range; 0 or more would be right")
        choices = {"codebook": ("kmeans", "random"), "assignments": ("fixed", "soft"), "storage": ("merged", "factored", "smaller")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def prepare(self, model: nn.Module) -> nn.Module:
        layers = {name: module for name, module in _layers(model) if self._kept_because(model, module) is None}
        if not layers:
            reasons = ", ".join(f"{name} ({self._kept_because(model, module)})" for name, module in _layers(model))
            raise InputError(f"no layer of {type(model).__name__} can be compressed: {reasons or 'it has no convolution or linear layer'}")
        for name, layer in layers.items():
            model.set_submodule(name, LowRankCodes(self, layer))
        return model

    def stages(self, model: nn.Module) -> Iterator[Stage]:
        """Low-rank training, clustering, fine-tuning, and the statistics of batch normalizations."""
        learned = {name: module for name, module in model.named_modules() if isinstance(module, LowRankCodes)}
        kept = {name: self._kept_because(model, module) for name, module in _layers(model)}
        said = {name: {"dimension": layer.dimension, "low_rank_error": layer.low_rank_error} for name, layer in learned.items()}
        yield self._stage(model, "low rank", self.pretrain_steps, {"layers": said, "kept": kept})
        for layer in learned.values():
            layer.cluster()
        errors: dict[str, Any] = {"cluster_error": {name: layer.cluster_error for name, layer in learned.items()}}
        left = self.finetune_steps
        if self.assignments == "soft":
            left -= (soft := self.finetune_steps // 2)
            yield self._stage(model, "soft codes", soft, errors, list(learned.values()))
            for layer in learned.values():
                layer.harden()
            errors = {}
        yield self._stage(model, "codebooks", left, errors)
        yield Stage("normalizations", self.norm_steps)

    def _stage(self, model: nn.Module, name: str, steps: int, notes: dict[str, Any], soft: list[LowRankCodes] | None = None) -> Stage:
        def cool(done: float) -> None:
            for layer in soft or ():
                layer.progress = done

        group = {"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "lr": self.rate}
        return Stage(name, steps, [group], floor=1e-3, clip=None, before=cool, notes=notes)

    def loss(self, outputs: Any, targets: Any, step: int) -> Tensor:
        """Mean cross-entropy of the classes `targets [batch]`, in nats, for scores `outputs [batch, classes]`."""
        return nn.functional.cross_entropy(outputs, targets)

    def finish(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, LowRankCodes):
                model.set_submodule(name, module.finish())
        return model.eval()

    def length(self, layer: Layer) -> int:
        """m, the length of a layer's subvectors."""
        if isinstance(layer, nn.Linear):
            return self.linear
        taps = layer.kernel_size[0] * layer.kernel_size[1]
        return self.pointwise if taps == 1 else self.kernels * taps

    def count(self, layer: Layer, subvectors: int) -> int:
        """k, the entries of a layer's codebook: at least four subvectors for each."""
        asked = self.linear_entries if isinstance(layer, nn.Linear) else self.entries
        return max(2, min(asked, 2 ** ((subvectors // 4).bit_length() - 1)))

    def dimension(self, subvectors: Tensor, count: int) -> int:
        """d of a layer with `subvectors [N, m]` and `count` centroids."""
        length = subvectors.shape[1]
        if self.share is not None:
            return max(1, round(self.share * length))
        low, high = 1, length
        while low < high:  # the one error falls in d, the other rises
            middle = (low + high) // 2
            lost, clustered = split_error(subvectors, middle, count, self.seed)
            low, high = (low, middle) if lost <= clustered else (middle + 1, high)
        return low

    def _kept_because(self, model: nn.Module, layer: Layer) -> str | None:
        """Why a layer stays dense, None where it does not."""
        if layer is next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None):
            return "first convolution"
        if layer.weight.numel() < self.least:
            return f"fewer than {self.least} weights"
        if layer.weight[0].numel() < self.length(layer):
            return f"rows shorter than {self.length(layer)}"
        return None


class LowRankCodes(LearnedWeight):
    """Subvectors as R D at first, as C[codes] D once clustered; rounded as they will be stored from then on."""

    codebook: nn.Parameter
    codes: Tensor

    def __init__(self, method: Lr2vq, layer: Layer) -> None:
        super().__init__(layer)
        self.method, self.length, self.state, self.progress = method, method.length(layer), "low rank", 0.0
        self.columns = layer.weight[0].numel()
        cut = subvectors(filters(layer), self.length)
        self.count = method.count(layer, len(cut))
        vectors, decoder = split(cut, method.dimension(cut, self.count))
        self.dimension = len(decoder)
        self.low_rank_error = _relative(cut - vectors @ decoder, cut)
        self.vectors = nn.Parameter(vectors)
        self.decoder = nn.Parameter(decoder, requires_grad=method.train_decoder)
        self.warmth = self.cluster_error = 0.0

    @torch.no_grad()
    def cluster(self) -> None:
        """C and the codes from R, in the gauge in which D's rows are orthonormal."""
        orthogonal, triangle = torch.linalg.qr(self.decoder.T)
        self.decoder.copy_(orthogonal.T)
        self.vectors.copy_(self.vectors @ triangle.T)
        vectors = self.vectors.cpu()
        if self.method.codebook == "kmeans":
            centroids, codes = cluster_vectors(vectors, self.count, seed=self.method.seed)
        else:
            drawn = torch.randn(self.count, self.dimension, generator=torch.Generator().manual_seed(self.method.seed))
            centroids = vectors.mean(0) + vectors.std(0) * drawn
            codes = nearest(vectors, centroids)[0]
        missed = vectors - centroids[codes]
        self.cluster_error = _relative(missed, vectors)
        self.warmth = self.method.temperature * float(missed.square().sum(1).mean())
        self.codebook = nn.Parameter(centroids.to(self.vectors))
        self.register_buffer("codes", codes.to(self.vectors.device))
        self.state = self.method.assignments
        self.vectors.requires_grad_(self.state == "soft")

    @torch.no_grad()
    def harden(self) -> None:
        """The codes of the nearest centroids, which stay from now on."""
        self.codes = nearest(self.vectors, self.codebook)[0]
        self.vectors.requires_grad_(False)
        self.state = "fixed"

    def matrix(self) -> Tensor:
        if self.state == "low rank":
            whole = self.vectors @ self.decoder
        elif self.state == "soft":
            distance = torch.cdist(self.vectors, self.codebook).square()
            warmth = max(self.warmth * _COLDEST**self.progress, torch.finfo(distance.dtype).tiny)
            whole = torch.softmax(-distance / warmth, dim=1) @ self._merged()
        else:
            whole = nn.functional.embedding(self.codes, self._merged())  # its gradient is the sum over each entry's members
        return whole.view(self.size[0], -1)[:, : self.columns]

    def _merged(self) -> Tensor:
        """C D `[k, m]`, as the stored numbers give it."""
        if self._is_factored():
            return _half(self.codebook) @ _half(self.decoder)
        return _half(self.codebook @ self.decoder)

    def _is_factored(self) -> bool:
        smaller = self.dimension * (self.count + self.length) < self.count * self.length
        return self.method.storage == "factored" or (self.method.storage == "smaller" and smaller)

    def tensor(self) -> CompressedTensor:
        codes = self.codes.view(self.size[0], -1)
        if self._is_factored():
            term: Term = DecodedCodes.from_codes(codes, self.codebook.half(), self.decoder.half(), columns=self.columns)
        else:
            term = Additive.from_codes(codes[:, :, None], (self.codebook @ self.decoder).half()[None], columns=self.columns)
        return CompressedTensor((term,))


def subvectors(matrix: Tensor, length: int) -> Tensor:
    """Neighbouring columns of `matrix [rows, columns]` as `[rows * groups, length]`, row by row; a last short one ends in zeros."""
    return nn.functional.pad(matrix, (0, -matrix.shape[1] % length)).reshape(-1, length)


def split(vectors: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """R `[N, dimension]` and D `[dimension, m]` of the nearest R D, D with orthonormal rows; the identity where nothing is lost."""
    length = vectors.shape[1]
    if dimension == length or dimension > len(vectors):
        return vectors.clone(), torch.eye(length, dtype=vectors.dtype, device=vectors.device)
    left, right = low_rank(vectors, dimension)
    orthogonal, triangle = torch.linalg.qr(right.T)
    return left @ triangle.T, orthogonal.T.contiguous()


def split_error(vectors: Tensor, dimension: int, count: int, seed: int = 0) -> tuple[float, float]:
    """What `vectors [N, m]` lose by R D, and by `count` centroids in the place of R's rows; squared, over their squares."""
    short, decoder = split(vectors, dimension)
    centroids, codes = cluster_vectors(short.cpu(), count, seed=seed)
    missed = (short.cpu() - centroids[codes]).to(decoder) @ decoder
    return _relative(vectors - short @ decoder, vectors), _relative(missed, vectors)


def _relative(missed: Tensor, whole: Tensor) -> float:
    return float(missed.square().sum() / whole.square().sum().clamp(min=torch.finfo(whole.dtype).tiny))


def _half(values: Tensor) -> Tensor:
    return straight_through(values, values.detach().half().float())


def _layers(model: nn.Module) -> list[tuple[str, Layer]]:
    """Convolutions and linear layers by name, but those that are learned."""
    inside = {module.layer for module in model.modules() if isinstance(module, LearnedWeight)}
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [(name, cast(Layer, module)) for name, module in found if module not in inside]
