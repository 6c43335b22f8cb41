"""`python -m shapadapter`."""

from .cli import main

main()
