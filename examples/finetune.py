# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[train]"]
# [tool.uv.sources]
# shapadapter = { path = ".." }
# ///
"""Fine-tune an image classifier that explains itself, on a Hub data set or on a folder of images.

python examples/finetune.py \
    --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --output_dir vit-beans \
    --num_train_epochs 3 --per_device_train_batch_size 32 --logging_steps 10 --eval_strategy epoch

A folder has one subfolder per class, in `train/` and `test/` (or `validation/`, `val/`) or without any split:

python examples/finetune.py \
    --model_name_or_path facebook/dinov2-small --image_folder photos --output_dir dinov2-photos \
    --logging_steps 10 --eval_strategy epoch

What does not fit on the disk is read while training: `--streaming --max_steps 10000`.

`shapadapter train --model facebook/dinov2-small --data photos --output dinov2-photos` does the same. This file is the road to
copy: what you will change is here, reading a folder and measuring at the end are `shapadapter.training.script`'s.

On several GPUs: `accelerate launch --config_file examples/configs/multi-gpu-ddp.yaml examples/finetune.py ...`; the
other files there are for the CPU, FSDP and DeepSpeed. `--help` lists every argument.
"""

from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from shapadapter import ShapleyConfig, ShapleyTrainer, ShapleyTrainingArguments
from shapadapter.training.script import (
    ScriptArguments,
    accuracy,
    clear_output,
    finish,
    load_images,
    parser,
    resumed_from,
)


def main(args: ScriptArguments, training_args: ShapleyTrainingArguments) -> None:
    """Train, save, evaluate, explain."""
    set_seed(training_args.seed)  # adapter and classifier start from random numbers
    with training_args.main_process_first(desc="loading the images"):
        images = load_images(
            args, training_args.seed, training_args.corrupt_images
        )  # splits "train" and "test", columns "image" and "label"
    names = images["train"].features["label"].names
    # Without torchvision this is the processor's PIL version, which resizes slightly differently.
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    base = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )
    # A checkpoint with as many other classes would leave a classifier that is not new.
    trained = True if args.prediction == "classifier" else None
    config = ShapleyConfig(r=args.lora_rank, prediction=args.prediction, tune=args.tune, train_classifier=trained)
    trainer = ShapleyTrainer(
        get_peft_model(base, config),
        training_args,
        train_dataset=images["train"],
        eval_dataset=images["test"],
        processing_class=processor,
        compute_metrics=accuracy,
    )
    clear_output(args, training_args)  # refuses the folder of an earlier training, without --overwrite
    result = trainer.train(resume_from_checkpoint=resumed_from(training_args))
    # Saves the adapter, evaluates it, and explains held-out images.
    finish(trainer, result.metrics, images["test"], args.explained_images)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset=args.dataset_name)
    trainer.accelerator.end_training()  # torch may abort a process that ends with its group open


if __name__ == "__main__":
    main(*parser().parse_args_into_dataclasses())
