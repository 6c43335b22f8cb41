"""Weights: how quantised ones compute, whether an adapter's file is sound, and which base model it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.backbone import Anatomy, original_name
from shapadapter.core.documents import open_tensors
from shapadapter.core.errors import CheckpointError

if TYPE_CHECKING:
    from shapadapter.adapter.config import ShapleyConfig

_FLOATS = ("F64", "F32", "F16", "BF16")

# Tensors with at most so many numbers are compared: biases, norms and the class token tell two trainings apart.
_SMALL = 65_536

# Weights of a tensor that are projected: enough to notice a change, few enough for the largest models.
_SAMPLE = 65_536

# Relative to a part's norm. In half precision each weight is rounded by about 0.1 %, in fp32 not at all.
_TOLERANCE = {"float32": 1e-5, "float64": 1e-5}
_HALF_TOLERANCE = 4e-3


class Fingerprint(TypedDict):
    """Numbers of a base model: of each part the norm, that of a sample of its weights, and the sample's projection."""

    dtype: str
    values: list[tuple[float, float, float]]


# -- quantised weights -------------------------------------------------------------------------------------------------


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is stored in 8 or 4 bits: as integers or, by torchao, as what only looks like numbers."""
    return not weight.is_floating_point() or type(weight).__module__.startswith("torchao.")


def float_dtype(linear: nn.Linear) -> torch.dtype:
    """The dtype in which a quantised layer computes: that of its bias, which is left as it was."""
    return torch.float32 if linear.bias is None else linear.bias.dtype


@torch.no_grad()
def plain_weight(linear: nn.Linear) -> Tensor:
    """The weight (out, in) with which a linear layer computes, whatever it stores."""
    if not is_quantised(linear.weight):
        return linear.weight
    # Each library has its own way to tell; what a layer does with the unit vectors they all have in common.
    units = torch.eye(linear.in_features, device=linear.weight.device, dtype=float_dtype(linear))  # (in, in)
    rows: Tensor = linear(units)  # (in, out)
    return (rows if linear.bias is None else rows - linear.bias.to(rows)).T


# -- the adapter's weight file -----------------------------------------------------------------------------------------


def check_weights(path: Path, config: ShapleyConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, which is refused if damaged or not of this configuration."""
    with open_tensors(path) as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        _check_shapes(path, saved, config)
        for key in (key for key in saved if "lora_" in key):
            kind = file.get_slice(key).get_dtype()
            if kind not in _FLOATS:
                raise CheckpointError(f"{path} holds {key} as {kind}; expected one of {', '.join(_FLOATS)}.")
            if not file.get_tensor(key).isfinite().all():
                raise CheckpointError(not_finite(path, key))
    return saved


def not_finite(where: Path | str, key: str) -> str:
    """What to say of weights with which nothing can be computed."""
    return (
        f"{where} holds numbers in {key} that are not finite: the training diverged, or the file was changed. Take an earlier "
        "checkpoint."
    )


def _check_shapes(path: Path, saved: dict[str, tuple[int, ...]], config: ShapleyConfig) -> None:
    """Compare the tensors of token and head with the configuration; the width of the features is theirs to say."""
    own = {key[key.rindex("lora_shapley_") :]: shape for key, shape in saved.items() if "lora_shapley_" in key}
    width = (own.get("lora_shapley_norm.weight") or (1,))[0]
    classes = config.num_classes or (own.get("lora_shapley_vote.weight") or (1,))[0]
    expected = config.shapes(width, classes)
    missing = [name for name in expected if name not in own]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(expected)} tensors of token and head, e.g. {missing[0]}. It was not "
            "written by shapadapter, or not with the configuration beside it."
        )
    for name, shape in expected.items():
        if own[name] != shape:
            raise CheckpointError(
                f"{path} holds {name} of shape {own[name]}, and the configuration beside it asks for {shape}: the two "
                "were not saved together."
            )


