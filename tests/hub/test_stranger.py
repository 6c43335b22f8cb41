"""What a fine-tuned adapter is for: somebody else takes it from the Hub and uses it, and all ways agree."""

from tiny import HERE

ROADS = ["the author", "the card", "the pipeline", "image-classification"]


def test_a_stranger_runs_the_card_and_the_pipeline(author, fresh, tmp_path):
    """`author` fine-tuned the adapter and pushed it by the real client, in a process that has ended."""
    printed = fresh(
        HERE / "stranger.py", "ada/whole", author.folder / "answers" / "explained.npz", cwd=tmp_path, token=None
    )
    assert [line.removeprefix("agrees ") for line in printed.splitlines() if line.startswith("agrees ")] == ROADS
    assert (tmp_path / "why.html").stat().st_size > 10_000
