"""The report of a build: its facts (``collect``), numbers (``format``), phrases (``wording``), charts and pages.

Its numbers are measured in ``judging`` and by the targets.
"""
