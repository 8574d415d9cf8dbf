"""Every option is tried in every layer: what is stored of it is counted, and what is lost is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits.allocation.problem import LayerTrial, fused_name
from fewbits.allocation.sensitivity import SENSITIVITIES, Candidate, Kind, Sensitivity
from fewbits.core.errors import InputError
from fewbits.core.method import Accumulator, LayerMethod, Statistics
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import ModelSource
from fewbits.models.weights import Weights
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.entries import checked_linears, second_moment
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.gather import assume_nothing
from fewbits.pipeline.gradients import gather_sensitivities
from fewbits.pipeline.memory import return_freed_memory
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.solve import GroupJob, solve_weights
from fewbits.pipeline.store import Store
from fewbits.pipeline.stream import run_settings
from fewbits.statistics.hessian import Hessian


@dataclass(frozen=True)
class TrialSettings:
    """By which measure losses are measured, on how many of the calibration windows, and the layers that stay dense whatever happens."""

    sensitivity: Kind = "hessian"
    windows: int = 8
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sensitivity not in SENSITIVITIES:
            raise InputError(f"sensitivity={self.sensitivity!r} is not known; {', '.join(SENSITIVITIES)} are")
        if self.windows < 1:
            raise InputError(f"windows={self.windows} is out of range; 1 or more, such as 8, would be right")


def try_options(
    source: ModelSource,
    options: Sequence[LayerMethod],
    text: tuple[Tensor, Tensor | None],
    work: Path,
    settings: TrialSettings,
    stream: StreamOptions | None = None,
) -> dict[str, LayerTrial]:
    """By layer, in the model's order: stored bits and loss of each of `options`, every other layer dense.

    Statistics see the dense model's inputs of `text`, windows `[count, length]` and their mask. `work` keeps the blocks that are
    done: a run that was killed goes on after them. Raises InputError where an option works on more than single layers or the
    folder belongs to other settings.
    """
    for option in options:
        _check_single(option)
    windows, mask = text
    stream = replace(stream or StreamOptions(), inputs="original")
    plan = Plan(options[0], settings.keep, tuple((str(index), option) for index, option in enumerate(options)))
    store = Store(work, run_settings(source, plan, windows, mask, stream) | {"trials": asdict(settings)})
    with torch.no_grad():
        return _Trials(source, options, DensePass(source, windows, mask, work / "dense", stream), store, settings).run(plan)


class _Trials:
    """Block after block; a block's trials are a function of its weights and of what its layers read in the dense model."""

    def __init__(
        self, source: ModelSource, options: Sequence[LayerMethod], dense: DensePass, store: Store, settings: TrialSettings
    ) -> None:
        self.source, self.options, self.dense, self.store, self.settings = source, options, dense, store, settings
        self.needs: set[type[Accumulator]] = {Hessian, *(need for option in options for need in option.needs)}
        self.shell = source.shell()
        self.adapter = Adapter(self.shell)

    def run(self, plan: Plan) -> dict[str, LayerTrial]:
        done, blocks = self.store.finished(), self.adapter.blocks
        names = [name for block in blocks for name in self.adapter.linears(block) if plan.keeps(name) is None]
        if not names:
            raise InputError(f"the patterns {list(plan.keep)} keep every layer dense; fewer patterns would be right")
        if done < len(blocks):
            measured = self.dense.windows[: self.settings.windows]
            mask = None if self.dense.mask is None else self.dense.mask[: self.settings.windows]
            sensitivity = SENSITIVITIES[self.settings.sensitivity](self.source, names, measured, mask, self.store)
            self._gather_gradients(names)
            self.dense.gather(self.needs)
            began, progress = time.monotonic(), self.dense.options.progress
            for index in range(done, len(blocks)):
                self._try_block(index, plan, sensitivity)
                left = (time.monotonic() - began) / (index - done + 1) * (len(blocks) - index - 1)
                if progress is not None:
                    progress(index, len(blocks), f"trials of {blocks[index]}", 0.0, left)
        described = {name: one for index in range(len(blocks)) for name, one in self.store.manifest(index)["trials"].items()}
        return {name: LayerTrial(**described[name] | {key: tuple(described[name][key]) for key in ("sizes", "losses")}) for name in names}

    def _gather_gradients(self, names: Sequence[str]) -> None:
        for index, option in enumerate(self.options):
            if option.uses_gradients and not self.store.has_state(_gradients(index)):
                with torch.enable_grad():
                    found = gather_sensitivities(self.source, dict.fromkeys(names, option), self.dense.windows)
                self.store.write_state(_gradients(index), found)

    def _try_block(self, index: int, plan: Plan, sensitivity: Sensitivity) -> None:
        """The block's trials go to the store, which then counts it as done."""
        name = self.adapter.blocks[index]
        self.source.load_module(self.shell, name, self.dense.options.dtype)
        linears = checked_linears(self.adapter, name, plan)
        gathered = self.dense.statistics(index, self.needs, linears)
        groups = {layer: group for group in gathered for layer in group}
        rows: dict[str, list[tuple[int, float]]] = {layer: [] for layer in linears}
        for tried in self.dense.options.workers.map(try_option, self._jobs(linears, gathered, sensitivity)):
            for layer, row in tried.items():
                rows[layer].append(row)
        trials = {}
        for layer, linear in linears.items():
            weight, (sizes, losses) = weight_matrix(linear), zip(*rows[layer], strict=True)
            trials[layer] = asdict(LayerTrial(name, fused_name(name, groups[layer], layer), weight.numel(), weight.shape[1], sizes, losses))
        self.store.write_block(index, {}, {"trials": trials})
        self.shell.get_submodule(name).to("meta")  # nothing of a finished block stays in memory

    def _jobs(
        self, linears: Mapping[str, nn.Module], gathered: dict[tuple[str, ...], Statistics], sensitivity: Sensitivity
    ) -> Iterator[tuple[_Group, GroupJob]]:
        """Every option for each group of linears that read one tensor; `gathered` is emptied."""
        for group in list(gathered):
            return_freed_memory()
            statistics = gathered.pop(group)  # a group's statistics go as soon as it is solved
            if not statistics.tokens:
                assume_nothing(statistics)
            weights = Weights(self.source, {layer: linears[layer] for layer in group}, self.dense.options.dtype)
            common = _Group(statistics, sensitivity, sensitivity.known(group))
            for index, option in enumerate(self.options):
                sensitivities = self.store.state(_gradients(index), group) if option.uses_gradients else {}
                yield common, GroupJob(option, weights, sensitivities)


