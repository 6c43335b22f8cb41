"""From which commit on the Hub a base model came."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from shapadapter.backbone import original_name

from .quantised import is_quantised

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
