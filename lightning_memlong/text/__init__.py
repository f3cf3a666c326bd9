"""Tokens and windows of documents, without any model."""