@dataclass(frozen=True)
class _Group:
    """What all options of linears that read one input are tried with."""

    statistics: Statistics
    sensitivity: Sensitivity
    known: Mapping[str, Tensor]  # what the sensitivity keeps of each layer


@torch.no_grad()
def try_option(group: _Group, job: GroupJob) -> dict[str, tuple[int, float]]:
    """Stored bits and loss of one option, by layer."""
    weights, moment = job.weights.matrices(), second_moment(group.statistics)
    assert moment is not None
    found = {}
    stored, entries = solve_weights(group.statistics, job, weights)
    for name, entry in entries.items():
        candidate = Candidate(name, weights[name], stored[name], moment, entry["relative_error"], group.known.get(name))
        found[name] = sum(entry["bits"].values()), group.sensitivity.loss(candidate)
    return found


def _gradients(option: int) -> str:
    return f"gradients-{option}"


def _check_single(option: LayerMethod) -> None:
    if not isinstance(option, LayerMethod):
        raise InputError(f"{type(option).__name__.lower()} does not compress single layers; a layer method such as gptq would be right")
    whole = {"trains": option.tuning(), "profiles": option.profiling(), "ranks": option.stacking()}
    asked = [verb for verb, found in whole.items() if found is not None]
    if asked:
        raise InputError(
            f"{option.name()} {asked[0]} the whole model, so no layer can be tried alone; a method such as gptq would be right"
        )
