import shutil

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fewbits.core.errors import InputError
from fewbits.data.standard_library import heldout_documents
from fewbits.evaluation.fidelity import score
from fewbits.models.adapter import Adapter
from fewbits.models.source import open_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
}


@pytest.fixture(params=list(MODELS))
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return model, tmp_path


def test_a_shell_filled_lazily_is_the_model(saved):
    model, path = saved
    source = open_model(path)
    shell = source.shell()
    assert all(parameter.is_meta for parameter in shell.parameters())
    source.load_module(shell, "")
    shell.tie_weights()
    tokens = torch.randint(64, (2, 10))
    with torch.no_grad():
        assert torch.equal(shell(tokens).logits, model(tokens).logits)


def test_one_block_is_loaded_alone(saved):
    _, path = saved
    source = open_model(path)
    shell = source.shell()
    first, second = Adapter(shell).blocks
    source.load_module(shell, second, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in shell.get_submodule(second).parameters())
    assert all(parameter.is_meta for parameter in shell.get_submodule(first).parameters())


def test_every_matrix_is_a_linear_of_a_block_or_named_as_kept(saved):
    model, _ = saved
    adapter = Adapter(model)
    named = {name for block in adapter.blocks for name in adapter.linears(block)} | set(adapter.kept)
    matrices = {name.removesuffix(".weight") for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.ndim >= 2}
    assert matrices <= named and len(adapter.blocks) == 2
    assert not {name for name in adapter.kept if name.startswith(adapter.blocks)}


def test_the_fingerprint_sees_a_changed_weight(saved, tmp_path_factory):
    model, path = saved
    before = open_model(path).fingerprint()
    assert open_model(path).fingerprint() == before
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    changed = tmp_path_factory.mktemp("changed")
    model.save_pretrained(changed, max_shard_size="20KB")
    assert open_model(changed).fingerprint() != before


def test_what_is_no_model_is_named(tmp_path):
    known = "builtin:tiny-lm or builtin:minilm would be right"
    for name, says in [
        ("nowhere", "is no folder"),
        (tmp_path, "no config.json"),
        ("builtin:huge", known),
    ]:
        with pytest.raises(InputError, match=says):
            open_model(name)


def test_a_name_on_the_hub_is_downloaded_once_and_opened(saved, monkeypatch):
    _, path = saved
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("owner/name@v1").path == open_model("owner/name").path == path
    assert asked == [("owner/name", "v1"), ("owner/name", None)]


def test_a_hub_that_does_not_answer_is_said_in_a_line(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"'owner/name' is no folder here, and the hub did not give it \(no route to the hub\)"):
        open_model("owner/name")


def test_a_shard_cut_short_is_named(saved):
    _, path = saved
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    source = open_model(path)
    with pytest.raises(InputError, match=shard.name):
        source.load_module(source.shell(), "")


def test_a_folder_without_weights_is_refused(saved):
    _, path = saved
    for file in path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        open_model(path)


def test_the_builtin_model_speaks_python():
    source = open_model("builtin:tiny-lm")
    model, tokenizer = source.load(), source.tokenizer()
    ids = tokenizer(heldout_documents()[0], verbose=False, return_tensors="pt")["input_ids"][:, :2000].view(8, 250)
    assert 5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert score(model, ids).loss.mean() < 4.5  # a model that knows nothing loses 8.3 a token
    assert tokenizer.decode(tokenizer("naïve → x")["input_ids"]) == "naïve → x"


def test_a_copy_has_the_same_fingerprint(tmp_path):
    source = open_model("builtin:tiny-lm")
    shutil.copytree(source.path, tmp_path / "copy")
    assert open_model(tmp_path / "copy").fingerprint() == source.fingerprint()
