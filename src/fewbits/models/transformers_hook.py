"""Makes transformers load fewbits' folders: importing fewbits registers the quantization method of that name."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.core.errors import InputError
from fewbits.kernels.native import Rooms
from fewbits.layers.linear import CompressedLayer, CompressedLinear
from fewbits.models.experts import separate_experts
from fewbits.models.natively import compute_natively
from fewbits.models.vocabulary import place_compressed


@register_quantization_config("fewbits")
class FewbitsConfig(QuantizationConfigMixin):
    """What config.json says: the settings of every compressed layer by its full name."""

    def __init__(self, layers: dict[str, Any], format: int, **_: Any) -> None:
        self.quant_method = "fewbits"  # type: ignore[assignment]
        self.layers, self.format = layers, format


@register_quantizer("fewbits")
class FewbitsQuantizer(HfQuantizer):
    """Puts empty compressed layers where transformers will read their tensors."""

    requires_calibration = True
    is_trainable = True  # adapters on the frozen layers are: a Trainer refuses models that say no

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        prefix = getattr(model, "base_model_prefix", "")
        separate_experts(model)
        modules = dict(model.named_modules())
        for name, settings in self.quantization_config.layers.items():  # type: ignore[attr-defined]
            here = next((one for one in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if one in modules), None)
            if here is None:
                raise InputError(f"the model has no layer {name!r}, which the folder says is compressed")
            place_compressed(model, here, CompressedLinear.empty(settings).stored, model.dtype)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        rooms = Rooms()
        for module in model.modules():
            if isinstance(module, CompressedLayer):
                module.settle(rooms)
        compute_natively(model)
        return model
