import pytest
import torch
from torch import nn

from fewbits.models.batchnorm import can_fold, fold


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_folded_layer_does_what_both_did(affine, bias):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine, eps=0.1).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.01, 2)
    if affine:
        norm.weight.normal_()
        norm.bias.normal_()
    inputs = torch.randn(2, 3, 6, 6)
    weight, offset = fold(conv.weight, conv.bias, norm)
    torch.testing.assert_close(nn.functional.conv2d(inputs, weight.float(), offset.float()), norm(conv(inputs)))


def test_only_a_norm_that_remembers_its_statistics_can_be_folded():
    assert can_fold(nn.BatchNorm1d(4), 4)
    assert not can_fold(nn.BatchNorm1d(4), 5) and not can_fold(nn.LayerNorm(4), 4)
    assert not can_fold(nn.BatchNorm2d(4, track_running_stats=False), 4)
