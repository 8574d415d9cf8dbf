"""Another attention function in the place of a model's own."""

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface


def exchange_attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> None:
    """From now on `model` attends with `function`, known to transformers as `name`, and is given the masks that it was given before."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[model.config._attn_implementation])
    model.set_attn_implementation(name)
