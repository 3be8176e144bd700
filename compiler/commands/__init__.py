"""One module for each command of the program, and ``estimates`` and ``output_paths``, which commands share."""
