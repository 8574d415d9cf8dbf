"""What a method is: the roles, the paper it comes from, and the statistics that it asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor, Part


@dataclass(frozen=True)
class Paper:
    title: str
    arxiv: str | None = None
    year: int | None = None


class Accumulator(ABC):
    """A statistic of the inputs of one linear layer, gathered batch by batch; constructed with the number of features."""

    by_sequence: ClassVar[bool] = False  # whether it must know where a sequence ends

    def __init__(self, features: int) -> None:
        self.features = features

    @abstractmethod
    def update(self, inputs: Tensor, weights: Tensor | None = None) -> None:
        """Add token vectors `inputs [tokens, features]`, each counted `weights [tokens]` times (default 1).

        One that is told `by_sequence` may get `[sequences, tokens, features]` as well, and weights of the leading sizes.
        """

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add everything that `other` has seen."""


A = TypeVar("A", bound=Accumulator)


class Statistics:
    """The accumulators gathered for one linear input, looked up by class: `statistics[Hessian]`.

    `sensitivities` holds, by layer name, what the method said of the loss's gradients, where it uses them; inside
    `compress` there is the one layer's alone, as `sensitivity`. `choices` likewise holds what the method's `plan` chose.
    """

    def __init__(
        self,
        *accumulators: Accumulator,
        tokens: int = 0,
        sensitivities: Mapping[str, Tensor] | None = None,
        choices: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._by_type = {type(accumulator): accumulator for accumulator in accumulators}
        self.tokens = tokens
        self.sensitivities = dict(sensitivities or {})
        self.choices = dict(choices or {})

    def __getitem__(self, kind: type[A]) -> A:
        if kind not in self._by_type:
            raise InputError(f"the statistic {kind.__name__} was not gathered; name it in the method's `needs`")
        return self._by_type[kind]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Accumulator]:
        return iter(self._by_type.values())

    @property
    def sensitivity(self) -> Tensor:
        """The only layer's sensitivity. Raises InputError where none, or more than one layer's, was gathered."""
        if len(self.sensitivities) != 1:
            raise InputError(f"{len(self.sensitivities)} layers' sensitivities were gathered where one is read; set `uses_gradients`")
        return next(iter(self.sensitivities.values()))

    @property
    def choice(self) -> Tensor | None:
        """What was planned for the only layer, None where nothing was. Raises InputError where more than one layer's is held."""
        if len(self.choices) > 1:
            raise InputError(f"{len(self.choices)} layers' choices are held where one is read; `of` a layer would be right")
        return next(iter(self.choices.values()), None)

    def of(self, layer: str) -> Statistics:
        """The same accumulators with one layer's sensitivity and choice alone."""
        mine = {layer: self.sensitivities[layer]} if layer in self.sensitivities else {}
        chosen = {layer: self.choices[layer]} if layer in self.choices else {}
        return Statistics(*self, tokens=self.tokens, sensitivities=mine, choices=chosen)


class Method:
    """Base of the roles. A method is a frozen dataclass; its fields are its hyperparameters, its module's stem its name."""

    paper: ClassVar[Paper]
    baseline: ClassVar[str | None] = None  # the method that this one must beat at equal bits
    needs: ClassVar[tuple[type[Accumulator], ...]] = ()
    inputs: ClassVar[Literal["propagated", "original"]] = "propagated"  # what its statistics see, where a run does not say

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def family(cls) -> str:
        return cls.__module__.split(".")[-2]


