"""Texts of any length: prefilled into a bank, and continued with it."""
