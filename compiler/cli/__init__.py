"""The command line: ``app`` declares the commands, ``options`` their flags and exit codes, ``output`` prints results.

What the commands do is in ``commands``.
"""
