"""Finished blocks on disk: what is evaluated, exported or taken up again is what was written here."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lsiq.errors import InputError, OutputError
from lsiq.formats.branch import Factor, SideBranch
from lsiq.formats.tensor import QuantizedTensor
from lsiq.methods.base import BlockResult
from lsiq.models.loading import Model
from lsiq.rotation import Rotation
from lsiq.settings import build, describe_settings


class BlockStore:
    """A folder with one safetensors file per finished block.

    Codes stand as uint8, scales and zero points in float32, folded norms and biases in float32, factors of side
    branches in float16 or as codes, rotations and learned parameters as they are; the formats stand in the file's
    metadata. What a method did to the model as a whole has a file of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Leave an empty folder behind."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def complete(self, depth: int) -> bool:
        """Whether the folder holds `depth` blocks, none of them cut off."""
        from safetensors import SafetensorError, safe_open

        try:
            for index in range(depth):
                with safe_open(self._file(index), framework="pt"):  # checks the length against the header
                    pass
        except (OSError, SafetensorError):
            return False
        return True

    def write(self, index: int, result: BlockResult) -> None:
        """Store a block; the file appears whole or not at all."""
        tensors: dict[str, Tensor] = {}
        formats: dict[str, dict[str, object]] = {}
        quantized: dict[str, Factor] = dict(result.weights)
        for name, branch in result.branches.items():
            quantized |= {f"{name}:up": branch.up, f"{name}:down": branch.down}
        for name, weight in quantized.items():
            if isinstance(weight, Tensor):
                tensors[name] = weight.cpu().contiguous()
                continue
            formats[name] = describe_settings(weight.format)
            for part, tensor in (("codes", weight.codes), ("scale", weight.scale), ("zero", weight.zero)):
                tensors[f"{name}:{part}"] = tensor.cpu().contiguous()
        tensors |= {f"{name}:float": tensor.float().cpu().contiguous() for name, tensor in result.floats.items()}
        tensors |= {f"{name}:state": tensor.cpu().contiguous() for name, tensor in result.state.items()}
        for place, rotation in result.rotations.items():
            tensors |= {f"{place}:rotation.{part}": t.cpu().contiguous() for part, t in rotation.tensors().items()}
        metadata = {"formats": json.dumps(formats), "metrics": json.dumps(dict(result.metrics))}
        self._save(self._file(index), tensors, metadata)

    @property
    def model_file(self) -> Path:
        """How the quantised model differs from the float one outside its blocks; is there only if it does."""
        return self.folder / "model.safetensors"

    def write_model(self, model: Model) -> None:
        """Store how the quantised model differs from the float one outside its blocks: nothing, for most methods."""
        tensors: dict[str, Tensor] = {}
        if model.residual is not None:
            tensors["residual"] = model.residual.cpu().contiguous()
        if model.prefix is not None:
            tensors["prefix"] = model.prefix.tokens.contiguous()
        if tensors:
            self._save(self.model_file, tensors, {})

    def read_model(self, model: Model) -> Model:
        """Return `model` as the stored blocks want it: turned, or after a prefix.

        Raises:
            InputError: the file is damaged.
        """
        from safetensors.torch import load_file

        file = self.model_file
        if not file.exists():
            return model
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors raises its own kinds
            raise InputError(f"{file}: cannot be read ({error}); run again with force=true") from error
        if (residual := tensors.get("residual")) is not None:
            model = replace(model, residual=residual.to(model.device))
        return model if (prefix := tensors.get("prefix")) is None else model.with_prefix(prefix)

    def _save(self, file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        from safetensors.torch import save_file

        partial = file.with_suffix(".partial")
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata))
            os.replace(partial, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{file}: cannot be written ({error.strerror}); free space or set paths.runs") from error

    def read(self, index: int) -> BlockResult:
        """Return a stored block, on the CPU; InputError when it is missing or damaged."""
        from safetensors import safe_open

        try:
            with safe_open(self._file(index), framework="pt", device="cpu") as file:
                metadata: Mapping[str, str] = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            weights = {
                name: QuantizedTensor(
                    tensors[f"{name}:codes"], tensors[f"{name}:scale"], tensors[f"{name}:zero"], build(fmt)
                )
                for name, fmt in json.loads(metadata["formats"]).items()
            }
            factors: dict[str, Factor] = tensors | weights
            branches = {
                name: SideBranch(factors[f"{name}:up"], factors[f"{name}:down"])
                for name in weights
                if f"{name}:up" in factors
            }
        except Exception as error:  # safetensors and json each raise their own kinds
            raise InputError(f"{self._file(index)}: cannot be read ({error}); run again with force=true") from error
        floats = {name.removesuffix(":float"): tensor for name, tensor in tensors.items() if name.endswith(":float")}
        state = {name.removesuffix(":state"): tensor for name, tensor in tensors.items() if name.endswith(":state")}
        return BlockResult(
            {name: weight for name, weight in weights.items() if not name.endswith((":up", ":down"))},
            floats,
            json.loads(metadata["metrics"]),
            state,
            branches=branches,
            rotations=_rotations(tensors),
        )

    def _file(self, index: int) -> Path:
        return self.folder / f"block_{index:03d}.safetensors"


def _rotations(tensors: Mapping[str, Tensor]) -> dict[str, Rotation]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, found, part = name.partition(":rotation.")
        if found:
            parts.setdefault(place, {})[part] = tensor
    return {place: Rotation.from_tensors(found) for place, found in parts.items()}
