"""glyphs: the small trained model of erasec, its judge, and the synthetic world that both are trained on."""
