"""Run by the tests in a process of its own: fine-tune an adapter of a base on the Hub, and push it on every road."""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from shapadapter import ShapleyConfig, ShapleyError, ShapleyTrainer, ShapleyTrainingArguments, explain
from shapadapter.hub import push

BASE, TOKEN = "ada/tiny-vit", sys.argv[1]
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def pictures(count=6):
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 80, (count, 32, 32, 3), dtype=np.uint8)
    arrays[np.arange(count), ..., np.arange(count) % 3] += 150
    return [{"image": Image.fromarray(array), "label": index % 3} for index, array in enumerate(arrays)]


def remember(model, name):
    with torch.no_grad():
        output = model.eval()(pixel_values=PIXELS)
    Path("answers").mkdir(exist_ok=True)
    saved = {"logits": output.logits, "attributions": output.attributions}
    save_file({key: value.contiguous() for key, value in saved.items()}, f"answers/{name}.safetensors")


def differ(model):
    """Move every weight of the adapter, so that nothing of it is what it was."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


processor = AutoImageProcessor.from_pretrained(BASE)
base = AutoModelForImageClassification.from_pretrained(BASE)
torch.manual_seed(1)
model = get_peft_model(base, ShapleyConfig(r=4))
print("recorded", model.peft_config["default"].base_model_name_or_path, model.peft_config["default"].revision)

# A trainer that pushes while it trains, to a private repository.
arguments = ShapleyTrainingArguments(
    "run",
    card_images=1,
    max_steps=3,
    save_steps=1,
    save_total_limit=1,
    per_device_train_batch_size=3,
    learning_rate=1e-2,
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
    dataloader_pin_memory=False,
    push_to_hub=True,
    hub_model_id="ada/trained",
    hub_strategy="every_save",
    hub_always_push=True,
    hub_private_repo=True,
    hub_token=TOKEN,
)
trainer = ShapleyTrainer(model, arguments, train_dataset=pictures(), processing_class=processor)
trainer.train()
remember(model, "trained")
print("pushed", trainer.push_to_hub())
trainer.push_to_hub("On a branch", revision="from-trainer")

# The model alone, as PEFT has it.
model.push_to_hub("ada/pushed", token=TOKEN)
model.push_to_hub("ada/secret", token=TOKEN, private=True)
model.save_pretrained("adapter")
processor.save_pretrained("adapter")
for pickle in ("optimizer.pt", "training_args.bin", "adapter_model.bin"):
    torch.save({"not": "for others"}, f"adapter/{pickle}")
Path("adapter/explanations").mkdir()
pictures(1)[0]["image"].save("adapter/explanations/one.png")
print("address", push("adapter", "whole", token=TOKEN))
explanation = explain(model, [row["image"] for row in pictures()], processor)
np.savez("answers/explained.npz", **explanation.to_numpy())
differ(model)
remember(model, "moved")
model.push_to_hub("ada/pushed", token=TOKEN, revision="v2")
print("proposed", model.push_to_hub("ada/pushed", token=TOKEN, create_pr=True).pr_url)

# The road of transformers' own mixin.
added = AutoModelForImageClassification.from_pretrained(BASE)
added.add_adapter(ShapleyConfig(r=4))
differ(added)
remember(added, "added")
added.push_to_hub("ada/added", token=TOKEN)

# A base that is a folder here is pushed beside.
fine = AutoModelForImageClassification.from_pretrained(BASE)
differ(fine)
fine.save_pretrained("my-base")
processor.save_pretrained("my-base")
own = get_peft_model(AutoModelForImageClassification.from_pretrained("my-base"), ShapleyConfig(r=4))
differ(own)
remember(own, "own")
own.save_pretrained("own")
print("pair", push("own", "ada/own", base_repo_id="ada/my-base", private=True, token=TOKEN))

# Loaded and saved again, it still names its base and its commit.
again = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(BASE), "adapter")
again.save_pretrained("again")
for wrong in (None, "hf_wrong"):
    try:
        push("adapter", "ada/never", token=wrong)
    except ShapleyError as error:
        print("refused", error)