class GradientMethod(Method, ABC):
    """A method of linear layers that may ask what the loss's gradients say of them."""

    uses_gradients: ClassVar[bool] = False  # whether `sensitivity` is to be summed over the calibration text

    def sensitivity(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What one sample's loss gradient says of a layer; both `[out, in]` float32. Summed over the samples."""
        raise NotImplementedError(f"{self.name()} says that it uses gradients, but not how")

    def tuning(self) -> Tuning | None:
        """How the whole model is trained once all blocks are compressed (pipeline/tune.py), or None."""
        return None

    def reopen(self, stored: Any, bias: Tensor | None) -> nn.Module | None:
        """The stand-in (a LearnedLinear) of a layer that is stored (a StoredLinear), for `tuning`; None: TunedLinear."""
        return None


@dataclass(frozen=True)
class Stacking:
    """How the terms of all layers are ranked once the last block is stored, so that any number of them can be loaded.

    Every layer keeps its first term. "average": of the layers with as many terms, the one whose next term lowers perplexity on
    the first `windows` of the calibration text most comes first; "random": drawn by `seed` (BitStack, section 3.3).
    """

    order: Literal["average", "random"] = "average"
    windows: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Profile:
    """How much the next token's loss rises, in nats, when a method's `trial` stands in for a few layers and all others are dense.

    `unit`: what is replaced together, a layer, all layers of a block, or all of one name in all blocks; the rise is divided
    evenly between them. The loss is that of the first `windows` of the calibration text.
    """

    unit: Literal["layer", "block", "type"]
    windows: int = 8


class LayerMethod(GradientMethod, ABC):
    """Compresses one weight matrix at a time from statistics of its inputs; a pure function of tensors."""

    @abstractmethod
    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        """`weight [out, in]` (float32) to its compressed form; raises NumericsError where it cannot."""

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """All linears that read the same input, by name; override to share work or scales between them."""
        return {name: self.compress(weight, statistics.of(name)) for name, weight in weights.items()}

    def activation(self, statistics: Statistics, weight: CompressedTensor) -> Part | None:
        """The quantizer of what the weight's terms read (a part with `apply(inputs) -> inputs`), or None: weights only."""
        return None

    def offset(self, weight: Tensor, compressed: CompressedTensor, statistics: Statistics) -> Tensor | None:
        """What is added to the outputs of a layer with `weight [out, in]`, `[out]` in the dtype it is stored in, or None."""
        return None

    def rank(self, sensitivities: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Called once with the sums of all layers that this method compresses; what comes back is given to `compress`."""
        return sensitivities

    def plan(self, layers: Iterator[tuple[str, Tensor, Statistics]]) -> Mapping[str, Tensor]:
        """Called once, before the first layer, where a method spends one budget on all the layers that it compresses.

        `layers` gives each layer's name, weight and sensitivity, one at a time. What comes back, by layer name, is that
        layer's `choice` in `compress`; nothing by default, and then `layers` is not read.
        """
        return {}

    def profiling(self) -> Profile | None:
        """What is measured before `plan` (pipeline/profile.py), where it comes as each layer's sensitivity; None: nothing."""
        return None

    def trial(self, weight: Tensor) -> CompressedTensor:
        """What stands in for a layer with `weight [out, in]` while `profiling` measures."""
        raise NotImplementedError(f"{self.name()} asks for a profile, but not of what")

    def stacking(self) -> Stacking | None:
        """How the layers' terms are ranked (pipeline/stack.py) where any prefix of them is a tensor, or None."""
        return None


@dataclass(frozen=True)
class Restoration:
    """A repair of the model between two runs of a block method (PTQ1.61, section 3.4).

    The model is compressed once; low-rank adapters on its compressed weights ("quantized"; "dense": on the original ones, for
    comparison) are trained on the calibration text and merged; what comes out is compressed in the place of the original.
    """

    steps: int
    rank: int = 64
    rate: float = 1e-4
    start: Literal["quantized", "dense"] = "quantized"
    batch_size: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Tuning:
    """Training of the whole compressed model on the calibration text.

    Codes stay and the tensors called `tensors` are learned, unless the method reopens layers otherwise. The loss is that of
    the next token, or, with a `teacher`, the divergence from the dense model's predictions.
    """

    steps: int
    rate: float = 2e-5
    tensors: tuple[str, ...] = ("scales",)
    batch_size: int = 4
    clip: float = 0.3
    seed: int = 0
    teacher: bool = False
    norm_rate: float = 0.0  # of the model's norms; 0 leaves them as they are


class BlockMethod(GradientMethod, ABC):
    """Learns the linears of one block, or of a window of neighbouring blocks, against the dense blocks' own outputs.

    A stand-in takes the place of each linear (layers/learned.py); pipeline/reconstruct.py trains and stores them.
    """

    steps: int  # optimizer steps for each window
    window: int = 1  # blocks trained together
    overlap: int = 0  # blocks that are trained again with their successors
    batch_size: int = 4  # sequences a step
    norm_rate: float = 0.0  # learning rate of the block's norms; 0 leaves them as they are
    look_every: int = 0  # steps between looks at the loss of all sequences, the best of which is gone back to; 0: the last step stays
    sorts_channels: bool = False  # whether `order_channels` is asked
    seed: int = 0

    @abstractmethod
    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        """The stand-in (a LearnedLinear) of a linear layer with `weight [out, in]` (float32)."""

    def begin_group(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor | None], statistics: Statistics
    ) -> dict[str, nn.Module]:
        """Stand-ins of all linears that read the same input, by name; override to share work between them."""
        return {name: self.begin(weight, biases[name], statistics.of(name)) for name, weight in weights.items()}

    def order_channels(self, makers: Sequence[Tensor]) -> Tensor | None:
        """The order `[channels]` in which inner channels of a block are put before it is compressed; None: they stay.

        `makers` are the weights `[channels, in]` of the linear layers that make the channels (gate and up of a gated MLP); linear
        layers alone read them. The block computes the same, and nothing of it is stored. In `begin` the order is the makers'
        `statistics.choice`. Sensitivities are of the old order.
        """
        return None

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Of the window's `outputs`; targets are the dense window's on the dense model's inputs, and on the same inputs as here."""
        return (outputs.float() - mixed.float()).square().mean()

    def total(self, loss: Tensor, penalty: Tensor, first: tuple[float, float], progress: float) -> Tensor:
        """What a step lowers, of `loss` and the sum of the stand-ins' penalties; `first`: both at the window's first step."""
        return loss + penalty

    def restoration(self) -> Restoration | None:
        """What repairs the model before it is compressed (pipeline/restore.py), or None."""
        return None


class RewriteMethod(Method, ABC):
    """Changes a model in place, without data.

    Its docstring says what is changed: either the function is kept, and outputs are equal before and after, or layers are
    replaced by compressed ones, whose stored bits are counted (`layers.linear.stored_bits`).
    """

    @abstractmethod
    def rewrite(self, model: nn.Module) -> None:
        """Raises InputError where nothing in `model` can be changed, and leaves it as it was."""


@dataclass(frozen=True)
class Stage:
    """One stretch of the training that a TrainingMethod asks for: `steps` of AdamW over `groups`, run by pipeline/stages.py.

    `groups` are the optimizer's, each with `params` and `lr`; the rates rise over the `warmup` share of the steps and fall along
    `shape` down to the share `floor`. Without groups nothing is trained: the statistics of batch normalizations are gathered
    anew over `steps` batches. `before` is called before each step with the share of the stage that is done; `notes` are what
    the method has to say of the model as it is now, for the record.
    """

    name: str
    steps: int
    groups: Sequence[dict[str, Any]] = ()
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    floor: float = 0.0
    clip: float | None = 1.0
    before: Callable[[float], None] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


class TrainingMethod(Method, ABC):
    """Trains a whole model whose weights will be compressed, on batches of inputs and targets."""

    @abstractmethod
    def prepare(self, model: nn.Module) -> nn.Module:
        """`model` with what is trained in the place of its layers. Raises InputError where there is nothing to compress."""

    @abstractmethod
    def stages(self, model: nn.Module) -> Iterator[Stage]:
        """The training of a prepared model, one stage after the other; between two of them the method may change the model."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, step: int) -> Tensor:
        """What a step lowers, of the model's outputs for one batch; `step` counts from 0 in each stage."""

    @abstractmethod
    def finish(self, model: nn.Module) -> nn.Module:
        """The trained model in eval mode, with what is stored in its place."""


class CodecMethod(Method, ABC):
    """Writes signals as bytes."""

    @abstractmethod
    def fit(self, data: Any) -> None: ...

    @abstractmethod
    def encode(self, signal: Tensor) -> bytes: ...

    @abstractmethod
    def decode(self, data: bytes) -> Tensor: ...


class RecoveryMethod(Method, ABC):
    """Recovers signals from few measurements."""

    @abstractmethod
    def fit(self, data: Any) -> None: ...

    @abstractmethod
    def measure(self, signal: Tensor) -> Tensor: ...

    @abstractmethod
    def recover(self, measurements: Tensor) -> Tensor: ...
