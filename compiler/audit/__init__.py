"""Attacks a finished model: probes try to bring an erased concept back, with controls that give the rates a meaning."""
