"""``python -m erasec``: the program, where its script is not on the path."""

from erasec.cli.app import main

main()
