"""What a run has finished, on disk: one safetensors file and one manifest per block, and the next block's inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewbits.core.errors import InputError
from fewbits.core.files import written_whole
from fewbits.core.remote import fetch_file, local_place
from fewbits.core.tensor import from_stored
from fewbits.layers.linear import StoredLinear

_REPLACED = "replaced/"


class Store:
    """The work folder of one run. Every file appears whole or not at all; a block's manifest is written last.

    Raises InputError where the folder holds a run with other settings, or the disk is full.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], origin: str | None = None) -> None:
        """`origin` is the URL that another process reads the same files from."""
        self.folder, self.origin = folder, origin
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if path.exists():
            self._compare(_read_json(path))
        else:
            _write(path, lambda part: part.write_text(_as_json(self.settings)))
        for leftover in folder.glob("*.partial"):
            leftover.unlink()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"folder": self.folder.resolve()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process: nothing is tidied up, for the run that it belongs to goes on elsewhere."""
        self.__dict__ |= state
        if self.origin is not None and not self.folder.is_dir():
            self.folder = local_place(self.origin)
        elif not self.folder.is_dir():
            raise InputError(f"{self.folder} is not there on this node; a folder that all nodes share would be right")

    def _compare(self, before: Mapping[str, Any]) -> None:
        differing = sorted(_differences(before, self.settings))
        if differing:
            raise InputError(
                f"{self.folder} holds a stopped run with other settings ({'; '.join(differing)}); "
                "repeat it with the same settings to go on, or start again with --fresh"
            )

    def key(self, block: int | str) -> str:
        """Hash of everything that decides the content of a block's artefact."""
        return hashlib.sha256(_as_json({"settings": self.settings, "block": block}).encode()).hexdigest()

    def finished(self) -> int:
        """How many leading blocks are done."""
        count = 0
        while self._manifest_path(count).exists() and self.manifest(count)["key"] == self.key(count):
            count += 1
        return count

    def has_part(self, part: str) -> bool:
        """Whether what lies outside of the blocks is done: `part` takes the place of a block's number wherever that is asked for."""
        return self._manifest_path(part).exists() and self.manifest(part)["key"] == self.key(part)

    def manifest(self, block: int | str) -> dict[str, Any]:
        return _read_json(self._manifest_path(block))

    def write_block(
        self, block: int | str, layers: Mapping[str, StoredLinear], entries: Mapping[str, Any], replaced: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a block's tensors, then the manifest that makes it count; `entries` join the manifest.

        `replaced` are new values of the model's dense parameters, by full name.
        """
        tensors = {f"{_REPLACED}{name}": tensor.contiguous().cpu() for name, tensor in (replaced or {}).items()}
        for layer, stored in layers.items():
            tensors |= {f"{layer}/{name}": tensor.contiguous().cpu() for name, tensor in stored.tensors().items()}
        # safetensors refuses tensors that share memory, as layers with common scales do.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        _write(self._tensor_path(block), lambda part: save_file(tensors, part))
        described = {name: stored.settings() for name, stored in layers.items()}
        manifest = {"key": self.key(block), "settings": described, **entries}
        _write(self._manifest_path(block), lambda part: part.write_text(_as_json(manifest)))

    def layers(self, block: int | str) -> Iterator[tuple[str, StoredLinear]]:
        """The compressed linears of a block, read one at a time."""
        described = self.manifest(block)["settings"]
        with safe_open(self._tensor_path(block), "pt") as file:
            names = list(file.keys())
            for layer, settings in described.items():
                tensors = {n[len(layer) + 1 :]: file.get_tensor(n) for n in names if n.startswith(layer + "/")}
                yield layer, from_stored(settings, tensors)  # type: ignore[misc]

    def replaced(self, block: int) -> dict[str, Tensor]:
        """New values of dense parameters of a block, by full name."""
        with safe_open(self._tensor_path(block), "pt") as file:
            names = [name for name in list(file.keys()) if name.startswith(_REPLACED)]
            return {name.removeprefix(_REPLACED): file.get_tensor(name) for name in names}

    def write_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors that a run which goes on will need."""
        _write(self._state_path(name), lambda part: save_file({key: value.contiguous().clone() for key, value in tensors.items()}, part))

    def has_state(self, name: str) -> bool:
        return self._found(self._state_path(name)).exists()

    def state(self, name: str, only: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors kept as `name`, or only those called so."""
        with safe_open(self._found(self._state_path(name)), "pt") as file:
            return {key: file.get_tensor(key) for key in (file.keys() if only is None else only)}

    def state_names(self, name: str) -> list[str]:
        """What the tensors kept as `name` are called."""
        with safe_open(self._found(self._state_path(name)), "pt") as file:
            return list(file.keys())

    def drop_state(self, name: str) -> None:
        self._state_path(name).unlink(missing_ok=True)

    def write_activations(self, block: int, batches: Iterable[Tensor], stream: str = "") -> None:
        """Keep the inputs of `block`, batch after batch; `stream` tells several inputs of one block apart."""

        def write(part: Path) -> None:
            with open(part, "wb") as file:
                for batch in batches:
                    file.write(batch.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())

        _write(self._activation_path(block, stream), write)

    def activations(self, block: int, shape: tuple[int, ...], dtype: torch.dtype, mapped: bool, stream: str = "") -> Tensor | None:
        """The kept inputs of `block`, None where they are missing; `mapped` leaves them in the file."""
        path, count = self._found(self._activation_path(block, stream)), int(torch.Size(shape).numel())
        if not path.exists() or path.stat().st_size != count * dtype.itemsize:
            return None
        hidden = torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)
        return hidden if mapped else hidden.clone()

    def has_activations(self, block: int, stream: str = "") -> bool:
        return self._activation_path(block, stream).exists()

    def drop_activations(self, keep: int) -> None:
        """Remove the inputs of all blocks but `keep`."""
        for path in self.folder.glob("activations-*.bin"):
            if not path.name.startswith(self._activation_path(keep).stem):
                path.unlink()

    def _found(self, path: Path) -> Path:
        """`path`, fetched from the origin where it is not here yet."""
        if self.origin is not None and not path.exists():
            fetch_file(f"{self.origin}/{path.name}", path)
        return path

    def _manifest_path(self, block: int | str) -> Path:
        return self.folder / f"{_stem(block)}.json"

    def _tensor_path(self, block: int | str) -> Path:
        return self.folder / f"{_stem(block)}.safetensors"

    def _activation_path(self, block: int, stream: str = "") -> Path:
        return self.folder / f"activations-{block:05d}{stream}.bin"

    def _state_path(self, name: str) -> Path:
        return self.folder / f"state-{name}.safetensors"


def _stem(block: int | str) -> str:
    return f"block-{block:05d}" if isinstance(block, int) else f"part-{block}"


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    with written_whole(path, "run again to go on", sync=True) as partial:
        write(partial)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); start again with --fresh") from error


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{where}.{name}".lstrip("."))
    elif before != now:
        yield f"{where} was {before!r}, now {now!r}"
