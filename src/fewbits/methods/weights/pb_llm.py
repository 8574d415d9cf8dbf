"""PB-LLM: a few salient weights keep 8 bits, all others one; by error feedback, or by training on text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_group_size, check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Paper, Stage, Statistics, TrainingMethod
from fewbits.core.published import Figure, Published
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.binary import Binary
from fewbits.formats.masked import Codes, Masked, MaskStorage, RowGrid
from fewbits.formats.ranges import fit_uniform, round_codes
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.layers.straight_through import sign_through
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.pipeline.train import Progress, Schedule, text_loss, train
from fewbits.solvers.binary import BinaryFit, fit_binary, outer_entries, top_entries
from fewbits.solvers.error_feedback import Factor, error_feedback, factorize
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class PbLlm(LayerMethod, TrainingMethod):
    """Exactly round(share * rows * columns) salient weights of a matrix at `salient_bits`, the others mu + alpha * sign.

    Without training: saliency is w^2 / U_jj^2 of the original weight ("magnitude": |w|), the grids are fitted once, and the
    columns are walked over with GPTQ's error feedback. With `qat_steps`, `learn` trains the signs of a whole model on text:
    salient weights (both ends of the values) are fixed, alpha = mean |w| follows the latent weights, the gradient passes
    straight through the sign. Stored: which weights are salient, their codes with an fp16 scale and a whole zero point a row,
    the signs of the others with fp16 alpha and mu a row and group (training: one alpha a matrix, no mu).
    Departures: mu and alpha are means over the binarized weights alone (`fit="official"` counts the salient ones as zeros);
    inputs that were never anything but zero take no part in the fit; training leaves embeddings, norms and the LM head as
    they are. Raises InputError for values out of range, and from `compress` where `qat_steps` asks for training.
    """

    share: float = 0.1
    salient_bits: int = 8
    saliency: Literal["hessian", "magnitude"] = "hessian"
    fit: BinaryFit = "mean"
    group_size: int | None = None
    mask_storage: MaskStorage = "smaller"
    damping: float = 0.01
    block_size: int = 128
    qat_steps: int = 0
    qat_rate: float = 1e-4
    qat_warmup: float = 0.05
    qat_scales: Literal["matrix", "row"] = "matrix"
    batch_size: int = 2
    accumulate: int = 4
    seed: int = 0

    paper: ClassVar[Paper] = Paper("PB-LLM: Partially Binarized Large Language Models", "2310.00034", 2023)
    published: ClassVar = Published(
        own=Figure("PB-LLM, 10 % salient, no training", 102.19, 2.7, "pb_llm:share=0.1"),
        rivals=(Figure("BiLLM", 35.04, 2.1), Figure("GPTQ, 2 bits", 2.1e3, 2, "gptq:bits=2,group_size=none")),
        source="PTQ1.61's measurement of it",
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Hessian,)

    def __post_init__(self) -> None:
        check_range("share", self.share, 0, 0.9)
        check_range("salient_bits", self.salient_bits, 1, 8)
        check_group_size(self.group_size)
        for name in ("damping", "qat_rate", "batch_size", "accumulate", "block_size"):
            check_positive(name, getattr(self, name), getattr(PbLlm, name))
        check_range("qat_warmup", self.qat_warmup, 0, 1)
        if self.qat_steps < 0:
            raise InputError(f"qat_steps={self.qat_steps} is out of range; 0, for no training, or more would be right")
        choices = {
            "saliency": ("hessian", "magnitude"),
            "fit": ("mean", "least_squares", "official"),
            "mask_storage": ("bitmap", "csr", "smaller"),
            "qat_scales": ("matrix", "row"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def compress(self, weight: Tensor, statistics: Statistics) -> CompressedTensor:
        return self.compress_group({"weight": weight}, statistics)["weight"]

    def compress_group(self, weights: Mapping[str, Tensor], statistics: Statistics) -> dict[str, CompressedTensor]:
        """One Hessian and one factorization serve every linear that reads the same input."""
        if self.qat_steps:
            raise InputError(f"qat_steps={self.qat_steps} trains a whole model on text, with PbLlm.learn; 0 would compress layer by layer")
        factor = factorize(statistics[Hessian].matrix, self.damping)
        return {name: self.solve(weight, factor, self.salient(weight, factor)) for name, weight in weights.items()}

    def salient(self, weight: Tensor, factor: Factor) -> Tensor:
        """bool `[rows, columns]`: the salient entries of the original weight; `group_size` chooses within groups of columns."""
        # U belongs to the inverse Hessian: a large 1 / U_jj^2 is an input that matters.
        scores = weight.square() / factor.upper.diagonal().square().to(weight.dtype) if self.saliency == "hessian" else weight.abs()
        return top_entries(torch.where(factor.dead, 0.0, scores), self.share, self.group_size)

    def solve(self, weight: Tensor, factor: Factor, salient: Tensor) -> CompressedTensor:
        """`weight [rows, columns]` by error feedback, with the entries of the mask `salient` at more bits."""
        columns = weight.shape[1]
        size = min(self.group_size or columns, columns)
        offsets, scales = fit_binary(weight, ~salient & ~factor.dead, group_size=size, fit=self.fit)
        levels = RowGrid(scales.half(), None, offsets.half(), size)
        grid = _fine_grid(weight, self.salient_bits)
        hook = _Columns(salient, levels, grid, self.salient_bits)
        # A dead column has no neighbours in the Hessian: its error moves nowhere, and its own signs are the best it can get.
        error_feedback(weight, factor, hook, block_size=self.block_size)
        term = _term(salient, hook.codes.T, hook.plus.T, grid, levels, (self.salient_bits, self.mask_storage))
        return CompressedTensor((term,))

    def prepare(self, model: nn.Module, salient: Mapping[str, Tensor] | None = None) -> nn.Module:
        """`model`, with every linear of its blocks replaced by one in training and all other parameters frozen, in place.

        `salient` gives some layers, by name, their salient entries (of `salient`, say) instead of both ends of the values.
        Raises InputError for a mask of another shape.
        """
        model.requires_grad_(False)
        for name, linear in _linears(model).items():
            weight = weight_matrix(linear).detach().float().contiguous()
            mask = outer_entries(weight, self.share) if salient is None or name not in salient else salient[name]
            if mask.shape != weight.shape:
                raise InputError(f"{name}: a mask {list(mask.shape)} does not fit the weight {list(weight.shape)}")
            model.set_submodule(name, _Partial(self, weight, cast("Tensor | None", linear.bias), mask))
        return model.train()

    def stages(self, model: nn.Module) -> Iterator[Stage]:
        """One stage: `qat_steps` for the latent weights."""
        groups = [group for module in model.modules() if isinstance(module, _Partial) for group in module.groups()]
        yield Stage("signs", self.qat_steps, groups, warmup=self.qat_warmup)

    def loss(self, outputs: Any, targets: Any, step: int) -> Tensor:
        """Mean -log p of the tokens `targets [sequences, length]` but the first, in nats; `outputs` are the model's."""
        logits = outputs.logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())

    def finish(self, model: nn.Module) -> nn.Module:
        """`model` in eval mode, with what is stored in the place of every layer in training."""
        for name, module in list(model.named_modules()):
            if isinstance(module, _Partial):
                module.harden()
                model.set_submodule(name, CompressedLinear(module.finish(), None if module.bias is None else module.bias.detach()))
        return model.eval()

    def learn(
        self, model: nn.Module, windows: Tensor, *, salient: Mapping[str, Tensor] | None = None, progress: Progress | None = None
    ) -> nn.Module:
        """Route B: `prepare`, `qat_steps` of AdamW on token `windows [count, length]`, `finish`; the model is changed in place.

        Raises InputError where the model has no blocks of linears or there is no step, NumericsError where the loss is not finite.
        """
        if not self.qat_steps:
            raise InputError("qat_steps=0 trains nothing; a number of steps such as 1000 would be right")
        model = self.prepare(model, salient)
        loss = text_loss(model, windows, self.loss, batch_size=self.batch_size, accumulate=self.accumulate, seed=self.seed)
        for stage in self.stages(model):
            train(stage.groups, loss, stage.steps, schedule=Schedule(stage.shape, stage.warmup), seed=self.seed, progress=progress)
        return self.finish(model)


