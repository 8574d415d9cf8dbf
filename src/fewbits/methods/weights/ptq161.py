"""PTQ1.61: a fifth of the input channels at 4 bits, the others binary, scales and angles learned block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, Paper, Restoration, Statistics
from fewbits.core.published import Figure, Published
from fewbits.core.tensor import CompressedTensor, Term
from fewbits.formats.binary import Binary
from fewbits.formats.columns import Columns
from fewbits.formats.permutation import Partition
from fewbits.formats.ranges import fit_uniform, round_codes
from fewbits.formats.scaled import ColumnScaled
from fewbits.formats.uniform import Uniform
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.straight_through import straight_through
from fewbits.statistics.moments import Moments
from fewbits.statistics.ranges import Ranges


@dataclass(frozen=True)
class Ptq161(BlockMethod):
    """Exactly round(share * columns) input channels of the largest activations at 4 bits, the others two levels a row.

    Binary part: r1 r2 (alpha sign(w - mu) + mu), the signs fixed for good; alpha, r1 (a row) and r2 (a column) are trained
    with the block's outputs against both streams, by squared distance and -log |mean cosine|. `restore_steps` first
    compresses the model once, repairs it with low-rank adapters on the calibration text, and compresses the repaired model.
    Stored: one bit a channel says which are salient; their codes with an fp16 scale and a whole zero point a row; signs with
    fp16 r1 alpha and r1 mu a row, and fp16 r2 a binary column. Departures: see the page. Raises InputError for values out of
    range.
    """

    share: float = 0.2
    channels: Literal["mean", "max", "weight", "random", "least"] = "mean"
    salient_bits: int = 4
    learn: Literal["all", "alpha"] = "all"
    angles: float = 1.0  # weight of the cosine part of the loss
    targets: Literal["both", "dense", "mixed"] = "both"
    rate: float = 2e-3
    angle_rate: float = 2e-2
    steps: int = 200
    batch_size: int = 4
    restore_steps: int = 0
    restore_rank: int = 64
    restore_rate: float = 5e-4
    restore_start: Literal["quantized", "dense"] = "quantized"
    seed: int = 0

    paper: ClassVar[Paper] = Paper(
        "PTQ1.61: Push the Real Limit of Extremely Low-Bit Post-Training Quantization Methods for Large Language Models", "2502.13179", 2025
    )
    published: ClassVar = Published(
        own=Figure("PTQ1.61", 12.50, 1.61, "ptq161"),
        rivals=(
            Figure("BiLLM", 35.04, 2.1),
            Figure("PB-LLM, 10 % salient", 102.19, 2.7, "pb_llm:share=0.1"),
            Figure("GPTQ, 2 bits", 2.1e3, 2, "gptq:bits=2,group_size=none"),
        ),
        calibration="128 windows of 2048 tokens of WikiText2, after a repair of the model",
        setting="without the repair that the paper makes first (restore_steps=0)",
    )
    baseline: ClassVar[str | None] = "rtn"
    needs: ClassVar = (Moments, Ranges)

    def __post_init__(self) -> None:
        check_range("share", self.share, 0, 1)
        check_range("salient_bits", self.salient_bits, 2, 8)
        for name in ("rate", "angle_rate", "restore_rate", "restore_rank"):
            check_positive(name, getattr(self, name), getattr(Ptq161, name))
        for name in ("steps", "restore_steps"):
            check_range(name, getattr(self, name), 0, 10**7)
        check_range("angles", self.angles, 0, 1e6)
        choices = {
            "channels": ("mean", "max", "weight", "random", "least"),
            "learn": ("all", "alpha"),
            "targets": ("both", "dense", "mixed"),
            "restore_start": ("quantized", "dense"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; {', '.join(map(repr, known))} are")

    def begin(self, weight: Tensor, bias: Tensor | None, statistics: Statistics) -> nn.Module:
        return _Binarized(self, weight, bias, self.salient(weight, statistics))

    def salient(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """bool `[columns]`: the channels that keep `salient_bits`."""
        columns = weight.shape[1]
        scores = {
            "mean": lambda: statistics[Moments].mean_magnitude,
            "max": lambda: statistics[Ranges].largest_magnitude,
            "weight": lambda: weight.abs().mean(0),
            "random": lambda: torch.rand(columns, generator=torch.Generator().manual_seed(self.seed)),
            "least": lambda: -statistics[Moments].mean_magnitude,
        }[self.channels]()
        mask = torch.zeros(columns, dtype=torch.bool)
        mask[torch.argsort(scores, descending=True, stable=True)[: round(self.share * columns)]] = True
        return mask

    def loss(self, outputs: Tensor, dense: Tensor, mixed: Tensor) -> Tensor:
        """Squared distance and negative log cosine to the targets (section 3.3)."""
        chosen = {"both": (dense, mixed), "dense": (dense,), "mixed": (mixed,)}[self.targets]
        return torch.stack([self._distance(outputs.float(), target.float()) for target in chosen]).sum()

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        squared = (ours - theirs).square().mean()
        cosine = nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
        return squared - self.angles * torch.log(cosine.abs().clamp(min=1e-6))

    def restoration(self) -> Restoration | None:
        if not self.restore_steps:
            return None
        return Restoration(self.restore_steps, self.restore_rank, self.restore_rate, self.restore_start, seed=self.seed)


class _Binarized(LearnedLinear):
    """The salient columns first, fixed; the binary ones after them, r1 r2 (alpha sign + mu) with alpha, r1 and r2 learned."""

    def __init__(self, method: Ptq161, weight: Tensor, bias: Tensor | None, salient: Tensor) -> None:
        super().__init__(bias)
        self.method, kept = method, weight[:, ~salient]
        bits = method.salient_bits
        scales, zeros = fit_uniform(weight, bits)  # the range of the whole row, salient or not
        scales = scales.half()
        mean = kept.mean(1, keepdim=True) if kept.shape[1] else torch.zeros(len(weight), 1)
        alpha = kept.abs().mean(1, keepdim=True) if kept.shape[1] else torch.zeros(len(weight), 1)
        self.register_buffer("salient", salient)
        self.register_buffer("codes", round_codes(weight[:, salient], scales.float(), zeros, bits).to(torch.uint8))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("mean", mean)
        self.register_buffer("signs", torch.where(kept >= mean, 1.0, -1.0))
        self.alpha = nn.Parameter(alpha)
        self.rows = nn.Parameter(torch.ones_like(alpha), requires_grad=method.learn == "all")  # r1
        self.columns = nn.Parameter(torch.ones(kept.shape[1]), requires_grad=method.learn == "all")  # r2

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """r1 alpha and r1 mu `[out, 1]`, and r2 `[binary columns]`, as fp16 stores them."""
        values = self.rows * self.alpha, self.rows * self.get_buffer("mean"), self.columns * 1.0
        scales, offsets, columns = (straight_through(one, one.detach().half().float()) for one in values)
        return scales, offsets, columns

    def weight(self) -> Tensor:
        scales, offsets, columns = self.folded()
        binary = (self.get_buffer("signs") * scales + offsets) * columns
        fixed = (self.get_buffer("codes").float() - self.get_buffer("zeros")) * self.get_buffer("scales").float()
        return torch.cat([fixed, binary], dim=1)[:, self._transform().transpose().order.long()]

    def groups(self) -> list[dict[str, Any]]:
        angles = [self.rows, self.columns] if self.method.learn == "all" else []
        return [{"params": [self.alpha], "lr": self.method.rate}, {"params": angles, "lr": self.method.angle_rate}]

    def finish(self) -> StoredLinear:
        scales, offsets, columns = (one.detach().half() for one in self.folded())
        parts: list[Term] = []
        if self.get_buffer("codes").shape[1]:
            zeros = self.get_buffer("zeros").to(torch.uint8)
            parts.append(Uniform.from_codes(self.get_buffer("codes"), self.get_buffer("scales"), zeros, bits=self.method.salient_bits))
        if len(columns):
            parts.append(ColumnScaled(Binary.from_signs(self.get_buffer("signs"), scales, offsets), columns))
        term = parts[0] if len(parts) == 1 else Columns(tuple(parts))
        return StoredLinear(CompressedTensor((term,), (self._transform(),)))

    def _transform(self) -> Partition:
        return Partition.from_mask(self.get_buffer("salient"))
