"""How fast a compressed model is beside its dense form, and what of the machine's memory speed its layers use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbits import api
from fewbits.core.checks import check_range
from fewbits.core.config import configure, read_spec
from fewbits.core.errors import InputError
from fewbits.core.method import LayerMethod, Statistics
from fewbits.core.record import make_record
from fewbits.core.registry import get_method
from fewbits.data.text import TextSample
from fewbits.evaluation.speed import densified, measure_layers, measure_models, peak_flops
from fewbits.kernels import native
from fewbits.layers.linear import CompressedLinear
from fewbits.models.adapter import Adapter, weight_matrix
from fewbits.models.source import open_model
from fewbits.pipeline.dense_pass import reads_text
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.solve import solve_group


def bench(  # noqa: PLR0913 - what is timed, of what, and how long
    model: str | Path,
    *,
    terms: str | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 16,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
    dense_dtype: torch.dtype = torch.bfloat16,
    memory: int | str | None = None,
) -> dict[str, Any]:
    """One record: tokens a second of a compressed `model`, computing in `dtype`, and of its dense form in `dense_dtype`.

    Both take turns, prompt after prompt; results are medians and quartiles. `terms` puts what a method that needs no calibration
    makes ("rtn:bits=4,group_size=32") in the place of the linears of a dense model. `memory` as in `load`. Raises InputError
    for a dense model without terms, an encoder, a prompt longer than the model takes, or a method that needs calibration.
    """
    began = time.monotonic()
    check_range("prompt_tokens", prompt_tokens, 1, 10**6)
    check_range("new_tokens", new_tokens, 1, 10**6)
    check_range("rounds", rounds, 1, 10**4)
    source = open_model(model)
    if source.is_encoder:
        raise InputError(f"{source.name!r} is an encoder, which writes no tokens; a language model would be right")
    most = getattr(source.config, "max_position_embeddings", None)
    if most is not None and prompt_tokens + new_tokens > most:
        raise InputError(f"{prompt_tokens} + {new_tokens} tokens are more than the {most} that {source.name!r} takes; fewer would be right")
    prompt = TextSample("builtin:heldout", 1, prompt_tokens).windows(source.tokenizer())
    opened: list[nn.Module] = []

    def compressed_model() -> nn.Module:  # its memory is that of loading it too
        opened.append(_opened(model, terms, dtype, memory))
        return opened[0]

    models = {"compressed": compressed_model, "dense": lambda: densified(opened[0], dense_dtype)}
    results, made = measure_models(models, prompt, steps=new_tokens, rounds=rounds)
    results["layers"] = measure_layers(opened[0], dtype, rounds=rounds)
    results["peak_flops"] = peak_flops(dtype)
    compressed, dense = (results["models"][name]["decode_tokens_per_second"]["median"] for name in made)
    results["times_as_fast_as_dense"] = compressed / dense
    settings = {"terms": terms, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds, "memory": memory}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "dense_dtype": str(dense_dtype).removeprefix("torch.")}
    settings["kernels"] = native.chosen() if native.extension() is not None else None
    return make_record("bench", model, settings, results, began)


def _opened(model: str | Path, terms: str | None, dtype: torch.dtype, memory: int | str | None) -> nn.Module:
    opened = api.load(model, dtype, memory=memory)
    compressed = any(isinstance(module, CompressedLinear) for module in opened.modules())
    if terms is None:
        if not compressed:
            raise InputError(f"{str(model)!r} is not compressed; a folder that compress wrote, or --terms rtn:bits=4, would be right")
        return opened
    if compressed:
        raise InputError(f"{str(model)!r} is compressed already, so it has its terms; a dense model would be right")
    name, settings = read_spec(terms)
    method = configure(get_method(name), settings)
    if not isinstance(method, LayerMethod) or reads_text(Plan(method)):
        raise InputError(f"{name} needs calibration; a method without it, such as rtn or hqq, would be right for terms to be timed")
    adapter = Adapter(opened)
    for block in adapter.blocks:
        for layer, linear in adapter.linears(block).items():
            stored = solve_group(method, {layer: weight_matrix(linear).float()}, Statistics())[layer]
            opened.set_submodule(layer, CompressedLinear(stored, getattr(linear, "bias", None)).settle())
    return opened
