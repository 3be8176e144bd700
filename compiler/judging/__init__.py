"""Checks of pictures: ``evidence`` has what a judge sees before and after an edit, ``validate`` makes checks of it."""
