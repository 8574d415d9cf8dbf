"""Key-value caches in few bits for `model.generate(..., past_key_values=cache)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from fewbits.core.cache_method import CacheMethod
from fewbits.core.config import configure
from fewbits.core.errors import InputError
from fewbits.core.registry import get_method, list_methods
from fewbits.models.hf_cache import CompressedCache, Tables

__all__ = ["CompressedCache", "open"]


def open(
    model: PreTrainedModel,
    method: str | CacheMethod,
    fields: Mapping[str, Any] | None = None,
    *,
    tables: Tables | None = None,
    chunked: bool = False,
    **settings: Any,
) -> CompressedCache:
    """An empty cache for `model`: `fewbits.caches.open(model, "kivi", bits=2)`. `fields` and `settings` are the method's.

    `tables` are what the method was calibrated to. With `chunked` a prompt that comes in pieces is sealed piece by piece;
    otherwise all of it at the first generated token, so that pieces change nothing. Raises InputError for a method that is no
    cache method, an unknown field, a missing table, or a model without full attention.
    """
    settings = {**(fields or {}), **settings}
    if isinstance(method, str):
        found = get_method(method)
        if not issubclass(found, CacheMethod):
            raise InputError(f"{method!r} does not write caches; {', '.join(list_methods('kvcache'))} do")
        method = configure(found, settings)
    elif settings:
        raise InputError(f"{', '.join(settings)}: fields are taken with a method's name; set them on the method itself")
    if method.calibrated and tables is None:
        raise InputError(f"{method.name()} reads tables that are made for one model; none were given")
    return CompressedCache(model, method, tables=tables, chunked=chunked)
