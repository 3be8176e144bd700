"""The report of a build: its facts (``collect``), numbers (``format``), words (``wording``), charts and pages."""