# -- the base model ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def base_fingerprint(model: nn.Module, anatomy: Anatomy, config: ShapleyConfig) -> Fingerprint | None:
    """Numbers for each part of the base model that the adapter relies on and does not bring along.

    The parts are the blocks, what else the backbone holds, and with `prediction="classifier"`, or texts, all others.
    None where the weights are not all at hand (sharded, quantised, on the meta device).
    """
    alone = config.prediction == "vote" and anatomy.kind != "matching"  # the model's own head is not used
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        own = original_name(name)
        if _comes_along(name, own, config) or (alone and own.split(".")[0] not in anatomy.backbone):
            continue
        if _elsewhere(parameter) or parameter.numel() == 0:
            return None
        part = next((block for block in anatomy.blocks if own.startswith(f"{block}.")), ".".join(own.split(".")[:2]))
        parts[part] = parts.get(part, torch.zeros(3, dtype=torch.float64, device="cpu")) + _numbers(parameter)
    dtype = str(next(model.get_submodule(anatomy.entrance).parameters()).dtype).removeprefix("torch.")
    values = [parts[part].tolist() for part in sorted(parts)]
    return {"dtype": dtype, "values": [(square**0.5, sample**0.5, along) for square, sample, along in values]}


def same_fingerprint(one: Fingerprint | None, other: Fingerprint | None) -> bool:
    """Whether two fingerprints can belong to the same base; unknown ones can."""
    if one is None or other is None:
        return True
    tolerance = max(_TOLERANCE.get(f["dtype"], _HALF_TOLERANCE) for f in (one, other))
    return len(one["values"]) == len(other["values"]) and all(
        abs(norm - other_norm) <= tolerance * max(norm, 1e-12)
        and abs(along - other_along) <= tolerance * max(sample, 1e-12)
        for (norm, sample, along), (other_norm, _, other_along) in zip(one["values"], other["values"], strict=True)
    )


def _numbers(parameter: Tensor) -> Tensor:
    """Squared norm of a tensor, squared norm of a sample of it, and the sample's projection: (3,) float64."""
    flat = parameter.detach().flatten()
    # On the CPU: some devices know no float64.
    sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().double()
    # On a direction without a period, so that exchanged weights are noticed, as they are not by norms.
    direction = torch.arange(len(sample), dtype=torch.float64, device="cpu").square_().mul_(0.61803).cos_()
    norm = torch.linalg.vector_norm(flat.float()).cpu().double()
    return torch.stack([norm.square(), sample.square().sum(), sample @ direction])


def _comes_along(name: str, own: str, config: ShapleyConfig) -> bool:
    """Whether a parameter is the adapter's, or is saved with it, or is the original of one that is."""
    if "lora_" in name or "modules_to_save." in name:
        return True
    if config.bias != "none" and own.endswith(".bias"):
        return True
    return bool({part.split(".")[-1] for part in config.modules_to_save or ()} & set(own.split(".")))


def _elsewhere(parameter: Tensor) -> bool:
    """Whether this process cannot read a weight: on the meta device, sharded by FSDP, or quantised."""
    return parameter.is_meta or hasattr(parameter, "device_mesh") or is_quantised(parameter)


@torch.no_grad()
def base_commit(model: PreTrainedModel) -> str | None:
    """The commit of the repository that a model was loaded from, None if unknown.

    transformers does not tell it, so it is looked up among the downloads on this computer: the commit whose weights the
    model has, that of the main branch before others.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name or Path(name).exists():
        return None
    store = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=constants.REPO_TYPE_MODEL)
    main = store / "refs" / constants.DEFAULT_REVISION
    first = main.read_text(errors="replace").strip() if main.is_file() else ""
    commits = [folder for folder in store.glob("snapshots/*") if any(folder.glob("*.safetensors"))]
    commits.sort(key=lambda folder: (folder.name == first, folder.stat().st_mtime), reverse=True)
    own: dict[str, Tensor] = {}  # by the names under which they may be saved: with the backbone's prefix and without
    for path, parameter in model.named_parameters():
        if not _elsewhere(parameter) and parameter.numel() <= _SMALL:
            own[original_name(path)] = parameter
            own.setdefault(original_name(path).removeprefix(f"{model.base_model_prefix}."), parameter)
    verdicts = {folder.name: _same_weights(folder, own) for folder in commits}
    proven = [commit for commit, verdict in verdicts.items() if verdict]
    possible = [commit for commit, verdict in verdicts.items() if verdict is None]
    return proven[0] if proven else possible[0] if len(possible) == 1 else None


def _same_weights(folder: Path, own: dict[str, Tensor]) -> bool | None:
    """Whether the weights in a folder are those of a model; None if no two have a name and a shape in common."""
    compared = False
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - the file is no dictionary
                    weight = own.get(key)
                    if weight is None or list(weight.shape) != file.get_slice(key).get_shape():
                        continue
                    if not torch.equal(file.get_tensor(key).to(weight.dtype), weight.cpu()):
                        return False
                    compared = True
        except (OSError, SafetensorError):  # a download that was cut off
            return False
    return True if compared else None
