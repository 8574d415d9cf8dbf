"""Key-value caches in few bits for `model.generate(..., past_key_values=cache)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fewbits.core.cache_method import CacheMethod, Report, silent
from fewbits.core.config import configure
from fewbits.core.errors import InputError
from fewbits.core.registry import get_method, list_methods
from fewbits.data.text import TextSample
from fewbits.models.cache_tables import default_path, read_tables, write_tables
from fewbits.models.hf_cache import CompressedCache, Tables
from fewbits.models.source import open_model

__all__ = ["CompressedCache", "Tables", "calibrate", "open"]


def open(
    model: PreTrainedModel,
    method: str | CacheMethod,
    fields: Mapping[str, Any] | None = None,
    *,
    tables: Tables | str | Path | None = None,
    chunked: bool = False,
    **settings: Any,
) -> CompressedCache:
    """An empty cache for `model`: `fewbits.caches.open(model, "kivi", bits=2)`. `fields` and `settings` are the method's.

    `tables` are what `calibrate` made for the method and the model, or the file that it wrote; by default the file
    `cache-<method>.safetensors` in the model's folder. With `chunked` a prompt that comes in pieces is sealed piece by piece;
    otherwise all of it at the first generated token, so that pieces change nothing. Raises InputError for a method that is no
    cache method, an unknown field, tables that are missing or made for something else, or a model without full attention.
    """
    made = _method(method, {**(fields or {}), **settings})
    if tables is not None and not made.calibrated:
        raise InputError(f"{made.name()} reads no tables; it can be used as it is")
    if made.calibrated and not isinstance(tables, Mapping):
        tables = read_tables(_file(made, model) if tables is None else Path(tables), made, model)
    assert tables is None or isinstance(tables, Mapping)
    cache = CompressedCache(model, made, tables=tables, chunked=chunked)
    without = [layer.index for layer in cache.compressed() if made.calibrated and not layer.tables]
    if without:
        raise InputError(f"the tables hold nothing for layer {without[0]}; those that were calibrated for this model would be right")
    return cache


def calibrate(
    model: PreTrainedModel,
    method: str | CacheMethod,
    fields: Mapping[str, Any] | None = None,
    *,
    text: TextSample | Tensor = TextSample(count=16),
    output: str | Path | None = None,
    report: Report = silent,
    **settings: Any,
) -> Tables:
    """The tables by layer that `method` reads when it writes `model`'s caches, also written to the file `output`.

    `text` is a sample, tokenized as the model's folder says, or windows of tokens `[count, length]`. The same fields must be
    given to `open`. Raises InputError for a method without tables, wrong fields, a text that cannot be read, or a file that
    cannot be written.
    """
    made = _method(method, {**(fields or {}), **settings})
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise InputError(f"{output} cannot be written; a file in a folder that is there would be right")
    tables = made.calibrate(model, _windows(model, text) if isinstance(text, TextSample) else text, report)
    if output is not None:
        write_tables(Path(output), made, model, tables)
    return tables


def _method(method: str | CacheMethod, settings: Mapping[str, Any]) -> CacheMethod:
    if isinstance(method, str):
        found = get_method(method)
        if not issubclass(found, CacheMethod):
            raise InputError(f"{method!r} does not write caches; {', '.join(list_methods('kvcache'))} do")
        return configure(found, settings)
    if settings:
        raise InputError(f"{', '.join(settings)}: fields are taken with a method's name; set them on the method itself")
    return method


def _file(method: CacheMethod, model: PreTrainedModel) -> Path:
    path = default_path(method, model)
    if path is None or not path.is_file():
        raise InputError(
            f"{method.name()} reads tables that are made for one model, and none were given; "
            f"fewbits calibrate MODEL -m {method.name()} -o FILE makes them"
        )
    return path


def _windows(model: PreTrainedModel, text: TextSample) -> Tensor:
    folder = Path(str(model.name_or_path or "nowhere"))
    if not folder.is_dir():
        raise InputError(
            f"{type(model).__name__} came from no folder with a tokenizer; windows of tokens in place of the text would be right"
        )
    return text.windows(open_model(folder).tokenizer())
