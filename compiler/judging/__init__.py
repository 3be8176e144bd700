"""Judges of pictures: ``evidence`` collects what a judge sees before and after an edit, ``validate`` makes the checks.

The interface is ``erasec.base.Judge``. A judge of real models goes here; that of glyphs is in ``glyphs``.
"""
