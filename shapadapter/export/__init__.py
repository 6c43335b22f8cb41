"""A fine-tuned model as a file that runs without this package: ONNX, or a program of `torch.export`."""

from shapadapter.export.formats import ExportReport, export_onnx, export_program

__all__ = ["ExportReport", "export_onnx", "export_program"]
