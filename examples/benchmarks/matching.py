# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[demo]"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""Images and texts: a small CLIP on the demo's digits and captions made for them.

python examples/benchmarks/matching.py --output matching

A CLIP of two small towers is trained from scratch on pictures and captions ("a photo of the digit seven"), saved, and
fine-tuned from there with the contrastive loss alone and with the Shapley objective, in both predictions. Prints zero-shot
accuracy over the ten digits; the error of the attributions (relative L2 to KernelSHAP with 4,096 evaluations, for the
likeliest text of held-out images); and recall@1 among 200 held-out pairs of ten images a digit, before and after the
patches that speak most for an image's own text are taken away.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from faithfulness import faithfulness
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast, Trainer, set_seed
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from shapadapter import ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments, explain, retrieval_after_deletion
from shapadapter.core.shapley import contrastive_loss
from shapadapter.data.collator import ImageCollator, text_rules
from shapadapter.demo.digits import NAMES, SIZE, DigitScenes, build_digits
from shapadapter.demo.models import Scale
from shapadapter.explanation.passes import embed_texts

TEMPLATES = ("a photo of the digit {}", "the number {}", "a bright {} in the dark", "handwritten {}")
FULL = Scale(digits=5000, placements=4, pretrain_epochs=4, tune_epochs=1.5, truth_images=8, truth_evaluations=4096)
QUICK = Scale(digits=500, placements=1, pretrain_epochs=1, tune_epochs=1, truth_images=2, truth_evaluations=512)
TOWER = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 192}


def make_processor() -> CLIPProcessor:
    words = [
        "<bos>",
        "<pad>",
        "<unk>",
        *sorted({w for t in TEMPLATES for w in t.split() if w != "{}"}),
        *NAMES,
        "<eos>",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<bos>", 0), ("<eos>", len(words) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)
    side = {"height": SIZE, "width": SIZE}
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return CLIPProcessor(CLIPImageProcessorPil(do_resize=False, do_center_crop=False, crop_size=side, **grey), fast)


def make_model(tokenizer: Any) -> CLIPModel:
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": len(tokenizer) - 1}
    text = {**TOWER, **ids, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**TOWER, "image_size": SIZE, "patch_size": 16}
    # Transformers' initial scale is for training that takes days.
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64, initializer_factor=4.0))


class Pairs(Dataset):
    """Scenes in -1..1 with captions of their digits."""

    def __init__(self, scenes: DigitScenes, indices: Any) -> None:
        self.scenes, self.indices = scenes, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.indices[item]
        pixels = torch.from_numpy(self.scenes.images[index]).permute(2, 0, 1) / 127.5 - 1  # (C, H, W)
        name = NAMES[int(self.scenes.labels[index])]
        return {"pixel_values": pixels, "text": TEMPLATES[item % len(TEMPLATES)].format(name)}


class Contrastive(Trainer):
    """The plain way; like captions are matches of each other, as for the adapter."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**{**inputs, "return_loss": False})
        same = (inputs["input_ids"][:, None] == inputs["input_ids"][None]).all(-1)  # (B, B)
        loss = contrastive_loss(outputs.logits_per_image, same)
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("matching"))
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, to see that it runs")
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    scenes = build_digits(0, scale.digits, scale.placements)
    train, test = (Pairs(scenes, indices) for indices in scenes.split())
    processor = make_processor()
    folder = args.output / f"clip-{args.seed}"
    set_seed(args.seed)
    if not folder.exists():
        base = make_model(processor.tokenizer)
        fit(Contrastive, base, train, scale.pretrain_epochs, processor, args)
        base.save_pretrained(folder)
    for prediction in ("classifier", "vote"):
        for weight in (0.0, 3.0):
            set_seed(args.seed)
            config = ShapleyConfig(r=16, lora_alpha=32, prediction=prediction, head_width=256)
            model = get_peft_model(CLIPModel.from_pretrained(folder), config)
            fit(ShapleyTrainer, model, train, scale.tune_epochs, processor, args, shapley_weight=weight)
            print(
                f"\n{prediction}, shapley_weight={weight:g}\n{report(model.eval(), test, processor, scale, args.seed)}"
            )


def fit(trainer: Any, model: Any, train: Dataset, epochs: float, processor: Any, args: Any, **more: Any) -> None:
    arguments = ShapleyTrainingArguments(
        str(args.output / "runs"),
        num_train_epochs=epochs,
        learning_rate=2e-3,
        head_learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        adam_beta2=0.98,
        per_device_train_batch_size=32,
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=args.seed,
        disable_tqdm=True,
        **more,
    )
    collator = ImageCollator(processor, text_rules(model))
    trainer(model, arguments, train_dataset=train, data_collator=collator).train()


def report(model: Any, test: Pairs, processor: Any, scale: Scale, seed: int) -> str:
    digits = [TEMPLATES[0].format(name) for name in NAMES]
    pixels = torch.stack([row["pixel_values"] for row in test])  # (B, C, H, W)
    labels = torch.from_numpy(test.scenes.labels[test.indices])
    said = explain(model, {"pixel_values": pixels}, processor, texts=digits, top_k=1, batch_size=250)
    accuracy = (said.logits.argmax(1) == labels).float().mean().item()
    directions = embed_texts(model, digits, processor)  # (T, P)
    errors = faithfulness(model, pixels[: scale.truth_images], scale, seed, text_embeds=directions)
    chosen = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(len(NAMES))])  # 20 of each
    found = retrieval_after_deletion(
        model,
        {"pixel_values": pixels[chosen]},
        [digits[label] for label in labels[chosen]],
        processor,
        deleted=(0.0, 0.125, 0.25, 0.5),
        ks=(1,),
    )
    told = ", ".join(f"{name} {value:.3f}" for name, value in errors.items())
    return f"zero-shot accuracy {accuracy:.3f}; errors: {told}\n{found.table()}"


if __name__ == "__main__":
    main()
