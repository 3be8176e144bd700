"""glyphs: the small trained test model of erasec, its judge, and the synthetic world that both were trained on."""
