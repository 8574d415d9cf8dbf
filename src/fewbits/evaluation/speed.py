"""Tokens a second and bytes read for each of them, of a compressed model beside its dense form in the same minutes."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewbits.core.record import peak_memory, resident_memory, restart_peak_memory
from fewbits.core.tensor import CompressedTensor
from fewbits.formats.dense import Dense as DenseTerm
from fewbits.kernels import native
from fewbits.layers.embedding import CompressedEmbedding, TiedHead
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.models.hf_cache import cache_keyword
from fewbits.models.natively import compute_by_itself

ROWS = (1, 4, 16, 32, 128)  # vectors that a layer is multiplied with at once, where layers are timed alone


def densified(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy of `model` whose compressed layers are dense ones with the weights that they stand for, in `dtype`; torch computes."""

    def dense_table(layer: CompressedEmbedding) -> CompressedEmbedding:
        values = DenseTerm(layer.stored.weight.decode(dtype))
        return CompressedEmbedding(StoredLinear(CompressedTensor((values,))), dtype, layer.scale)

    def dense(layer: CompressedLinear) -> nn.Linear:
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.stored.weight.decode(dtype), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        return linear

    # A copy that meets a compressed layer takes what is remembered for it.
    replaced: dict[int, Any] = {id(module): dense(module) for module in model.modules() if isinstance(module, CompressedLinear)}
    replaced |= {id(module): dense_table(module) for module in model.modules() if isinstance(module, CompressedEmbedding)}
    made = copy.deepcopy(model, replaced).to(dtype).eval()
    compute_by_itself(made)
    return made


def bytes_read(model: nn.Module) -> int:
    """Bytes of everything that a step of one token reads: all stored tensors but the rows of an embedding that is no output head."""
    seen = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    modules = list(model.modules())
    heads = {module.weight.data_ptr() for module in modules if isinstance(module, nn.Linear)}
    heads |= {buffer.data_ptr() for module in modules if isinstance(module, TiedHead) for buffer in module.table.buffers()}
    looked_up = {module.weight.data_ptr() for module in modules if isinstance(module, nn.Embedding)}
    looked_up |= {buffer.data_ptr() for module in modules if isinstance(module, CompressedEmbedding) for buffer in module.buffers()}
    looked_up -= heads
    return sum(size for address, size in seen.items() if address not in looked_up)


def measure_models(
    models: Mapping[str, Callable[[], nn.Module]], prompt: Tensor, *, steps: int, rounds: int
) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Prefill of `prompt [1, tokens]` and `steps` greedy tokens after it: the models, made one by one, take turns.

    Of each model: tokens a second of both, as median and quartiles, bytes that a token reads and their rate, memory. The rate of
    a pass that only reads as many bytes, measured in between, is that of the first model's tensors. Also returns the models.
    """
    made: dict[str, nn.Module] = {}
    found: dict[str, Any] = {}
    for name, make in models.items():
        before = resident_memory()
        restart_peak_memory()
        made[name] = make()
        _run(made[name], prompt, 2)
        found[name] = {"bytes_read": bytes_read(made[name]), "peak_memory_bytes": max(0, peak_memory() - before)}
    samples: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in made}
    passes: list[float] = []
    first = next(iter(made.values()))
    for _ in range(rounds):
        for name, model in made.items():
            samples[name].append(_run(model, prompt, steps))
        if native.extension() is not None:
            passes.append(_read(first))
    for name, taken in samples.items():
        decode = [1 / seconds for _, each in taken for seconds in each]
        prefill = [prompt.shape[1] / seconds for seconds, _ in taken]
        found[name] |= {"decode_tokens_per_second": quartiles(decode), "prefill_tokens_per_second": quartiles(prefill)}
        found[name]["read_bytes_per_second"] = found[name]["bytes_read"] * found[name]["decode_tokens_per_second"]["median"]
    results: dict[str, Any] = {"models": found}
    if passes:
        read = quartiles([sum(tensor.nbytes for tensor in _tensors(first)) / seconds for seconds in passes])
        results["read_pass_bytes_per_second"] = read
        for one in found.values():
            one["share_of_read_pass"] = one["read_bytes_per_second"] / read["median"]
    return results, made


def measure_layers(model: nn.Module, dtype: torch.dtype, *, rounds: int) -> list[dict[str, Any]]:
    """One row for each kind of compressed layer, by shape and terms: its products with few and many vectors, beside a read pass.

    Layers of a kind take turns, so that weights come from memory where there are enough of them.
    """
    kinds: dict[tuple[Any, ...], list[CompressedLinear | TiedHead]] = {}
    for module in model.modules():
        if isinstance(module, (CompressedLinear, TiedHead)):
            terms = tuple(term.kind for term in module.stored.weight.terms)
            kinds.setdefault((module.out_features, module.in_features, terms), []).append(module)
    rows = []
    for (outputs, inputs, terms), layers in kinds.items():
        size = sum(tensor.nbytes for tensor in layers[0].stored.tensors().values())
        row: dict[str, Any] = {"shape": [outputs, inputs], "terms": list(terms), "layers": len(layers), "bytes": size, "products": []}
        for count in ROWS:
            vectors = torch.randn(count, inputs).to(dtype)
            calls = [functools.partial(layer, vectors) for _ in range(rounds) for layer in layers[:8]]
            seconds = quartiles([_timed(call) for call in calls])
            flops = 2 * count * outputs * inputs
            row["products"].append(
                {"vectors": count, "seconds": seconds, "flops_per_byte": flops / size, "flops": flops / seconds["median"]}
            )
        if native.extension() is not None:
            passes = [_read(layer.table if isinstance(layer, TiedHead) else layer) for _ in range(rounds) for layer in layers[:8]]
            row["read_pass_bytes_per_second"] = size / statistics.median(passes)
            row["share_of_read_pass"] = statistics.median(passes) / row["products"][0]["seconds"]["median"]
        rows.append(row)
    return rows


def peak_flops(dtype: torch.dtype, size: int = 512) -> float:
    """Of torch's matrix product in `dtype`: the roof that products with many vectors run against."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / min(_timed(lambda: left @ right) for _ in range(50))


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles; of a single value, that value."""
    if len(values) == 1:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def _run(model: nn.Module, prompt: Tensor, steps: int) -> tuple[float, list[float]]:
    """Seconds of the prompt, and of each token after it."""
    each: list[float] = []
    keyword = cache_keyword(cast(Any, model))
    with torch.inference_mode():
        began = time.perf_counter()
        output = model(input_ids=prompt, use_cache=True)
        token, prefill = output.logits[:, -1:].argmax(-1), time.perf_counter() - began
        for _ in range(steps):
            began = time.perf_counter()
            output = model(input_ids=token, use_cache=True, **{keyword: output.past_key_values})
            token = output.logits[:, -1:].argmax(-1)
            each.append(time.perf_counter() - began)
    return prefill, each


def _timed(call: Callable[[], object]) -> float:
    with torch.inference_mode():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers()) if tensor.is_contiguous() and tensor.numel()]


def _read(module: nn.Module) -> float:
    """Seconds of a pass that reads all tensors and computes nothing."""
    tensors = _tensors(module)
    return _timed(lambda: [native.read_pass(tensor) for tensor in tensors])
