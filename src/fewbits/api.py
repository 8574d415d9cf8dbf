"""The verbs of fewbits: compress, train, load, evaluate, generate, export."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from fewbits import caches
from fewbits.core.checks import check_range
from fewbits.core.config import read_spec
from fewbits.core.errors import InputError
from fewbits.core.method import BlockMethod, LayerMethod, Method, Statistics, TrainingMethod
from fewbits.core.record import make_record
from fewbits.core.remote import fetch_folder, is_url
from fewbits.data.text import TextSample
from fewbits.evaluation.embeddings import compare_embeddings, embed
from fewbits.evaluation.fidelity import score, summarize
from fewbits.evaluation.streamed import StreamedModel
from fewbits.export.checkpoint import check_output, is_checkpoint, read_record, read_stack, write_checkpoint
from fewbits.export.foreign import is_compressed, load_compressed
from fewbits.export.run import export as write_export
from fewbits.export.stack import memory_in_bytes
from fewbits.export.target import Target, get_target
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear, whole_bits
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.source import ModelSource, open_model
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stages import Batches, train_stages
from fewbits.pipeline.stages import Progress as StageProgress
from fewbits.pipeline.stream import StreamOptions, compress_model


def compress(
    model: str | Path,
    method: Method | Plan,
    output: str | Path,
    *,
    calibration: TextSample = TextSample(),
    options: StreamOptions | None = None,
    probe: TextSample | None = TextSample("builtin:heldout", count=16, length=256),
    fresh: bool = False,
) -> dict[str, Any]:
    """Compress `model` block by block with `method` into the folder `output`; returns the record, which the folder holds too.

    A `Plan` in place of the method keeps some layers dense or gives them another method. What was written is measured against
    `model` on the text `probe`, one block at a time, for the record and the model card; None measures nothing. A stopped run
    goes on where it was unless `fresh`. Raises InputError for wrong input before any work is done.
    """
    output, began = Path(output), time.monotonic()
    plan = method if isinstance(method, Plan) else Plan(method)
    settings = {"method": plan.method.name(), "plan": plan.describe(), "calibration": asdict(calibration)}
    work = output.with_name(output.name + ".work")
    if work.is_dir() and not fresh and _finished(output, str(model), settings):
        shutil.rmtree(work)  # the run was stopped after its last file, while tidying up
        return read_record(output)
    check_output(output)
    source = open_model(model)
    tokens, mask = calibration.batch(source.tokenizer())
    if probe is not None:
        probe.windows(source.tokenizer())
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    summary = compress_model(source, plan, tokens, work, options, mask)

    def describe(folder: Path) -> tuple[dict[str, Any], str]:
        results = summary.record() | _file_sizes(open_model(folder)) | {"dense_file_bytes": source.file_bytes()}
        if probe is not None:
            results["probe"] = {"text": asdict(probe)} | _measure(folder, model, probe, streamed=True)
        record = make_record("compress", model, settings, results, began)
        return record, _card(str(model), record)

    record = write_checkpoint(output, source, summary.layers, describe, replaced=summary.replaced(), order=summary.order)
    shutil.rmtree(work)
    return dict(record)


def _finished(output: Path, model: str, settings: dict[str, Any]) -> bool:
    """Whether `output` is what these settings make of `model`."""
    if not is_checkpoint(output):
        return False
    record = read_record(output)
    return record["model"] == model and record["settings"] == json.loads(json.dumps(settings))


def _file_sizes(source: ModelSource) -> dict[str, Any]:
    """What the whole model takes on disk: embeddings, norms and whatever else stayed dense included."""
    size, parameters = source.file_bytes(), source.parameter_count()
    return {"file_bytes": size, "parameters": parameters, "file_bits_per_weight": 8 * size / parameters}


def train(
    model: torch.nn.Module, method: TrainingMethod, batches: Batches, *, seed: int = 0, progress: StageProgress | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Train and compress any `model` with `method` on `batches` of (inputs, targets), gone through again and again.

    Returns the finished model, in eval mode, and the record: what every stage did, and the bits of everything that a file of
    the model holds (`export.module.save_module` writes it), over the weights of matrices and convolutions. Methods may change
    `model` itself. Raises InputError for wrong input, NumericsError where a loss is not finite.
    """
    began = time.monotonic()
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    made, stages = train_stages(model, method, batches, seed=seed, progress=progress)
    bits = whole_bits(made)
    results = {"stages": stages, "weights": weights, "bits": bits, "bits_per_weight": bits / max(weights, 1)}
    settings = {"method": method.name(), "fields": asdict(cast(Any, method)), "seed": seed}
    return made, make_record("train", type(model).__name__, settings, results, began)


