"""Retrieval causal attention as functions of tensors, and how it is computed."""
