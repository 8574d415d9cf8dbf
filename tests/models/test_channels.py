import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fewbits.models.channels import Layer, find_channels

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def links(model):
    return {(link.producers, link.consumers, link.one_to_one) for link in find_channels(model).links}


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def test_a_chain_is_linked_through_norm_activation_pooling_and_flattening():
    model = nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(24, 2)
    )  # fmt: skip
    found = find_channels(model)
    assert links(model) == {(("0",), ("3",), False), (("3",), ("8",), False)}
    assert found.layers == (Layer("0", "1"), Layer("3", None), Layer("8", None))


class Functional(nn.Module):
    """Residual block, pooling and flattening by functions and methods."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second, self.head = conv(3, 4), conv(4, 5), conv(5, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.second(F.relu(self.norm(self.first(x))))
        x = F.avg_pool2d(F.max_pool2d(x, 2), x.size()[3] // 2)
        return self.head(x.view(x.size(0), -1))


def test_of_a_residual_block_only_the_inner_channels_are_linked():
    model = Functional()
    assert links(model) == {(("first",), ("second",), False)}
    assert [layer.name for layer in find_channels(model).layers] == ["stem", "first", "second", "head"]


def test_depthwise_filters_stay_one_to_one_and_other_groups_are_left():
    separable = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, groups=4), nn.ReLU(), conv(4, 2))
    assert links(separable) == {(("0",), ("2",), True), (("2",), ("4",), True)}
    grouped = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4, groups=2), nn.ReLU(), conv(4, 2))
    assert links(grouped) == set() and len(find_channels(grouped).layers) == 3


class Odd(nn.Module):
    """Channels that are concatenated, squeezed, read twice, normalized late, made twice, or looked at from outside."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.late, self.tied, self.last = (conv(4, 4) for _ in range(5))
        self.seen, self.reader, self.other = conv(4, 4), conv(4, 4), conv(4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.tied.weight = self.last.weight

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)).relu()).relu()
        x = self.norm(self.late(x).relu())
        x = self.last(self.tied(x).relu())
        x = self.seen(torch.cat([x, x])) * self.seen.weight.sum()
        return self.reader(x) + self.other(x)


def test_what_cannot_be_followed_is_left_alone():
    assert links(Odd()) == set()
    assert {layer.name for layer in find_channels(Odd()).layers} == {"first", "late", "seen", "reader", "other"}


class Shared(nn.Module):
    """One layer's channels, read by two."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = conv(3, 4), conv(4, 2), conv(4, 2)

    def forward(self, x):
        x = self.first(x).relu()
        return self.left(x) + self.right(x)


def test_two_readers_are_one_link():
    assert links(Shared()) == {(("first",), ("left", "right"), False)}


def test_mlps_are_found_in_models_that_cannot_be_traced():
    llama = LlamaForCausalLM(LlamaConfig(**SMALL))
    expected = {((f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj"), (f"model.layers.{i}.mlp.down_proj",), False)
                for i in range(2)}  # fmt: skip
    assert links(llama) == expected and len(find_channels(llama).layers) == 6
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32))
    assert links(gpt2) == {((f"transformer.h.{i}.mlp.c_fc",), (f"transformer.h.{i}.mlp.c_proj",), False) for i in range(2)}


class Turned(nn.Module):
    """Channels that are read a second time, transposed by an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.second(x.reshape(x.shape[0], 4)) + x.mT + self.second.bias


def test_an_attribute_is_no_size():
    assert links(Turned()) == set()
    assert links(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))) == {(("0",), ("2",), False)}


def test_a_linear_layer_over_pixels_is_no_reader_of_channels():
    assert links(nn.Sequential(conv(3, 4), nn.ReLU(), nn.Linear(8, 2))) == set()