def _card(model: str, record: dict[str, Any]) -> str:
    """The model card: what was done, true bits, and how far each layer's outputs are from the original's."""
    results = record["results"]
    errors = sorted((layer["relative_error"], name) for name, layer in results["layers"].items())
    by_outputs = all(layer["error_of"] == "outputs" for layer in results["layers"].values())
    judged = "Squared output error over squared output on the calibration text" if by_outputs else "Squared error over squared weights"
    bits = "\n".join(f"| {name} | {count / results['compressed_weights']:.4f} |" for name, count in results["bits"].items())
    return f"""---
library_name: transformers
tags: [fewbits, compressed]
---
# {Path(model).name} compressed with {record["settings"]["method"]}

{results["compressed_weights"]} weights of {len(results["layers"])} linear layers at {results["bits_per_weight"]:.4f} bits each:

| stored | bits per weight |
|---|---|
{bits}

The whole file, with what stayed dense: {results["file_bytes"]} bytes, {results["file_bits_per_weight"]:.4f} bits for each of
{results["parameters"]} parameters; the original's files have {results["dense_file_bytes"]} bytes.

{judged}: median {errors[len(errors) // 2][0]:.2e}, largest {errors[-1][0]:.2e}
in `{errors[-1][1]}`. Kept as they were: {", ".join(f"`{name}` ({reason})" for name, reason in results["kept"].items()) or "no matrices"}.
{_loss(results.get("probe"))}
```python
import fewbits
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def _loss(probe: dict[str, Any] | None) -> str:
    """The card's paragraph about what was measured on the probe text."""
    if probe is None:
        return ""
    if "cosine_mean" in probe:
        said = f"cosine to the original's embeddings {probe['cosine_mean']:.4f} on {probe['sentences']} lines"
    else:
        low, high = probe["delta_loss_interval"]
        said = (
            f"perplexity {probe['perplexity']:.3f} against {probe['reference_perplexity']:.3f}, "
            f"loss {probe['delta_loss']:+.4f} nats a token (95% interval {low:+.4f} to {high:+.4f}), "
            f"KL divergence {probe['kl_mean']:.4f} nats, "
            f"the same likeliest token at {probe['top1_agreement']:.1%} of {probe['tokens']} tokens"
        )
    return f"\nMeasured against the original on `{probe['text']['data']}`: {said}.\n"


def sample_layer(method: Method, rows: int = 256, columns: int = 512) -> StoredLinear | None:
    """What `method` makes of one random layer with heavy tails, [rows, columns], and drawn inputs that are correlated.

    None for methods that compress no single layers. Raises what the method raises.
    """
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(rows, columns, generator=generator) / torch.rand(rows, columns, generator=generator).clamp(min=0.05).sqrt()
    inputs = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    statistics = Statistics(*(need(columns) for need in method.needs), tokens=len(inputs))
    for accumulator in statistics:
        accumulator.update(inputs)
    if isinstance(method, (LayerMethod, BlockMethod)) and method.uses_gradients:
        sums = {"layer": method.sensitivity(weight, torch.randn(rows, columns, generator=generator))}
        statistics.sensitivities = dict(method.rank(sums) if isinstance(method, LayerMethod) else sums)
    if isinstance(method, LayerMethod):
        tensor = method.compress_group({"layer": weight}, statistics)["layer"]
        return StoredLinear(tensor, method.activation(statistics, tensor), method.offset(weight, tensor, statistics))
    if isinstance(method, BlockMethod):
        learned = cast(LearnedLinear, method.begin(weight, None, statistics))
        learned.harden()
        return learned.finish()
    return None


def stored_bits(method: Method, rows: int = 256, columns: int = 512) -> dict[str, float]:
    """Bits per weight of each kind of stored tensor, counted on `sample_layer`; empty where there is none."""
    stored = sample_layer(method, rows, columns)
    found: dict[str, float] = {}
    for name, bits in ({} if stored is None else stored.bits()).items():
        role = name.removeprefix("weight.terms.")
        found[role] = found.get(role, 0.0) + bits / (rows * columns)
    return found


def load(model: str | Path, dtype: torch.dtype = torch.float32, *, memory: int | str | None = None) -> PreTrainedModel:
    """A dense model, a folder that `compress` wrote, or a folder or GGUF file in a format of `export` that others wrote, in eval mode.

    Of a folder whose layers' terms are ranked (bitstack) `memory`, bytes or text such as "120MB", loads the most that fits in it:
    it counts all stored tensors, dense parameters in the dtype of the file, and no others are read; `resize` changes it later.
    Raises InputError for a size below the smallest, or of a model that has one size.
    """
    folder = fetch_folder(model) if isinstance(model, str) and is_url(model) else Path(model)
    if memory is not None and not is_checkpoint(folder):
        raise InputError(
            f"{str(model)!r} is no stack, so it has one size; a folder compressed with a method such as bitstack would be right"
        )
    return load_compressed(folder, dtype, memory) if is_compressed(folder) else open_model(model).load(dtype)


