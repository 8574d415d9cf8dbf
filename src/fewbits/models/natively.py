"""What a compressed model's steps of few tokens leave to native kernels beside its layers' products: attention, whole decoder layers,
all of them for a token, and the dense layers that are left.
"""

from torch import nn
from transformers import PreTrainedModel

from fewbits.models.decoder_stack import stack_by_itself, stack_natively
from fewbits.models.decoder_steps import step_by_itself, step_natively
from fewbits.models.dense_steps import multiply_by_itself, multiply_natively
from fewbits.models.packed_attention import attend_by_itself, attend_natively


def compute_natively(model: nn.Module) -> None:
    """Each where it can; elsewhere the model computes as before."""
    if isinstance(model, PreTrainedModel):
        attend_natively(model)
    step_natively(model)
    stack_natively(model)
    multiply_natively(model)


def compute_by_itself(model: nn.Module) -> None:
    """Undoes `compute_natively`."""
    if isinstance(model, PreTrainedModel):
        attend_by_itself(model)
    stack_by_itself(model)
    step_by_itself(model)
    multiply_by_itself(model)
