"""Tokenizers, data sets of prompts and samples, and the packing of sequences into micro-batches."""
