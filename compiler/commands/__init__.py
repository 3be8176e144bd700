"""What the commands do, one module each, and ``estimates`` and ``output_paths``, which commands share.

Flags and printing are in ``cli``. The commands ``list``, ``prior`` and ``recover`` need no module here.
"""
