"""Judges of real pictures: one file each. A concept's [judge] table says what they look for; see docs/judges.md."""
