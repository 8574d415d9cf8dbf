"""GGUF files that are written, tensor by tensor in two passes; the container itself is the package gguf's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbits.models.gguf.architecture import Setting
from fewbits.models.gguf.file import package
from fewbits.models.gguf.terms import Blocks
from fewbits.models.gguf.vocabulary import Vocabulary

Tensors = Callable[[], Iterable[tuple[str, Blocks]]]  # every tensor of the file by its name, in the same order each time

_FILE_TYPES = {0: 0, 1: 1, 2: 2, 3: 3, 6: 8, 7: 9, 8: 7, 10: 10, 11: 12, 12: 14, 13: 16, 14: 18, 30: 32}  # by the type of most weights


def write_file(path: Path, settings: Mapping[str, Setting], vocabulary: Vocabulary | None, tensors: Tensors) -> None:
    """One file; `tensors` is gone through twice, and one tensor is in memory at a time.

    `settings` have their full names; "general.architecture" is one of them.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, settings["general.architecture"])
    for name, value in settings.items():
        if name != "general.architecture":  # which the writer has put first itself
            _add(writer, name, value)
    if vocabulary is not None:
        _add_vocabulary(writer, vocabulary)
    weights: Counter[int] = Counter()
    for name, blocks in tensors():
        kind = gguf.GGMLQuantizationType(blocks.type_number)
        writer.add_tensor_info(name, blocks.shape, np.dtype(np.int8), blocks.data.nbytes, raw_dtype=kind)
        weights[blocks.type_number] += torch.Size(blocks.shape).numel()
    writer.add_quantization_version(2)
    writer.add_file_type(_FILE_TYPES[weights.most_common(1)[0][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, blocks in tensors():
        writer.write_tensor_data(blocks.data.numpy())
    writer.close()


def _add(writer: Any, name: str, value: Setting) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    else:
        writer.add_string(name, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, adds in vocabulary.adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{name}_token", adds)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
