"""CSKV: what is cached is a narrow projection of a layer's input, from which keys and values are made when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewbits.core.cache_method import CacheMethod, CacheRun, Report, Side, silent
from fewbits.core.checks import check_positive, check_range
from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import Paper, Statistics
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense
from fewbits.formats.transposed import Transposed
from fewbits.formats.uniform import Uniform
from fewbits.layers.straight_through import straight_through
from fewbits.models.adapter import weight_matrix
from fewbits.models.projection_probe import Projection, check_projections, find_projections, projection_inputs
from fewbits.pipeline.train import Schedule, text_loss, train
from fewbits.solvers.low_rank import low_rank, output_directions
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIDES: tuple[Side, Side] = ("keys", "values")
_CHECKED = 16  # tokens with which the model's projections are looked at


@dataclass(frozen=True)
class Cskv(CacheMethod):
    """W ~ A B for each layer's key and value projection; x A, of `density` times as many numbers, is what is stored of a token.

    The last `window` tokens are exact beside that: with `policy` "slide" always so many, with "clear" none to `window` - 1, as
    all are let go when the window is full. A and B start from singular vectors of W weighted by the magnitudes of its inputs
    ("asvd", to the power `strength`), of W ("svd"), of W's outputs ("outputs", the best there is without rounding), or random;
    then all are trained together for `steps` windows on the model's own keys and values, with the latents rounded as they are
    stored unless `round_in_training` is off. Stored: latents in fp16 (`latent_bits` 32: as they are, for comparison), or of
    fewer bits on min-max grids of `group_size` tokens for each channel (keys) and of `value_group` channels for each token
    (None: a head's share). A and B are weights of the model, in its dtype. Departures: see the page. Raises InputError for
    values out of range.
    """

    density_keys: float = 0.2
    density_values: float = 0.2
    latent_bits: int = 16
    group_size: int = 32
    value_group: int | None = None
    window: int = 32
    policy: Literal["slide", "clear"] = "slide"
    start: Literal["asvd", "svd", "outputs", "random"] = "asvd"
    strength: float = 0.5
    steps: int = 256
    learning_rate: float = 5e-5
    round_in_training: bool = True
    seed: int = 0

    paper: ClassVar[Paper] = Paper("CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios", "2409.10593", 2024)
    baseline: ClassVar[str | None] = "kivi"
    rotated_keys: ClassVar[bool] = False
    uses_inputs: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    uncalibrated_fields: ClassVar[frozenset[str]] = frozenset({"window", "policy"})

    def __post_init__(self) -> None:
        for name, density in (("density_keys", self.density_keys), ("density_values", self.density_values)):
            if not 0 < density <= 1:
                raise InputError(f"{name}={density} is out of range; above 0 and up to 1, such as 0.2, would be right")
        if self.latent_bits not in (*range(1, 9), 16, 32):
            raise InputError(f"latent_bits={self.latent_bits} is not known; 1 to 8, 16 or 32 would be right")
        check_range("group_size", self.group_size, 1, 2**16)
        if self.value_group is not None:
            check_range("value_group", self.value_group, 1, 2**16)
        check_range("window", self.window, 0, 2**20)
        if self.policy not in ("slide", "clear"):
            raise InputError(f"policy={self.policy!r} is not known; 'slide' or 'clear' would be right")
        if self.policy == "clear" and (self.window < 1 or (self.rounded and self.window % self.group_size)):
            raise InputError(f"window={self.window} cannot be cleared; a multiple of group_size={self.group_size} would be right")
        if self.start not in ("asvd", "svd", "outputs", "random"):
            raise InputError(f"start={self.start!r} is not known; 'asvd', 'svd', 'outputs' or 'random' would be right")
        check_range("strength", self.strength, 0, 4)
        check_range("steps", self.steps, 0, 10**7)
        check_positive("learning_rate", self.learning_rate, 5e-5)

    @property
    def rounded(self) -> bool:
        return self.latent_bits <= 8

    def rank(self, side: Side, head_dim: int, heads: int, features: int) -> int:
        """As many for each head, so that latents can be shared out to the heads; at least one, and no more than there are inputs."""
        density = self.density_keys if side == "keys" else self.density_values
        return max(1, min(int(density * head_dim + 1e-9), features // heads)) * heads

    def due(self, waiting: int, side: Side, prompt: bool) -> int:
        if self.policy == "clear":
            return waiting // self.window * self.window
        over = max(0, waiting - self.window)
        return over // self.group_size * self.group_size if side == "keys" and self.rounded else over

    def latent(self, inputs: Tensor, side: Side, tables: Mapping[str, Tensor]) -> Tensor:
        return inputs @ tables[f"{side}.down"].to(inputs.dtype)

    def restore(self, latents: Tensor, side: Side, tables: Mapping[str, Tensor]) -> Tensor:
        return latents @ tables[f"{side}.up"].to(latents.dtype)

    def seal_keys(self, keys: Tensor, run: CacheRun) -> CompressedTensor:
        return self._stored(keys, "keys", run.heads)

    def seal_values(self, values: Tensor, run: CacheRun) -> CompressedTensor:
        return self._stored(values, "values", run.heads)

    def _stored(self, latents: Tensor, side: Side, heads: int) -> CompressedTensor:
        """`latents [tokens, width]` as they are written."""
        if not self.rounded:
            return CompressedTensor((Dense(latents.half() if self.latent_bits == 16 else latents.clone()),))
        if side == "keys":
            grid = Uniform.between_extremes(latents.T, bits=self.latent_bits, group_size=self.group_size)
            return CompressedTensor((Transposed(grid),))
        width = latents.shape[1]
        size = min(self.value_group or width // heads, width)
        return CompressedTensor((Uniform.between_extremes(latents, bits=self.latent_bits, group_size=size),))

    def calibrate(self, model: PreTrainedModel, windows: Tensor, report: Report = silent) -> dict[int, dict[str, Tensor]]:
        """By layer, `keys.down [features, width]`, `keys.up [width, channels]` and the same of the values, in the model's dtype.

        Raises InputError where the model makes keys or values in a way that is not known, NumericsError where training fails.
        """
        projections = find_projections(model)
        check_projections(model, projections, windows[:1, :_CHECKED])
        config = model.config.get_text_config()
        heads = config.num_key_value_heads
        statistics = self._gather(model, projections, windows, report)
        factors = {
            (index, side): self._start(weight_matrix(projection.of(side)).detach().float(), statistics[index][side], side, heads)
            for index, projection in projections.items()
            for side in _SIDES
        }
        if self.steps:
            self._train(model, projections, factors, windows, heads, report)
        tables: dict[int, dict[str, Tensor]] = {index: {} for index in projections}
        for (index, side), pair in factors.items():
            dtype = weight_matrix(projections[index].of(side)).dtype
            for name, factor in zip(("down", "up"), pair, strict=True):
                tables[index][f"{side}.{name}"] = factor.detach().to(dtype).contiguous()
                if not bool(torch.isfinite(tables[index][f"{side}.{name}"]).all()):
                    raise NumericsError(f"layer {index}: the factors of its {side} are not finite; a lower learning rate would be right")
        return tables

    def _gather(
        self, model: PreTrainedModel, projections: Mapping[int, Projection], windows: Tensor, report: Report
    ) -> dict[int, dict[Side, Statistics]]:
        """What the start needs to know of every projection's inputs."""
        found: dict[int, dict[Side, Statistics]] = {index: {} for index in projections}
        needs = {"asvd": Moments, "outputs": Hessian}
        if self.start not in needs:
            return {index: {side: Statistics() for side in _SIDES} for index in projections}
        for number, window in enumerate(windows):
            for index, inputs in projection_inputs(model, projections, window[None]).items():
                for side in _SIDES:
                    if not number:
                        # Keys and values mostly read one tensor, whose statistics are taken once.
                        shared = side == "values" and inputs[side] is inputs["keys"]
                        fresh = Statistics(needs[self.start](inputs[side].shape[1]))
                        found[index][side] = found[index]["keys"] if shared else fresh
                    if side == "keys" or found[index][side] is not found[index]["keys"]:
                        for accumulator in found[index][side]:
                            accumulator.update(inputs[side])
            report(number + 1, len(windows), "inputs")
        return found

    def _start(self, weight: Tensor, statistics: Statistics, side: Side, heads: int) -> tuple[nn.Parameter, nn.Parameter]:
        """A `[features, width]` and B `[width, channels]`, singular values split evenly, for `weight [channels, features]`."""
        channels, features = weight.shape
        rank = self.rank(side, channels // heads, heads, features)
        if self.start == "random":
            generator = torch.Generator().manual_seed(self.seed)
            down = torch.randn(features, rank, generator=generator) / features**0.5
            up = torch.randn(rank, channels, generator=generator) / rank**0.5
        elif self.start == "outputs":
            values, vectors = output_directions(weight, statistics[Hessian].matrix / 2)
            # W V is split from V^T by the fourth root of the outputs' mean squares, as roots of singular values are elsewhere.
            root = values[:rank].clamp(min=1e-12 * float(values[0]) + 1e-30).pow(0.25)
            down, up = (weight.double().T @ vectors[:, :rank] / root).float(), (root[:, None] * vectors[:, :rank].T).float()
        else:
            scale = (statistics[Moments].mean_magnitude + 1e-6).pow(self.strength) if self.start == "asvd" else None
            down, up = low_rank(weight.T, rank, row_weights=scale)
        return nn.Parameter(down.contiguous()), nn.Parameter(up.contiguous())

    def _train(
        self,
        model: PreTrainedModel,
        projections: Mapping[int, Projection],
        factors: Mapping[tuple[int, Side], tuple[nn.Parameter, nn.Parameter]],
        windows: Tensor,
        heads: int,
        report: Report,
    ) -> None:
        """Lower the sum of all layers' mean squared errors, window by window, on the inputs of the model as it is."""
        weights = {key: weight_matrix(projections[key[0]].of(key[1])).detach().float().T for key in factors}

        def loss(outputs: Mapping[int, Mapping[Side, Tensor]], tokens: Tensor, step: int) -> Tensor:
            parts = []
            for (index, side), (down, up) in factors.items():
                inputs = outputs[index][side]
                latents = inputs @ down
                if self.rounded and self.round_in_training:
                    latents = straight_through(latents, self._stored(latents.detach(), side, heads).decode())
                parts.append((latents @ up - inputs @ weights[index, side]).square().mean())
            return torch.stack(parts).sum()

        groups = [{"params": [factor for pair in factors.values() for factor in pair], "lr": self.learning_rate}]
        batches = text_loss(_Inputs(model, projections), windows, loss, batch_size=1, seed=self.seed)
        train(
            groups,
            batches,
            self.steps,
            schedule=Schedule("linear"),
            seed=self.seed,
            progress=lambda step, value, left: report(step + 1, self.steps, "training"),
        )


class _Inputs(nn.Module):
    """Stands in for a model of which only the inputs of its projections are asked."""

    def __init__(self, model: PreTrainedModel, projections: Mapping[int, Projection]) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: nothing of it is trained
        self.projections = projections

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> dict[int, dict[Side, Tensor]]:
        return projection_inputs(self.__dict__["model"], self.projections, input_ids)
