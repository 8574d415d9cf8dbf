"""Adapters of compressed models in PEFT's own folder format: written, trained further by PEFT, and read back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.tensor import CompressedTensor
from fewbits.export.checkpoint import load_checkpoint
from fewbits.formats.dense import Dense
from fewbits.formats.lowrank import LowRank
from fewbits.layers.linear import CompressedLinear, StoredLinear

try:
    from peft import LoraConfig, PeftModel
    from peft.tuners import lora
except ImportError as error:
    raise InputError("adapters are written and read with the package peft; pip install 'fewbits[peft]' would be right") from error

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # what PEFT puts before the names of the model's own modules
Adapter = Mapping[str, tuple[Tensor, Tensor]]  # by layer name: left [out, rank] and right [rank, in], the branch is left right


class CompressedLora(lora.Linear):
    """PEFT's low-rank layer around a CompressedLinear, whose codes stay: a branch cannot be merged into them."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **keywords: Any) -> None:
        with warnings.catch_warnings():
            # PEFT warns of every layer type that was registered and not built in.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(base_layer, adapter_name, config=config, **keywords)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise InputError("an adapter cannot be merged into codes; fewbits.export.peft.install_adapter would be right")


def registered(config: LoraConfig) -> LoraConfig:
    """The same configuration, told to wrap compressed layers: PEFT's registry of custom modules, which its file does not keep."""
    config._register_custom_module({CompressedLinear: CompressedLora})
    return config


def find_adapter(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of every compressed layer whose last term is a low-rank one, as apiq and lq_lora leave them.

    Raises InputError where there is none, or where the layer has more than weights: transforms or rounded inputs change
    what the branch reads, so that it is no adapter of the layer.
    """
    found = {}
    for name, layer in _layers(model).items():
        stored = layer.stored
        term = stored.weight.terms[-1]
        if len(stored.weight.terms) < 2 or not isinstance(term, LowRank):
            continue
        if stored.weight.input_transforms or stored.weight.output_transforms or stored.activation is not None:
            raise InputError(f"{name}: a branch behind transforms or rounded inputs is no adapter; apiq or lq_lora would be right")
        found[name] = (term.left.decode(), term.right.decode())
    if not found:
        raise InputError("the model has no low-rank branches; a folder compressed with apiq or lq_lora would be right")
    return found


def write_adapter(model: nn.Module | str | Path, output: str | Path) -> LoraConfig:
    """Write a PEFT folder, adapter_config.json and adapter_model.safetensors, of the branches of `model`, or of a compressed folder.

    Factors are float32 and exact; each layer has its own rank, and alpha equal to it, so that PEFT multiplies by one. Raises
    InputError where `output` holds something else, and as `find_adapter` does.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty; another name, or removing it, would be right")
    base = None if isinstance(model, nn.Module) else str(model)
    adapter = find_adapter(model if isinstance(model, nn.Module) else load_checkpoint(Path(model)))
    output.mkdir(parents=True, exist_ok=True)
    return write_factors(adapter, base, output)


def write_factors(adapter: Adapter, base: str | None, output: Path) -> LoraConfig:
    """Write a PEFT folder's two files of factors by layer name into the folder `output`; `base` is what the file says of its model."""
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in adapter.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = right.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = left.contiguous()
    config = _config(adapter, base)
    config.save_pretrained(str(output))
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    return registered(config)


def read_adapter(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A PEFT folder's factors by the model's layer names, with PEFT's scaling in the left one; the inverse of `write_adapter`.

    Raises InputError where the folder holds no plain LoRA adapter.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} is no PEFT folder; one with adapter_config.json and {WEIGHTS} would be right")
    config = LoraConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA" or config.use_dora or config.bias != "none":
        raise InputError(f"{folder} holds more than low-rank factors; a LoRA adapter without biases would be right")
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        layer = name.removeprefix(_PREFIX)
        right, left = tensors[key].float(), tensors[f"{name}.lora_B.weight"].float()
        alpha = config.alpha_pattern.get(layer, config.lora_alpha)
        found[layer] = (left * (alpha / (right.shape[0] ** 0.5 if config.use_rslora else right.shape[0])), right)
    return found


def detach_adapter(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Take the branches out of `model`, which is left as the frozen base, and return them."""
    adapter = find_adapter(model)
    for name in adapter:
        _replace(model, name, _layers(model)[name].stored.weight.terms[:-1])
    return adapter


def install_adapter(model: nn.Module, folder: str | Path) -> None:
    """Put a PEFT folder's factors into the compressed layers of the base `model`, in fp16, as terms that are stored with them.

    Raises InputError where a layer is missing, is of another shape, or has a branch already.
    """
    layers, adapter = _layers(model), read_adapter(folder)
    for name, (left, right) in adapter.items():
        if name not in layers:
            raise InputError(f"the model has no compressed layer {name!r}; the base that the adapter was trained on would be right")
        terms = layers[name].stored.weight.terms
        if isinstance(terms[-1], LowRank):
            raise InputError(f"{name} has a branch already; the base without it, as detach_adapter leaves it, would be right")
        _replace(model, name, (*terms, LowRank(Dense(left.half()), Dense(right.half()))))


def load_with_adapter(folder: str | Path, adapter: str | Path, *, trainable: bool = False, dtype: torch.dtype = torch.float32) -> PeftModel:
    """The base of a compressed `folder`, without its own branches, in a PeftModel with the PEFT folder `adapter` on it."""
    model = load_checkpoint(Path(folder), dtype)
    if any(isinstance(layer.stored.weight.terms[-1], LowRank) for layer in _layers(model).values()):
        detach_adapter(model)
    return attach(model, adapter, trainable=trainable)


def attach(model: nn.Module, adapter: str | Path, *, trainable: bool = False) -> PeftModel:
    """PEFT's own `PeftModel.from_pretrained`, with a configuration that knows compressed layers."""
    config = registered(LoraConfig.from_pretrained(str(adapter)))
    # What says that the adapter is for use alone would otherwise come from the file, over the argument.
    config.inference_mode = not trainable
    return PeftModel.from_pretrained(cast(Any, model), str(adapter), config=config, is_trainable=trainable)


def _config(adapter: Adapter, base: str | None) -> LoraConfig:
    ranks = {name: right.shape[0] for name, (_, right) in adapter.items()}
    most = max(ranks.values())
    # Patterns are regular expressions, to which a dot is any letter: these names are exact enough, as all layers are listed.
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=most,
        lora_alpha=most,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(ranks),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != most},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != most},
        inference_mode=True,
    )


def _layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """Compressed layers by the names that they have in the model itself, whether or not PEFT has wrapped it."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    return {name.removeprefix(_PREFIX).removesuffix(".base_layer"): module for name, module in found.items()}


def _replace(model: nn.Module, name: str, terms: tuple[Any, ...]) -> None:
    layer = model.get_submodule(name)
    assert isinstance(layer, CompressedLinear)
    stored = StoredLinear(CompressedTensor(terms), layer.stored.activation)
    model.set_submodule(name, CompressedLinear(stored, cast("Tensor | None", layer.bias)))
