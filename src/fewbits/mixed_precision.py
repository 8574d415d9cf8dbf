"""Mixed precision under a budget of bytes: allocate, write the recipe, compress, and check the result beside a uniform model."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fewbits import api
from fewbits.allocation.greedy import allocate_by_bargains
from fewbits.allocation.ilp import allocate_by_program
from fewbits.allocation.options import label, read_options
from fewbits.allocation.pareto import frontier
from fewbits.allocation.problem import LayerTrial, Parts, group_layers, spread, state_problem
from fewbits.allocation.sensitivity import Kind
from fewbits.allocation.trials import TrialSettings, try_options
from fewbits.allocation.uniform import nearest_option, uniform_candidates
from fewbits.core.allocation_method import AllocationMethod, AllocationProblem
from fewbits.core.errors import InputError
from fewbits.core.files import write_text
from fewbits.core.method import LayerMethod
from fewbits.core.record import make_record
from fewbits.data.text import TextSample
from fewbits.evaluation.fidelity import TokenScores, score, summarize
from fewbits.evaluation.streamed import StreamedModel
from fewbits.evaluation.verdicts import judge
from fewbits.export.checkpoint import check_output, is_checkpoint, read_record
from fewbits.export.stack import memory_in_bytes
from fewbits.models.source import ModelSource, open_model
from fewbits.pipeline.dense_pass import content_key
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.probe import ModelProbe
from fewbits.pipeline.recipe import recipe_text

RECIPE, RECORD = "recipe.toml", "allocation.json"
_PER_WEIGHT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:bpw)?\s*")
_HEADER_BYTES = 512  # of the file's header, for each compressed layer, at most
_UNIFORM_TRIES = 4
SOLVERS = {"ilp": allocate_by_program, "greedy": allocate_by_bargains}


@dataclass(frozen=True)
class Request:
    """What is to be allocated.

    `budget`: bits a weight of the compressed layers (3.25, "3.25bpw"), or bytes of the whole file ("500MB"); None only with a
    method that settles it by itself. `methods` are specs METHOD:field=value,... of layer methods, at each of `bits`, and at most
    one allocation method. `tie` gives one option to the layers that an engine fuses. Losses are measured by `sensitivity` on
    `windows` windows of the calibration text. Raises InputError for values that are not known.
    """

    budget: float | str | None
    methods: tuple[str, ...] = ("gptq",)
    bits: tuple[int, ...] = ()
    sensitivity: Kind = "hessian"
    windows: int = 8
    solver: Literal["ilp", "greedy"] = "ilp"
    tie: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(f"solver={self.solver!r} is not known; {' or '.join(SOLVERS)} would be right")


def allocate(
    model: str | Path,
    request: Request,
    output: str | Path,
    *,
    calibration: TextSample = TextSample(),
    heldout: TextSample = TextSample("builtin:heldout", count=64, length=256),
    options: StreamOptions | None = None,
    fresh: bool = False,
) -> dict[str, Any]:
    """Share the budget out, compress `model` accordingly, and compare with a uniform model of at least as many bytes on `heldout`.

    `output` is the folder to write, with the recipe in it, or a file NAME.toml, which is then the recipe and all that is kept.
    Returns the record. What is finished lies beside `output` until the end, and a run that was killed goes on from it unless
    `fresh`. Raises InputError for wrong input, such as a budget that nothing fits in, before the model is compressed.
    """
    output, began = Path(output), time.monotonic()
    source, work = open_model(model), output.with_name(output.name + ".work")
    described = json.loads(json.dumps(asdict(request) | {"calibration": asdict(calibration), "heldout": asdict(heldout)}))
    if work.is_dir() and not fresh and (finished := _finished(output, str(model), described)) is not None:
        shutil.rmtree(work)  # the run was stopped after its last file, while tidying up
        return finished
    _check_output(output)
    _parse_budget(request.budget, read_options(request.methods, request.bits)[0])
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    text = calibration.batch(source.tokenizer())
    heldout.windows(source.tokenizer())
    made = share_out(source, request, text, work / "trials", options)
    runs = Runs(model, work, (calibration, heldout), options, request.keep)
    mixed = runs.compressed(made.plan)
    check = beside_uniform(runs, mixed, list(made.choices), made.trials)
    results = made.results() | {"check": check, "compressed": read_record(mixed)["results"]}
    record = make_record("allocate", model, described | {"plan": made.plan.describe()}, results, began)
    _finish(output, mixed, recipe_text(made.plan), record)
    shutil.rmtree(work)
    return record


@dataclass(frozen=True)
class Allocation:
    """What was to be chosen between, what every choice takes and loses, and what was chosen for every layer."""

    choices: tuple[LayerMethod, ...]
    trials: Mapping[str, LayerTrial]
    grouped: Mapping[str, tuple[str, ...]]
    problem: AllocationProblem
    chosen: Mapping[str, int]
    plan: Plan
    frontier: tuple[tuple[int, float], ...]  # (bits, loss foretold) of other budgets, where a solver shares them out

    def results(self) -> dict[str, Any]:
        """JSON-able."""
        options = self.problem.options
        layers = {
            name: {"option": options[self.chosen[name]], "weights": trial.weights, "sizes": trial.sizes, "losses": trial.losses}
            for name, trial in self.trials.items()
        }
        return {
            "options": list(options),
            "layers": layers,
            "parts": {part: list(names) for part, names in self.grouped.items()},
            "scores": dict(self.problem.scores),
            "bits": sum(trial.sizes[self.chosen[name]] for name, trial in self.trials.items()),
            "weights": sum(trial.weights for trial in self.trials.values()),
            "expected_loss": sum(trial.losses[self.chosen[name]] for name, trial in self.trials.items()),
            "frontier": [list(point) for point in self.frontier],
        }


def share_out(
    source: ModelSource, request: Request, text: tuple[Tensor, Tensor | None], work: Path, stream: StreamOptions | None = None
) -> Allocation:
    """Try every option in every layer on `text`, windows and their mask, and choose; what is tried is kept in the folder `work`.

    Raises InputError for wrong input or a budget that nothing fits in.
    """
    allocator, choices = read_options(request.methods, request.bits)
    _parse_budget(request.budget, allocator)
    sensitivity: Kind = "output" if allocator is not None else request.sensitivity  # an order of blocks asks for no losses
    trials = try_options(source, choices, text, work, TrialSettings(sensitivity, request.windows, request.keep), stream)
    scores = {} if allocator is None else allocator.score(ModelProbe(source, text[0][: allocator.windows], text[1]))
    parts: Parts = "block" if allocator is not None else "fused" if request.tie else "layer"
    problem = state_problem([label(one) for one in choices], trials, grouped := group_layers(trials, parts), scores)
    solve = SOLVERS[request.solver] if allocator is None else allocator.allocate
    chosen = spread(solve(problem, _budget_bits(request.budget, source, trials)), grouped)
    points = frontier(problem, solve) if allocator is None else []
    return Allocation(tuple(choices), trials, grouped, problem, chosen, make_plan(chosen, choices, request.keep), tuple(points))


def make_plan(chosen: Mapping[str, int], options: list[LayerMethod], keep: tuple[str, ...] = ()) -> Plan:
    """The plan in which every layer has its option; the one that most layers have is the main one."""
    counts = [list(chosen.values()).count(index) for index in range(len(options))]
    most = counts.index(max(counts))
    return Plan(options[most], keep, tuple((layer, options[index]) for layer, index in chosen.items() if index != most))


def _finished(output: Path, model: str, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of `output` where these settings made it of `model`, else None."""
    if not (output / RECORD).is_file():
        return None
    record: dict[str, Any] = json.loads((output / RECORD).read_text())
    same = {name: record["settings"].get(name) for name in settings} == dict(settings)
    return record if same and record["model"] == model else None


