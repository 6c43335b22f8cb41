"""A demo app for a checkpoint: a folder that runs here with `python app.py`, and as a Space on the Hub."""

from shapadapter.hub.space.write import push_space, write_space

__all__ = ["push_space", "write_space"]
