import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from fewbits.core.errors import InputError, NumericsError
from fewbits.core.method import Statistics
from fewbits.layers.linear import CompressedLinear, StoredLinear
from fewbits.methods.activations.smoothquant import Smoothquant
from fewbits.methods.weights.awq import Awq
from fewbits.methods.weights.gptq import Gptq
from fewbits.methods.weights.rtn import Rtn
from fewbits.methods.weights.squeezellm import Squeezellm
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model
from fewbits.pipeline.feed import Feed
from fewbits.pipeline.fold import fold_scales
from fewbits.pipeline.gather import SharedInputs
from fewbits.pipeline.plan import Plan
from fewbits.pipeline.stream import StreamOptions, compress_model
from fewbits.statistics.hessian import Hessian
from fewbits.statistics.moments import Moments

WINDOWS = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(0))
PLAN = Plan(Gptq(bits=3, group_size=16))


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_llama().save_pretrained(path)
    return path


def contents(work):
    return {path.name: path.read_bytes() for path in sorted(work.iterdir()) if path.name.startswith("block-")}


def test_the_result_is_the_method_applied_to_inputs_of_compressed_predecessors(folder, tmp_path):
    """The oracle compresses the loaded model block by block with plain hooks."""
    source = open_model(folder)
    summary = compress_model(source, PLAN, WINDOWS, tmp_path, StreamOptions(batch_size=4))
    model = source.load()
    for block in Adapter(model).blocks:
        linears = Adapter(model).linears(block)
        hessians = {name: Hessian(linear.in_features) for name, linear in linears.items()}
        hooks = [linears[n].register_forward_pre_hook(lambda _, x, n=n: hessians[n].update(x[0].flatten(0, 1))) for n in linears]  # noqa: B023
        with torch.no_grad():
            model(WINDOWS)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            linear.weight.data = PLAN.method.compress(linear.weight.data, Statistics(hessians[name])).decode()
    stored = dict(summary.layers())
    model.requires_grad_(False)
    agree = [float((stored[n].weight.decode() - m.weight).abs().mean() / m.weight.abs().mean()) for n, m in _linears(model).items()]
    assert set(stored) == set(_linears(model)) and max(agree) < 1e-3


def _linears(model):
    adapter = Adapter(model)
    return {name: linear for block in adapter.blocks for name, linear in adapter.linears(block).items()}


def test_linears_that_read_one_tensor_are_one_group(folder):
    model = open_model(folder).load()
    adapter = Adapter(model)
    groups = SharedInputs(adapter.linears(adapter.blocks[0]), [Hessian])
    model(WINDOWS)
    groups.settle()
    model(WINDOWS)
    gathered = groups.close()
    assert all(statistics.tokens == 2 * WINDOWS.numel() for statistics in gathered.values())
    assert [[name.rpartition(".")[2] for name in group] for group in gathered] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(folder, tmp_path):
    source, seen = open_model(folder), []
    compress_model(source, PLAN, WINDOWS, tmp_path / "whole")

    def stop(block, *_):
        if block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, PLAN, WINDOWS, tmp_path / "stopped", StreamOptions(progress=stop))
    compress_model(source, PLAN, WINDOWS, tmp_path / "stopped", StreamOptions(progress=lambda block, *_: seen.append(block)))
    assert set(seen) == {2, 3}
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_other_settings_do_not_continue_a_run(folder, tmp_path):
    source = open_model(folder)
    compress_model(source, PLAN, WINDOWS, tmp_path)
    with pytest.raises(InputError, match=r"bits was 3, now 4.*--fresh"):
        compress_model(source, Plan(Gptq(bits=4, group_size=16)), WINDOWS, tmp_path)
    with pytest.raises(InputError, match="windows"):
        compress_model(source, PLAN, WINDOWS.flip(0), tmp_path)


def test_original_inputs_are_another_choice(folder, tmp_path):
    source = open_model(folder)
    chosen = {}
    for inputs in ("original", "propagated"):
        chosen[inputs] = dict(compress_model(source, PLAN, WINDOWS, tmp_path / inputs, StreamOptions(inputs=inputs)).layers())
    same = {n: torch.equal(chosen["original"][n].weight.decode(), chosen["propagated"][n].weight.decode()) for n in chosen["original"]}
    assert all(same[n] for n in same if ".0." in n) and not all(same[n] for n in same if ".3." in n)


