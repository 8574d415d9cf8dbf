"""What a comparison will take: its configurations' own estimates, the passes of the dense model, and measuring."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fewbits.comparison.configuration import Configuration
from fewbits.data.text import TextSample
from fewbits.models.source import ModelSource
from fewbits.pipeline.dense_pass import DensePass
from fewbits.pipeline.feed import StreamOptions
from fewbits.pipeline.preflight import Estimate, batch_seconds, estimate_run
from fewbits.statistics.hessian import Hessian

_LOGITS = 6  # tensors of a batch's logits that are in memory together while two models are compared


def estimate_comparison(
    source: ModelSource,
    configurations: Sequence[Configuration],
    texts: tuple[TextSample, TextSample],
    repeats: int,
    options: StreamOptions,
) -> Mapping[str, Estimate]:
    """By configuration, all its repeats together; under "measuring" what is done for all of them on the second of `texts`.

    Writing samples is not counted. Raises what a run would raise for wrong input.
    """
    tokenizer = source.tokenizer()
    calibration, held = texts[0].windows(tokenizer), texts[1].windows(tokenizer)
    found: dict[str, Estimate] = {}
    for one in configurations:
        if one.plan is None:  # compressed before: it is only measured
            continue
        looks = one.reads_text  # who does not is given a single batch, as in the run
        given = options if looks else replace(options, inputs="original")
        single = estimate_run(source, one.plan, calibration if looks else calibration[: options.batch_size], given)
        found[one.name] = replace(single, seconds=single.seconds * (repeats if looks else 1))
    passes = 1 + sum(repeats if one.reads_text else 1 for one in configurations)
    memory = max((one.memory_bytes for one in found.values()), default=0)
    return {**found, "measuring": _measuring(source, held, passes, memory, options)}


def _measuring(source: ModelSource, windows: Tensor, passes: int, memory: int, options: StreamOptions) -> Estimate:
    """One pass of the dense model with its second moments kept, and one forward a run."""
    size = options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        spent: list[float] = []
        for batches in (1, 1, 2):  # the first is to warm up
            began = time.monotonic()
            dense = DensePass(source, windows[: batches * size], None, Path(folder) / str(len(spent)), replace(options, progress=None))
            dense.gather([Hessian], blocks=1)
            spent.append(time.monotonic() - began)
        kept = sum(path.stat().st_size for path in dense.store.folder.iterdir())
        blocks = len(dense.blocks)
    text = source.config.get_text_config()
    batch = batch_seconds(spent[1], spent[2]) if len(windows) > size else spent[1]
    hidden = windows.numel() * text.hidden_size * options.dtype.itemsize
    logits = _LOGITS * size * windows.shape[1] * text.vocab_size * 4
    seconds = passes * blocks * -(-len(windows) // size) * batch
    return Estimate(seconds, memory + logits, kept * blocks + 2 * hidden, ("writing samples",))
