"""By what an adapter recognises the base model it was made for, and the commit it came from."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from shapadapter.adapter.config import Fingerprint, ShapleyConfig
from shapadapter.adapter.tuning import is_quantised
from shapadapter.backbone import Anatomy, original_name

# Tensors with at most so many numbers are compared: biases, norms and the class token tell two trainings apart.
_SMALL = 65_536


@torch.no_grad()
def commit_of(model: PreTrainedModel) -> str | None:
    """The commit of the repository that a model was loaded from.

    transformers does not tell it, so it is looked up among the downloads on this computer: the commit whose weights the
    model has, that of the main branch before others.

    Returns:
        The commit's hash, or None for a model from a folder, from another cache, or whose weights are not those of any
        commit here.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if not name or Path(name).exists():
        return None
    store = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=constants.REPO_TYPE_MODEL)
    main = store / "refs" / constants.DEFAULT_REVISION
    first = main.read_text(errors="replace").strip() if main.is_file() else ""
    commits = [folder for folder in store.glob("snapshots/*") if any(folder.glob("*.safetensors"))]
    commits.sort(key=lambda folder: (folder.name == first, folder.stat().st_mtime), reverse=True)
    own = _weights(model)
    verdicts = {folder.name: _same_weights(folder, own) for folder in commits}
    proven = [commit for commit, verdict in verdicts.items() if verdict]
    open_ = [commit for commit, verdict in verdicts.items() if verdict is None]
    return proven[0] if proven else open_[0] if len(open_) == 1 else None


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The small weights of a model by the names under which they may have been saved, with the backbone's prefix and without."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        elsewhere = parameter.is_meta or hasattr(parameter, "device_mesh") or is_quantised(parameter)
        if elsewhere or parameter.numel() > _SMALL:
            continue
        found[original_name(name)] = parameter
        found.setdefault(original_name(name).removeprefix(f"{model.base_model_prefix}."), parameter)
    return found


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


# Relative to a part's norm. In half precision each weight is rounded by about 0.1 %, in fp32 not at all.
_TOLERANCE = {"float32": 1e-5, "float64": 1e-5}
_HALF_TOLERANCE = 4e-3


# Weights of a tensor that are projected: enough to notice a change, few enough for the largest models.
_SAMPLE = 65_536


@torch.no_grad()
def base_fingerprint(model: nn.Module, anatomy: Anatomy, config: ShapleyConfig) -> Fingerprint | None:
    """Numbers for each part of the base model that the adapter relies on and does not bring along.

    The parts are the blocks, what else the backbone holds, and with `prediction="classifier"`, or texts, all others.
    The numbers are the L2 norm of a part, that of a sample of its weights, and the sample's projection on a fixed
    direction, which notices what keeps the norms.

    Returns:
        `dtype` and `values`; None where the weights are not all at hand (sharded, quantised, on the meta device).
    """
    alone = config.prediction == "vote" and anatomy.kind != "matching"  # the model's own head is not used
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        own = original_name(name)
        if _comes_along(name, own, config) or (alone and own.split(".")[0] not in anatomy.backbone):
            continue
        sharded = hasattr(parameter, "device_mesh")  # by FSDP: each process holds a part
        if sharded or parameter.is_meta or is_quantised(parameter) or parameter.numel() == 0:
            return None
        part = next((block for block in anatomy.blocks if own.startswith(f"{block}.")), ".".join(own.split(".")[:2]))
        parts[part] = parts.get(part, torch.zeros(3, dtype=torch.float64, device="cpu")) + _numbers(parameter)
    dtype = str(next(model.get_submodule(anatomy.entrance).parameters()).dtype).removeprefix("torch.")
    values = [parts[part].tolist() for part in sorted(parts)]
    return {"dtype": dtype, "values": [(square**0.5, sample**0.5, along) for square, sample, along in values]}


def _numbers(parameter: Tensor) -> Tensor:
    """Squared norm of a tensor, squared norm of a sample of it, and the sample's projection: (3,) float64."""
    flat = parameter.detach().flatten()
    # On the CPU: some devices know no float64.
    sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().double()
    # A direction without a period, so that exchanged weights are noticed.
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
