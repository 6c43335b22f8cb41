"""What a fine-tuned adapter is for: somebody else takes it from the Hub and uses it, and all ways agree."""

import pytest
from tiny import HERE

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROADS = ["the author", "the card", "the pipeline", "image-classification", "ONNX"]


def test_a_stranger_runs_the_card_the_pipeline_and_onnx(author, fresh, tmp_path):
    """`author` fine-tuned the adapter and pushed it by the real client, in a process that has ended."""
    printed = fresh(
        HERE / "stranger.py", "ada/whole", author.folder / "answers" / "explained.npz", cwd=tmp_path, token=None
    )
    assert [line.removeprefix("agrees ") for line in printed.splitlines() if line.startswith("agrees ")] == ROADS
    assert (tmp_path / "why.html").stat().st_size > 10_000
