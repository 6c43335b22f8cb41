# /// script
# requires-python = ">=3.11"
# dependencies = ["shapadapter[onnx]"]
# [tool.uv.sources]
# shapadapter = { path = "../.." }
# ///
"""How fast is an exported model in onnxruntime beside PyTorch: predicting, and predicting with all attributions?

python examples/benchmarks/onnx_speed.py
python examples/benchmarks/onnx_speed.py --base PATH --repeats 15

Four calls take turns in one process, so that whatever else the machine does falls on all of them: the base model alone and
the wrapped model with LoRA merged, each in PyTorch and as an ONNX file in onnxruntime, in fp32 on the CPU. Times are medians
with least and largest. onnxruntime's threads do not wait in loops between the calls, for the others would pay for it. The
adapter is random: only time counts. Without --base a small ViT with random weights is measured.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.exporters import OnnxConfig, OnnxExporter

from shapadapter import ShapleyConfig, export_onnx
from shapadapter.evaluation.cost import base_alone, with_merged_lora
from shapadapter.export.deployed import quiet

SMALL = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 4}
OUTPUTS = ["logits", "attributions", "null_values"]
HEAD = "| threads | batch | PyTorch, predict | onnxruntime, predict | PyTorch, explain | onnxruntime, explain | explain, ratio |"

Calls = dict[str, Callable[[Tensor], Any]]


def wrapped(base: str | None, side: int) -> PeftModel:
    """The base model with a random adapter."""
    torch.manual_seed(0)
    model = (
        ViTForImageClassification(ViTConfig(**SMALL, image_size=side, patch_size=16, num_labels=10))
        if base is None
        else AutoModelForImageClassification.from_pretrained(base, num_labels=10, dtype=torch.float32)
    )
    adapted = get_peft_model(model, ShapleyConfig(r=16)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def write(model: PeftModel, side: int, folder: Path) -> None:
    """The wrapped model and the base model alone as ONNX files."""
    images = torch.randn(6, 3, side, side)
    print(export_onnx(model, folder / "explains", images=images), "\n", flush=True)
    plain: Any = base_alone(model)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with quiet():
        exported = OnnxExporter().export(plain, {"pixel_values": images[:2]}, config=OnnxConfig(dynamic_shapes=shapes))
    exported.save_pretrained(folder / "predicts")


def calls(model: PeftModel, folder: Path, threads: int) -> Calls:
    """What is measured, by column."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    plain, merged = base_alone(model), with_merged_lora(model)
    sessions = [
        onnxruntime.InferenceSession(str(folder / name / "model.onnx"), options, providers=["CPUExecutionProvider"])
        for name in ("predicts", "explains")
    ]
    return {
        "PyTorch, predict": lambda pixels: plain(pixel_values=pixels),
        "onnxruntime, predict": lambda pixels: sessions[0].run(["logits"], {"pixel_values": pixels.numpy()}),
        "PyTorch, explain": lambda pixels: merged(pixel_values=pixels),
        "onnxruntime, explain": lambda pixels: sessions[1].run(OUTPUTS, {"pixel_values": pixels.numpy()}),
    }


def timed(measured: Calls, pixels: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in measured}
    with torch.inference_mode():
        for turn in range(repeats + 2):  # the first two warm up
            for name, call in measured.items():
                start = time.perf_counter()
                call(pixels)
                if turn >= 2:
                    times[name].append(1000 * (time.perf_counter() - start))
    return times


def row(threads: int, batch: int, times: dict[str, list[float]]) -> str:
    """A line of the table."""
    ours, theirs = times["onnxruntime, explain"], times["PyTorch, explain"]
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    said = [f"{median(part):.0f} ({min(part):.0f} to {max(part):.0f})" for part in times.values()]
    said.append(f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return "| " + " | ".join([str(threads), str(batch), *said]) + " |"


def main() -> None:
    """Export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="A pretrained image classifier, on the Hub or in a folder.")
    parser.add_argument("--side", type=int, default=224, help="Height and width of the images in pixels.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--repeats", type=int, default=11)
    given = parser.parse_args()
    model = wrapped(given.base, given.side)
    with tempfile.TemporaryDirectory() as folder:
        write(model, given.side, Path(folder))
        print("Milliseconds, median (least to largest)\n", HEAD, "|" + " --- |" * (HEAD.count("|") - 1), sep="\n")
        for threads in given.threads:
            torch.set_num_threads(threads)
            measured = calls(model, Path(folder), threads)
            for batch in given.batches:
                pixels = torch.randn(batch, 3, given.side, given.side)
                print(row(threads, batch, timed(measured, pixels, given.repeats)), flush=True)


if __name__ == "__main__":
    main()