def _check_output(output: Path) -> None:
    if output.suffix != ".toml":
        check_output(output)
    elif output.exists():
        raise InputError(f"{output} exists; another name, or removing it, would be right")


def _parse_budget(budget: float | str | None, allocator: AllocationMethod | None) -> tuple[float, bool]:
    """The number, and whether it is bits a weight; else it is bytes of the file."""
    if budget is None:
        if allocator is not None and not allocator.needs_budget:
            return math.inf, True
        raise InputError("a budget is needed; bits a weight such as 3.25bpw, or bytes of the file such as 500MB, would be right")
    found = _PER_WEIGHT.fullmatch(str(budget))
    if found is not None:
        if float(found[1]) > 32:
            raise InputError(f"a budget of {budget} bits a weight is too much; bytes are said as {found[1]}B, or as 500MB")
        return float(found[1]), True
    try:
        return float(memory_in_bytes(budget if isinstance(budget, str) else str(budget))), False
    except InputError as error:
        raise InputError(f"the budget {budget!r} is not right; bits a weight such as 3.25bpw, or bytes such as 500MB, would be") from error


def _budget_bits(budget: float | str | None, source: ModelSource, trials: Mapping[str, LayerTrial]) -> float:
    """Bits for the tried layers; of a file's bytes what stays dense and the header are taken off first."""
    weights = sum(trial.weights for trial in trials.values())
    number, per_weight = (math.inf, True) if budget is None else _parse_budget(budget, None)
    if per_weight:
        return number * weights * (1 + 1e-12)  # 4.6 bits are 4.6, though no binary number is
    dense = source.file_bytes() - sum(source.parameter(f"{layer}.weight").nbytes for layer in trials)
    return 8 * (number - dense - _HEADER_BYTES * len(trials))


