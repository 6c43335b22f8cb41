"""`shapadapter demo`: an end-to-end run on real digits."""

from shapadapter.demo.run import run

__all__ = ["run"]
