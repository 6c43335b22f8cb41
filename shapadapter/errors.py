"""The errors and warnings a user of shapadapter can meet, each with a name of its own."""


class ShapleyError(Exception):
    """Base class: something shapadapter refuses, with what was expected, what came and what to type."""


class UnsupportedModelError(ShapleyError, ValueError):
    """The model cannot be wrapped: a part was not found, or the self-test at wrapping time failed."""


class CheckpointError(ShapleyError, ValueError):
    """An adapter does not fit its base model, or its state could not be restored from what would be saved."""


class DiskFullError(ShapleyError, OSError):
    """A file could not be written, because the disk, a quota or a limit of sizes has no room for it."""

    def __str__(self) -> str:
        # OSError puts "[Errno 28]" before the sentence.
        return str(self.strerror)


class ExportError(ShapleyError, RuntimeError):
    """A model could not be exported, or what came out computes something else."""


class ImageError(ShapleyError, ValueError):
    """An image is missing, unreadable or of a kind the model cannot take."""


class UnreadableImageError(ImageError):
    """An image is missing, damaged or no image at all: one that a training may leave out."""


class ClassNotFoundError(ShapleyError, KeyError):
    """A class was asked for that the model does not have."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which turns a readable sentence into an escaped string.
        return str(self.args[0]) if self.args else ""


class ShapleyCollapseWarning(UserWarning):
    """The model has become a constant: the trivial minimum of the Shapley loss."""
