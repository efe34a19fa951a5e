"""Tokenizers, data sets of prompts and samples, their preview, and the packing of sequences."""
