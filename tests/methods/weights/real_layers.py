"""The linear layers of some blocks of the built-in model, with their inputs on its text."""

import torch

import fewbits
from fewbits.models.source import open_model


def real_layers(blocks, count=12, length=64):
    """name: (weight, inputs, held-out inputs) `[tokens, features]` of the dense model, half of `count` windows each."""
    source = open_model("builtin:tiny-lm")
    model, windows = source.load(), fewbits.TextSample(count=count, length=length).windows(source.tokenizer())
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(f"layers.{block}." in name for block in blocks):
            hooks.append(module.register_forward_hook(lambda one, inputs, output, name=name: seen.__setitem__(name, inputs[0].detach())))
    with torch.no_grad():
        model(input_ids=windows)
    found = {}
    for name, inputs in seen.items():
        first, second = (part.flatten(0, 1).float() for part in inputs.split(count // 2))
        found[name] = model.get_submodule(name).weight.detach().float(), first, second
    return found