def export(folder: str | Path, to: str | Target, output: str | Path, *, requantize: bool = False) -> dict[str, Any]:
    """Write a folder that `compress` wrote as files for another engine, in the format `to`: "gptq", "dense:dtype=bfloat16".

    Returns the record: the files, and what was lost in layers that the format could not hold, which `requantize` rounds to its
    grid. Raises InputError where there is such a layer and it was not asked for, and before anything is written.
    """
    began = time.monotonic()
    target = get_target(to) if isinstance(to, str) else to
    made = write_export(Path(folder), target, Path(output), requantize=requantize)
    settings = {"to": target.name(), "fields": asdict(cast(Any, target)), "requantize": requantize, "output": str(output)}
    return make_record("export", folder, settings, made.record(), began)


def evaluate(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    text: TextSample = TextSample("builtin:heldout", count=64),
    streamed: bool = False,
    memory: int | str | None = None,
) -> dict[str, Any]:
    """One record: perplexity of `model` on `text` and, against a reference, KL, agreement and the paired loss difference.

    `streamed` runs one block at a time, for models that are larger than memory. `memory` gives the size of the model, as in
    `load`. An encoder is measured by the embeddings of the text's lines, against a reference only, and InputError is raised
    without one.
    """
    began = time.monotonic()
    source = open_model(model)
    results = _measure(model, reference, text, streamed, memory) | _file_sizes(source)
    if is_checkpoint(source.path):
        results |= _sizes(source.path, memory)
    settings = {"reference": None if reference is None else str(reference), "text": asdict(text), "streamed": streamed}
    return make_record("evaluate", model, settings | ({} if memory is None else {"memory": memory}), results, began)


def _sizes(folder: Path, memory: int | str | None) -> dict[str, float]:
    """True bits per weight of a checkpoint and, of a stack of which `memory` is used, its bytes."""
    made = read_record(folder)["results"]
    if memory is None:
        return {"bits_per_weight": made["bits_per_weight"]}
    sizes = (stack := read_stack(folder)).sizes
    stored = sizes[stack.length(memory_in_bytes(memory))]
    bits = sum(made["bits"].values()) - 8 * (sizes[-1] - stored)
    return {"bits_per_weight": bits / made["compressed_weights"], "stored_bytes": stored}


def _measure(
    model: str | Path, reference: str | Path | None, text: TextSample, streamed: bool, memory: int | str | None = None
) -> dict[str, Any]:
    source = open_model(model)
    if source.is_encoder:
        return _compare_encoders(source, reference, text, memory)
    if reference is not None and open_model(reference).is_encoder:
        raise InputError(
            f"the reference {str(reference)!r} is an encoder, and {source.name!r} is a language model; two of a kind would be right"
        )
    windows = text.windows(source.tokenizer())

    def opened(one: str | Path, memory: int | str | None = None) -> torch.nn.Module:
        return StreamedModel(one, windows, memory=memory) if streamed else load(one, memory=memory)

    scores = score(opened(model, memory), windows, None if reference is None else opened(reference))
    return summarize(scores, seed=text.seed)


def _compare_encoders(source: ModelSource, reference: str | Path | None, text: TextSample, memory: int | str | None) -> dict[str, Any]:
    if reference is None:
        raise InputError(f"{source.name!r} is an encoder, which is measured against a reference only; name one")
    models = (load(source.path, memory=memory), load(reference))
    sentences = text.lines()
    ours, theirs = (embed(one, source.tokenizer(), sentences, length=text.length) for one in models)
    return dict(compare_embeddings(ours, theirs))


def generate(  # noqa: PLR0913 - what is written, from what, and in what it is kept
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    memory: int | str | None = None,
    cache: str | None = None,
    cache_tables: str | Path | None = None,
) -> str:
    """The prompt and what the model writes after it; temperature 0 takes the likeliest token each time; `memory` as in `load`.

    `cache` names what keys and values are kept in, with its fields: "kivi:bits=2,group_size=32"; `cache_tables` is the file that
    `caches.calibrate` wrote, for methods that read one. Raises InputError for tables without a cache.
    """
    source = open_model(model)
    if source.is_encoder:
        raise InputError(f"{source.name!r} is an encoder, which writes no text; a language model would be right")
    check_range("max_new_tokens", max_new_tokens, 1, 10**9)
    check_range("temperature", temperature, 0, 100)
    if cache_tables is not None and cache is None:
        raise InputError("tables are read by a cache, and none is named; --cache METHOD would be right")
    tokenizer = source.tokenizer()
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature > 0 else {})
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if not inputs["input_ids"].numel():
        raise InputError("the prompt is empty; some text to go on from would be right")
    opened = cast(Any, load(model, memory=memory))
    if cache is not None:
        sampling[cache_keyword(opened)] = caches.open(opened, *read_spec(cache), tables=cache_tables)
    output = opened.generate(**inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