def test_overrides_and_kept_layers_are_respected_and_named(folder, tmp_path):
    plan = Plan(Rtn(bits=4, group_size=16), keep=("*.o_proj",), overrides=(("*.down_proj", Gptq(bits=8, group_size=16)),))
    summary = compress_model(open_model(folder), plan, WINDOWS, tmp_path)
    bits = {name: stored.weight.terms[0].bits_per_code for name, stored in summary.layers()}
    assert {name.rpartition(".")[2]: value for name, value in bits.items()} == {
        "q_proj": 4, "k_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 8,
    }  # fmt: skip
    record = summary.record()
    assert record["kept"]["model.layers.2.self_attn.o_proj"] == "kept by the pattern '*.o_proj'"
    assert record["kept"]["model.embed_tokens"] == "embedding"
    assert sum(record["bits"].values()) == sum(sum(stored.bits().values()) for _, stored in summary.layers())


def test_a_run_that_would_leave_most_weights_alone_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="keep less than half"):
        compress_model(open_model(folder), Plan(Rtn(), keep=("*mlp*", "*q_proj")), WINDOWS, tmp_path)


def test_a_broken_weight_is_named(tmp_path):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NumericsError, match=r"model\.layers\.2\.mlp\.up_proj: the weight is not finite"):
        compress_model(open_model(tmp_path / "model"), Plan(Rtn(bits=4)), WINDOWS, tmp_path / "work")


def test_the_compressed_layers_run_in_the_model(folder, tmp_path):
    source = open_model(folder)
    model, dense = source.load(), source.load()
    for name, stored in compress_model(source, Plan(Gptq(bits=8, group_size=16)), WINDOWS, tmp_path).layers():
        model.set_submodule(name, CompressedLinear(stored))
    with torch.no_grad():
        ours, theirs = model(WINDOWS).logits, dense(WINDOWS).logits
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.02


def padded(length=4):
    """The windows with some more tokens that are padding, and the mask."""
    noise = torch.randint(64, (len(WINDOWS), length), generator=torch.Generator().manual_seed(7))
    mask = torch.arange(WINDOWS.shape[1] + length) < WINDOWS.shape[1]
    return torch.cat([WINDOWS, noise], dim=1), mask.expand(len(WINDOWS), -1)


def moe():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)).eval()


@pytest.mark.parametrize("made", [small_llama, moe])
def test_padding_counts_for_nothing(made, tmp_path):
    made().save_pretrained(tmp_path / "model")
    source, (windows, mask) = open_model(tmp_path / "model"), padded()
    whole = compress_model(source, PLAN, WINDOWS, tmp_path / "whole")
    masked = compress_model(source, PLAN, windows, tmp_path / "masked", mask=mask)
    counted = compress_model(source, PLAN, windows, tmp_path / "counted")
    errors = [[layer["relative_error"] for layer in one.record()["layers"].values()] for one in (whole, masked, counted)]
    tokens = [[layer["tokens"] for layer in one.record()["layers"].values()] for one in (whole, masked, counted)]
    assert tokens[0] == tokens[1] and sum(tokens[2]) > sum(tokens[0])
    assert errors[1] == pytest.approx(errors[0], rel=1e-2) and errors[2] != pytest.approx(errors[0], rel=1e-2)


def test_an_expert_that_saw_no_token_is_rounded_to_nearest_and_named(tmp_path):
    model = moe()
    with torch.no_grad():
        router = model.model.layers[0].mlp.gate
        router.weight.zero_()  # every token goes to the first two experts
    model.save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    summary = compress_model(source, PLAN, WINDOWS, tmp_path / "work")
    silent = {f"model.layers.0.mlp.experts.{part}.{expert}" for part in ("gate_up_proj", "down_proj") for expert in range(4)}
    silent = {name for name in silent if not summary.record()["layers"][name]["tokens"]}
    assert len(silent) == 4 and silent <= set(summary.record()["silent"])
    for name, stored in summary.layers():
        if name in silent:
            plain = Rtn(bits=3, group_size=16).compress(source.parameter(f"{name}.weight").float(), Statistics())
            assert torch.equal(stored.weight.decode(), plain.decode())


