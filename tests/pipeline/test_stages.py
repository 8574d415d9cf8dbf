import pytest
import torch
from torch import nn

from fewbits.core.errors import InputError
from fewbits.core.method import Paper, Stage, TrainingMethod
from fewbits.models.batchnorm import gather
from fewbits.pipeline.stages import train_stages


class Twice(TrainingMethod):
    """Trains the weight, then the bias of a linear layer."""

    paper = Paper("none")

    def __init__(self):
        self.said = []

    def prepare(self, model):
        return model

    def stages(self, model):
        for name in ("weight", "bias"):
            rate = {"params": [getattr(model[0], name)], "lr": 0.1}
            yield Stage(name, 30, [rate], before=self.said.append, notes={"weight": model[0].weight.tolist()})
        yield Stage("norms", 2)

    def loss(self, outputs, targets, step):
        return (outputs - targets).square().mean()

    def finish(self, model):
        return model.eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(16, 2, generator=generator) for _ in range(2)]
    return [(one, one @ torch.tensor([[2.0], [-1.0]]) + 3) for one in inputs]


def test_stages_follow_each_other_and_see_what_the_last_one_left():
    torch.manual_seed(0)
    model, method, shown = nn.Sequential(nn.Linear(2, 1)), Twice(), []
    begun = model[0].weight.tolist()
    made, record = train_stages(model, method, batches(), progress=lambda *said: shown.append(said[:3]))
    assert [stage["stage"] for stage in record] == ["weight", "bias", "norms"]
    assert record[0]["notes"]["weight"] == begun and record[1]["notes"]["weight"] == made[0].weight.tolist() != begun
    assert record[0]["last_loss"] < record[0]["first_loss"] and record[1]["last_loss"] < 0.5 * record[1]["first_loss"]
    assert method.said == [step / 30 for step in range(30)] * 2 and shown[-1] == ("bias", 29, 30)
    assert "first_loss" not in record[2]


def test_batches_that_end_are_refused():
    with pytest.raises(InputError, match="there are no batches"):
        train_stages(nn.Sequential(nn.Linear(2, 1)), Twice(), [])
    with pytest.raises(InputError, match="do not start again"):
        train_stages(nn.Sequential(nn.Linear(2, 1)), Twice(), iter(batches()))


@torch.no_grad()
def test_gathered_statistics_are_means_over_batches_and_nothing_else_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3))
    weight, images = model[2].weight.clone(), [torch.randn(32, 4) * 3 + 1 for _ in range(3)]
    gather(model, images)
    torch.testing.assert_close(model[0].running_mean, torch.stack([one.mean(0) for one in images]).mean(0))
    hidden = torch.stack([model[2](nn.functional.batch_norm(one, None, None, model[0].weight, model[0].bias, True)) for one in images])
    torch.testing.assert_close(model[3].running_var, hidden.var(1).mean(0), rtol=1e-4, atol=1e-4)
    assert model[3].momentum == 0.3 and not any(module.training for module in model.modules()) and torch.equal(model[2].weight, weight)
