"""`python -m mergekit_dam` is `mergekit-dam`."""

from mergekit_dam.cli import main

main()