def test_a_mask_that_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="a mask"):
        compress_model(open_model(folder), PLAN, WINDOWS, tmp_path, mask=torch.zeros(WINDOWS.shape, dtype=torch.bool))


@pytest.mark.parametrize("method", [Awq(bits=4, group_size=16), Smoothquant()])
def test_scales_move_into_the_norms_and_the_function_stays(folder, tmp_path, method):
    source = open_model(folder)
    apart, folded = (
        compress_model(source, Plan(method), WINDOWS, tmp_path / str(fold), StreamOptions(fold=fold)) for fold in (False, True)
    )
    assert apart.replaced() == {} and not apart.record()["replaced"]
    assert len(folded.replaced()) == 8  # both norms of four blocks
    scaled = {n.rpartition(".")[2] for n, s in folded.layers() if s.weight.input_transforms}
    assert scaled == {"o_proj", "down_proj"} and all(s.weight.input_transforms for _, s in apart.layers())
    models = []
    for summary in (apart, folded):
        model = source.load()
        for name, stored in summary.layers():
            model.set_submodule(name, CompressedLinear(stored))
        for name, value in summary.replaced().items():
            model.get_parameter(name).data.copy_(value)
        models.append(model)
    with torch.no_grad():
        ours, theirs = (model(WINDOWS).logits for model in models)
    assert float((ours - theirs).norm() / theirs.norm()) < 0.01
    assert sum(folded.record()["bits"].values()) < sum(apart.record()["bits"].values())


def test_a_norm_with_other_readers_keeps_its_scale():
    """A router reads the norm as well: folding would change what it says, which the block's outputs show."""

    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.gate = torch.nn.LayerNorm(16), torch.nn.Parameter(torch.randn(16))
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, x):
            inner = self.norm(x)
            return x + self.layer(inner) * (inner @ self.gate)[..., None]

    torch.manual_seed(0)
    block, x = Routed().requires_grad_(False), torch.randn(2, 5, 16)
    moments, hessian = Moments(16), Hessian(16)
    for statistic in (moments, hessian):
        statistic.update(x.flatten(0, 1) * torch.linspace(0.1, 5, 16))
    stored = {"layer": StoredLinear(Awq(bits=4, group_size=16).compress(block.layer.weight.data, Statistics(hessian, moments)))}
    block.layer = CompressedLinear(stored["layer"], block.layer.bias)
    before = block(x)
    folded, parameters = fold_scales(block, stored, [("layer",)], lambda: block(x))
    assert folded == {} and parameters == {} and torch.equal(block(x), before)
    block.gate.data.zero_()
    block.gate.data[0] = 1e-9  # nobody else listens any more
    block.forward = lambda y: y + block.layer(block.norm(y))
    assert set(fold_scales(block, stored, [("layer",)], lambda: block(x))[1]) == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(("method", "gathers"), [(Rtn(bits=3, group_size=16), False), (PLAN.method, True)])
def test_what_asks_nothing_of_the_inputs_runs_a_single_batch(method, gathers, folder, tmp_path, monkeypatch):
    """The text is then no part of the result: errors are the weights' own, and no layer is said to have seen tokens."""
    calls = []
    run = Feed.run
    monkeypatch.setattr(Feed, "run", lambda self, *arguments: calls.append(arguments[0]) or run(self, *arguments))
    summary = compress_model(open_model(folder), Plan(method), WINDOWS, tmp_path / "all", StreamOptions(batch_size=2))
    passes = len(calls)
    assert passes == (7 * 3 if gathers else 7)  # every block twice, but for the outputs of the last one
    layers = summary.record()["layers"].values()
    assert {layer["error_of"] for layer in layers} == {"outputs" if gathers else "weights"}
    assert {layer["tokens"] for layer in layers} == ({WINDOWS.numel()} if gathers else {None}) and not summary.record()["silent"]


def test_methods_say_for_each_setting_what_they_need():
    assert Plan(Squeezellm()).needs() == set() and Plan(Squeezellm(feedback=True)).needs() == {Hessian}
    assert Plan(Rtn(), overrides=(("*.q_proj", Gptq()),)).needs() == {Hessian}
