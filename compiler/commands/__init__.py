"""One module for each command of the program: what ``erasec build``, ``plan``, ``apply`` and the others do."""
