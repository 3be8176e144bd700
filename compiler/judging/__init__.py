"""Judges look at pictures, and the checks of a build follow from what they see."""