class _Columns:
    """Fills the engine's hook: a column's salient entries on the fine grid, the others on two levels. Grids stay as fitted."""

    def __init__(self, salient: Tensor, levels: RowGrid, grid: RowGrid, bits: int) -> None:
        rows, columns = salient.shape
        self.salient, self.bits, self.size = salient.T.contiguous(), bits, levels.group_size
        self.scales, self.offsets = (cast(Tensor, values).float().T.contiguous() for values in (levels.scales, levels.offsets))
        self.scale, self.zero = grid.scales[:, 0].float(), cast(Tensor, grid.zero_points)[:, 0].float()
        self.codes = torch.empty(columns, rows, dtype=torch.uint8, device=salient.device)
        self.plus = torch.empty(columns, rows, dtype=torch.bool, device=salient.device)

    def __call__(self, j: int, column: Tensor, current: Tensor) -> Tensor:
        scale, offset = self.scales[j // self.size], self.offsets[j // self.size]
        self.plus[j] = plus = column >= offset  # sign(0) is plus: there is no third level
        code = round_codes(column, self.scale, self.zero, self.bits)
        self.codes[j] = code.to(torch.uint8)
        return torch.where(self.salient[j], (code - self.zero) * self.scale, offset + torch.where(plus, scale, -scale))


class _Partial(LearnedLinear):
    """y = where(salient, fixed, alpha * sign(latent)) x + b; alpha is made anew in training mode alone.

    Latent weights are float32: updates as small as the learning rate vanish in bfloat16.
    """

    scale: Tensor
    salient: Tensor
    fixed: Tensor

    def __init__(self, method: PbLlm, weight: Tensor, bias: Tensor | None, salient: Tensor) -> None:
        super().__init__(bias)
        self.method = method
        self.grid = _fine_grid(weight, method.salient_bits)
        self.codes = round_codes(weight, self.grid.scales.float(), cast(Tensor, self.grid.zero_points).float(), method.salient_bits)
        self.latent = nn.Parameter(weight.clone())
        self.register_buffer("salient", salient.clone())
        self.register_buffer("fixed", self.grid.apply(self.codes))
        self.register_buffer("scale", self._best_scale())

    def weight(self) -> Tensor:
        if self.training:
            self.scale = self._best_scale()
        return torch.where(self.salient, self.fixed, self.scale.float() * sign_through(self.latent))

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.latent], "lr": self.method.qat_rate}]

    def harden(self) -> None:
        """The scale of the final weights, which from now on stays."""
        self.scale = self._best_scale()
        self.eval()

    def finish(self) -> StoredLinear:
        method = self.method
        levels = RowGrid(self.scale, None, None, self.latent.shape[1])
        codes, plus = self.codes.to(torch.uint8), self.latent.detach() >= 0
        term = _term(self.salient, codes, plus, self.grid, levels, (method.salient_bits, method.mask_storage))
        return StoredLinear(CompressedTensor((term,)))

    def _best_scale(self) -> Tensor:
        """mean |latent| over the binarized entries: for fixed signs the best of min ||w - alpha sign(w)||^2; as stored, in fp16."""
        sizes, low = self.latent.detach().abs(), ~self.salient
        if self.method.qat_scales == "matrix":
            sizes, low = sizes.view(1, -1), low.view(1, -1)
        return (torch.where(low, sizes, 0.0).sum(1, keepdim=True) / low.sum(1, keepdim=True).clamp(min=1)).half()


def _fine_grid(weight: Tensor, bits: int) -> RowGrid:
    """The salient entries' grid: asymmetric, from the extremes of each full row."""
    scales, zeros = fit_uniform(weight, bits)
    return RowGrid(scales.half(), zeros.to(torch.uint8), None, weight.shape[1])


def _term(salient: Tensor, codes: Tensor, plus: Tensor, grid: RowGrid, levels: RowGrid, storage: tuple[int, MaskStorage]) -> Term:
    """What is stored: codes of the salient entries, signs of the others; `storage` is the codes' bits and how the mask lies."""
    if not bool(salient.any()):
        return Binary.from_signs(plus, levels.scales, levels.offsets, group_size=levels.group_size)
    inside = Codes.from_codes(codes[salient][None], bits=storage[0])
    outside = Binary.from_signs(plus[~salient][None])
    return Masked.from_terms(salient, inside, outside, inside_grid=grid, outside_grid=levels, storage=storage[1])


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    adapter = Adapter(model)
    return {name: linear for block in adapter.blocks for name, linear in adapter.linears(block).items()}
