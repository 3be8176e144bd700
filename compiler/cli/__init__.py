"""The command line: ``app`` declares the commands, ``options`` their options and errors, ``output`` prints."""
