import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fewbits.core.errors import InputError
from fewbits.export.module import load_module, save_module
from fewbits.methods.weights.udfc import Udfc


def compressed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 4)).eval()
    Udfc(share=0.25, bits=4).rewrite(model)
    return model


def dense():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 4))


@torch.no_grad()
def test_any_compressed_model_goes_through_a_file(tmp_path):
    model, images = compressed(), torch.randn(2, 3, 8, 8)
    save_module(model, tmp_path / "model.safetensors")
    assert torch.equal(load_module(dense(), tmp_path / "model.safetensors")(images), model(images))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_wrong_files_and_models_are_named(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="no compressed layer"):
        save_module(dense(), file)
    save_module(compressed(), file)
    with pytest.raises(InputError, match="exists"):
        save_module(compressed(), file)
    with pytest.raises(InputError, match="has not"):
        load_module(dense()[:3], file)
    with pytest.raises(InputError, match="does not fit"):
        load_module(nn.Sequential(*dense(), nn.BatchNorm1d(4)), file)
    with pytest.raises(InputError, match="cannot be read"):
        load_module(dense(), tmp_path / "none")
    save_file({"0.weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(InputError, match="written by save_module"):
        load_module(dense(), tmp_path / "other")
