"""vLLM's way to a folder that fewbits compressed: found through the entry point `vllm.general_plugins`.

Written for the interfaces of vLLM 0.33. A linear that vLLM makes of several of the model's (qkv_proj, gate_up_proj) computes each
of them with its own terms and puts the outputs side by side. Only vLLM imports this module, as it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from fewbits.core.errors import InputError
from fewbits.export.checkpoint import FORMAT
from fewbits.layers.linear import CompressedLinear

_QKV = {"q": 0, "k": 1, "v": 2}  # vLLM's names for the parts of a qkv_proj; those of other layers are numbers
_COMPUTING: WeakValueDictionary[str, nn.ModuleList] = WeakValueDictionary()


def register() -> None:
    """What the entry point calls, once in every process of vLLM."""
    register_quantization_config("fewbits")(FewbitsConfig)


class FewbitsConfig(QuantizationConfig):  # type: ignore[misc]
    """What config.json says of a folder: the settings of every compressed linear by its name in the model."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = dict(layers)

    def get_name(self) -> str:
        return "fewbits"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Every GPU: where no kernel serves, torch computes."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FewbitsConfig:
        """Of `quantization_config` in config.json. Raises InputError where it is of another version."""
        if config.get("format") != FORMAT:
            raise InputError(f"the folder is of format {config.get('format')!r}; {FORMAT}, as fewbits compress writes it, would be right")
        return cls(config["layers"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names as vLLM's model has them."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How `layer` is computed; None: as vLLM would without us.

        Raises InputError where a part of it is compressed and the rest is not, or it is compressed and no linear layer.
        """
        if not isinstance(layer, LinearBase):
            below = [name for name in self.layers if name == prefix or name.startswith(f"{prefix}.")]
            if below:
                kind = type(layer).__name__
                raise InputError(f"{below[0]} is compressed and is computed by a {kind}; a model whose linears alone are would be right")
            return None
        parts = self._parts(prefix)
        held = [name for name in parts if name in self.layers]
        if not held:
            return UnquantizedLinearMethod()
        if len(held) < len(parts):
            missing = ", ".join(name for name in parts if name not in held)
            raise InputError(f"{prefix} is computed as one, and {missing} is not compressed; all of its parts, or none, would be right")
        return FewbitsLinearMethod(prefix, [self.layers[name] for name in parts])

    def _parts(self, prefix: str) -> list[str]:
        """Names of the model's linears that one of vLLM's is made of, in the order of its outputs."""
        owner, _, last = prefix.rpartition(".")
        if prefix in self.layers or last not in self.packed_modules_mapping:
            return [prefix]
        return [f"{owner}.{part}" if owner else part for part in self.packed_modules_mapping[last]]


class FewbitsLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Computes a linear layer from the terms of its parts.

    vLLM loads by name into the layer's parameters, and the parts of one layer share theirs though they differ in size. So the
    parameters are empty and stand for the names alone, until all is loaded; what is loaded goes into the parts' own buffers.
    """

    def __init__(self, prefix: str, settings: list[Mapping[str, Any]]) -> None:
        self.prefix, self.settings = prefix, settings

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises InputError where the layer is shared out over several GPUs, or stored in other sizes."""
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise InputError(f"{self.prefix} is shared out over several GPUs; --tensor-parallel-size 1 would be right")
        parts = nn.ModuleList(CompressedLinear.empty(one) for one in self.settings)
        found = [(part.out_features, part.in_features) for part in parts]
        rows = output_partition_sizes if len(parts) > 1 else [output_size]
        if found != [(one, input_size) for one in rows]:
            raise InputError(f"{self.prefix} is stored in sizes {found}, and the model has {rows} outputs of {input_size} inputs")
        layer.fewbits_parts = parts
        dtypes = {name: buffer.dtype for part in parts for name, buffer in part.named_buffers()}
        for name, dtype in dtypes.items():
            name_only = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            name_only.weight_loader = partial(_load, parts, name, self.prefix)  # type: ignore[attr-defined]
            layer.register_parameter(name, name_only)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises InputError where a tensor was not in the folder's files."""
        parts = cast(nn.ModuleList, layer.fewbits_parts)
        for index, part in enumerate(parts):
            for name, buffer in part.named_buffers():
                if buffer.is_meta:
                    raise InputError(
                        f"the tensor {name} of part {index} of {self.prefix} is missing from the folder; a whole one would be right"
                    )
                layer._parameters.pop(name, None)
            cast(CompressedLinear, part).settle()
        cast(Any, layer).fewbits_name = _name(self.prefix, parts)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        outputs = products(x, layer.fewbits_name)
        return outputs if bias is None else outputs + bias


@torch.library.custom_op("fewbits::products", mutates_args=())
def products(inputs: Tensor, name: str) -> Tensor:
    """`inputs [..., in]` times every part of the layer `name`, side by side: one operation to torch.compile, which looks no deeper."""
    return torch.cat([part(inputs) for part in _COMPUTING[name]], -1)


@products.register_fake
def _(inputs: Tensor, name: str) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], sum(cast(CompressedLinear, part).out_features for part in _COMPUTING[name]))


def _load(parts: nn.ModuleList, name: str, prefix: str, parameter: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
    """Put a tensor of the file into the part that vLLM calls `shard`. Raises InputError where it does not fit."""
    index = 0 if shard is None else _QKV.get(shard, -1) if isinstance(shard, str) else shard
    if not isinstance(index, int) or not 0 <= index < len(parts) or (shard is None and len(parts) > 1):
        raise InputError(f"{prefix} has {len(parts)} parts, and none of them is {shard!r}")
    expected = getattr(parts[index], name, None)
    if expected is None or (expected.dtype, expected.shape) != (loaded.dtype, loaded.shape):
        wanted = "no such tensor" if expected is None else f"{expected.dtype} {list(expected.shape)}"
        raise InputError(f"{name} of part {index} of {prefix} is {loaded.dtype} {list(loaded.shape)}; {wanted} would be right")
    setattr(parts[index], name, loaded.to(parameter.device))


def _name(prefix: str, parts: nn.ModuleList) -> str:
    """A name for the parts of a layer that is the same whenever the same models are loaded in the same order."""
    number = 1
    while (name := prefix if number == 1 else f"{prefix}#{number}") in _COMPUTING:
        number += 1
    _COMPUTING[name] = parts
    return name
