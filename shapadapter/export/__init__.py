"""A fine-tuned model as a file that runs without this package: ONNX, or a program of `torch.export`."""

from .onnx import export_onnx
from .program import export_program
from .report import ExportReport

__all__ = ["ExportReport", "export_onnx", "export_program"]
