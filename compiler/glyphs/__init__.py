"""glyphs: the small trained model that ships with erasec, and the world it was trained on."""
