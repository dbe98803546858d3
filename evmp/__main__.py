"""`python -m evmp` is `evmp`."""

from evmp.cli import main

main()
