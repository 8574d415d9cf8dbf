"""The whole compressed model trained on text once all blocks are stored.

Source: EfficientQAT (arXiv 2407.11062), section 3.3; GQSA's second stage (arXiv 2412.17560); PV-Tuning (arXiv 2405.14852).
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fewbits.core.errors import InputError
from fewbits.core.method import GradientMethod, Tuning
from fewbits.layers.learned import LearnedLinear
from fewbits.layers.linear import StoredLinear
from fewbits.layers.tuned import TunedLinear
from fewbits.models.source import ModelSource
from fewbits.pipeline.feed import Progress
from fewbits.pipeline.store import Store
from fewbits.pipeline.train import Schedule
from fewbits.pipeline.whole import TextRun, train_on_text, whole_model

_STATE, _NORM = "tuned", "norm"


def tune_blocks(
    source: ModelSource, method: GradientMethod, store: Store, blocks: int, text: tuple[Tensor, Tensor | None], progress: Progress | None
) -> None:
    """Train every layer of the finished `store` as the method's `tuning` says, and write the blocks anew.

    A run that is killed while it trains starts the training again; after it, it ends in the same bytes. The layers' errors in
    the manifests stay those from before the training. The whole model is in memory, with a teacher twice.
    """
    tuning = method.tuning()
    assert tuning is not None
    tuned = [all(entry.get("tuned") for entry in store.manifest(block)["layers"].values()) for block in range(blocks)]
    if all(tuned):
        return
    if not store.has_state(_STATE):
        if any(tuned):
            raise InputError(f"{store.folder} holds blocks tuned by a run whose result is lost; start again with --fresh")
        store.write_state(_STATE, _Tuned(source, method, tuning, store, blocks).train(text, progress))
    state = store.state(_STATE)
    norms = {name.removeprefix(f"{_NORM}/"): value for name, value in state.items() if name.startswith(f"{_NORM}/")}
    for block in range(blocks):
        layers = dict(store.layers(block))
        for name, stored in layers.items():
            learned = _reopened(method, tuning, stored, None)
            learned.load_state_dict({key: state[f"{name}/{key}"] for key in learned.state_dict()})
            layers[name] = learned.finish()
        entries = {name: entry | {"tuned": True} for name, entry in store.manifest(block)["layers"].items()}
        # Norms lie in the first block's file: what a file holds of them counts for the whole model.
        replaced = store.replaced(block) if block else store.replaced(block) | norms
        replaced = replaced if block == 0 else {name: value for name, value in replaced.items() if name not in norms}
        store.write_block(block, layers, {"layers": entries}, replaced)
    store.drop_state(_STATE)


def _reopened(method: GradientMethod, tuning: Tuning, stored: StoredLinear, bias: Tensor | None) -> LearnedLinear:
    learned = method.reopen(stored, bias)
    return TunedLinear(stored, bias, tuning.tensors, tuning.rate) if learned is None else cast(LearnedLinear, learned)


class _Tuned:
    """The model with a stand-in in the place of every stored layer."""

    def __init__(self, source: ModelSource, method: GradientMethod, tuning: Tuning, store: Store, blocks: int) -> None:
        self.source, self.tuning = source, tuning
        stored = {name: layer for block in range(blocks) for name, layer in store.layers(block)}
        self.learned: dict[str, LearnedLinear] = {}

        def replace(name: str, linear: nn.Module) -> nn.Module | None:
            if name not in stored:
                return None
            self.learned[name] = _reopened(method, tuning, stored.pop(name), cast("Tensor | None", linear.bias))
            return self.learned[name]

        self.model = whole_model(source, replace).train()
        for block in range(blocks):
            for name, value in store.replaced(block).items():
                self.model.get_parameter(name).data.copy_(value)

    def train(self, text: tuple[Tensor, Tensor | None], progress: Progress | None) -> dict[str, Tensor]:
        """What was learned: layer/tensor, and norm/name in the file's dtype."""
        tuning, norms = self.tuning, self._norms()
        groups = [group for one in self.learned.values() for group in one.groups()]
        if norms:
            groups.append({"params": list(norms.values()), "lr": tuning.norm_rate})
        run = TextRun("tuning", tuning.steps, Schedule("cosine"), tuning.clip, tuning.batch_size, tuning.seed)
        teacher = whole_model(self.source, lambda name, linear: None) if tuning.teacher else None
        train_on_text(self.model, groups, text, run, progress, teacher=teacher, before=self._advance)
        for one in self.learned.values():
            one.harden()
        found = {
            f"{name}/{key}": value.detach()
            for name, one in self.learned.items()
            for key, value in one.state_dict().items()
            if key != "bias"
        }
        return found | {f"{_NORM}/{name}": one.detach().to(self.source.parameter(name).dtype) for name, one in norms.items()}

    def _advance(self, progress: float) -> None:
        for one in self.learned.values():
            one.advance(progress, True)

    def _norms(self) -> dict[str, nn.Parameter]:
        """Norm weights by full name; biases and whatever belongs to a compressed layer are none."""
        if not self.tuning.norm_rate:
            return {}
        inside = tuple(f"{name}." for name in self.learned)
        named = {name: one for name, one in self.model.named_parameters() if one.ndim == 1 and not name.endswith("bias")}
        norms = {name: one for name, one in named.items() if not name.startswith(inside)}
        for one in norms.values():
            one.requires_grad_(True)
        return norms
