"""The errors and warnings a user of shapadapter can meet, each with a name of its own."""


class ShapleyError(Exception):
    """Base class: something shapadapter refuses, with what was expected, what came and what to type."""

    def __str__(self) -> str:
        # It may name a file or a class of somebody else's, with what UTF-8 cannot hold.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class UnsupportedModelError(ShapleyError, ValueError):
    """The model cannot be wrapped: a part was not found, or the self-test at wrapping time failed."""


class CheckpointError(ShapleyError, ValueError):
    """An adapter does not fit its base model, or its state could not be restored from what would be saved."""


class FieldError(ShapleyError, ValueError):
    """A field of a configuration or an explanation holds what it cannot hold: another type, a number out of range, ..."""


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
