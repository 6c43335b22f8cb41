"""`python -m shapadapter`."""

from shapadapter.cli import main

main()
