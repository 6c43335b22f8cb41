"""`shapadapter demo`: the road of a real user in small, on real digits."""

from shapadapter.demo.run import run

__all__ = ["run"]
