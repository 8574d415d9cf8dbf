"""The built-in model with each block at one of two or three widths: what orders of the blocks are compared on."""

import torch

from fewbits.core.allocation_method import AllocationProblem
from fewbits.core.method import Statistics
from fewbits.data.text import TextSample
from fewbits.models.adapter import oriented, weight_matrix
from fewbits.models.source import open_model
from fewbits.pipeline.gather import SharedInputs
from fewbits.pipeline.probe import ModelProbe


def open_probe(text, count, length):
    source = open_model("builtin:tiny-lm")
    return ModelProbe(source, TextSample(text, count, length).windows(source.tokenizer()))


class Widths:
    """A probe and, for every block, its linear weights under each option, and the stored bits of these."""

    def __init__(self, probe, methods, calibration=None):
        self.probe, self.names = probe, tuple(str(method.bits) for method in methods)
        self.values, sizes, self.known = {}, {}, {}
        for number, block in enumerate(probe.blocks):
            statistics = {} if calibration is None else gathered(calibration, number, methods[0].needs)
            for option, method in enumerate(methods):
                bits = 0
                for layer, linear in probe.linears[block].items():
                    tensor = method.compress(weight_matrix(linear).float().contiguous(), statistics.get(layer, Statistics()))
                    bits += sum(tensor.bits().values())
                    self.values[block, option, f"{layer}.weight"] = oriented(linear, tensor.decode()).contiguous()
                sizes.setdefault(block, []).append(bits)
        self.sizes = {block: tuple(row) for block, row in sizes.items()}

    def problem(self, scores):
        return AllocationProblem(self.names, self.sizes, scores=dict(scores))

    def loss(self, chosen):
        """The mean next-token loss where every block has its option; the same choice is measured once."""
        key = tuple(chosen[block] for block in self.probe.blocks)
        if key not in self.known:
            picked = {name: value for (block, option, name), value in self.values.items() if chosen[block] == option}
            with torch.no_grad(), self.probe.changed(picked):
                self.known[key] = float(self.probe.losses().mean())
        return self.known[key]


def gathered(probe, number, needs):
    """Statistics of every layer's dense inputs."""
    block = probe.blocks[number]
    shared = SharedInputs(probe.linears[block], needs)
    with torch.no_grad():
        probe._calls[0][block].run(probe.block(block), probe._states[number][0])
        shared.settle()
        for calls, hidden in zip(probe._calls[1:], probe._states[number][1:], strict=True):
            calls[block].run(probe.block(block), hidden)
    return {layer: one for group, one in shared.close().items() for layer in group}
