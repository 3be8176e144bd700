"""``python -m erasec`` runs the command line, for use where the script ``erasec`` is not on the path."""

from erasec.cli.start import main

main()