class Runs:
    """Folders by the plan that they were compressed with, and their scores on `heldout`, each made once."""

    def __init__(
        self, model: str | Path, work: Path, texts: tuple[TextSample, TextSample], options: StreamOptions | None, keep: tuple[str, ...] = ()
    ) -> None:
        """`texts` are those that methods are calibrated on and models are compared on; `keep` are the layers that stay dense."""
        self.model, self.work, self.options, self.keep = model, work, options, keep
        self.calibration, self.heldout = texts
        self._scores: dict[Path, TokenScores] = {}

    @cached_property
    def dense(self) -> StreamedModel:
        return StreamedModel(self.model, self.heldout.windows(open_model(self.model).tokenizer()))

    def scores(self, folder: Path) -> TokenScores:
        """Against the dense model; one block is in memory at a time, and the last hidden states of both."""
        if folder not in self._scores:
            self.dense.rewind()
            windows = self.dense.windows
            self._scores[folder] = score(StreamedModel(folder, windows), windows, self.dense)
        return self._scores[folder]

    def uniform(self, method: LayerMethod) -> Path:
        return self.compressed(Plan(method, self.keep))

    def compressed(self, plan: Plan) -> Path:
        folder = self.work / content_key({"plan": plan.describe(), "calibration": asdict(self.calibration)})[:16]
        if not is_checkpoint(folder):
            api.compress(self.model, plan, folder, calibration=self.calibration, options=self.options, probe=None)
        return folder


def beside_uniform(runs: Runs, mixed: Path, choices: list[LayerMethod], trials: Mapping[str, LayerTrial]) -> dict[str, Any]:
    """Both models on the same held-out tokens, and what may be said of their difference."""
    spent, weights = _stored_bits(mixed), sum(trial.weights for trial in trials.values())
    option, uniform = _uniform(runs, choices, trials, spent)
    ours, theirs, seed = runs.scores(mixed), runs.scores(uniform), runs.heldout.seed
    assert ours.forward_kl is not None and theirs.forward_kl is not None
    verdicts = {
        "loss": judge(ours.loss, theirs.loss, seed=seed),
        "kl": judge(ours.forward_kl, theirs.forward_kl, seed=seed),
    }
    return {
        "uniform": label(option),
        "bits_per_weight": spent / weights,
        "uniform_bits_per_weight": _stored_bits(uniform) / weights,
        "mixed_scores": summarize(ours, seed=seed),
        "uniform_scores": summarize(theirs, seed=seed),
        # The divergence is what compression loses, and the surer number; the loss may not contradict it.
        "beats_uniform": verdicts["kl"].said == "better" and verdicts["loss"].said != "worse",
        **{name: asdict(verdict) for name, verdict in verdicts.items()},
    }


def _uniform(runs: Runs, choices: list[LayerMethod], trials: Mapping[str, LayerTrial], spent: int) -> tuple[LayerMethod, Path]:
    """A method for all layers and its folder, of at least `spent` bits where groups can be made small enough for that."""
    for tried, option in enumerate(uniform_candidates(choices, trials, spent)):
        folder = runs.uniform(option)
        if _stored_bits(folder) >= spent or tried + 1 == _UNIFORM_TRIES:
            return option, folder
    option = nearest_option(choices, trials, spent)
    return option, runs.uniform(option)


def _stored_bits(folder: Path) -> int:
    return sum(read_record(folder)["results"]["bits"].values())


def _finish(output: Path, mixed: Path, recipe: str, record: dict[str, Any]) -> None:
    """Everything is written beside, then renamed."""
    if output.suffix == ".toml":
        write_text(output, recipe)
        return
    (mixed / RECIPE).write_text(recipe)
    (mixed / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    if output.exists():
        output.rmdir()
    mixed.rename(output)
