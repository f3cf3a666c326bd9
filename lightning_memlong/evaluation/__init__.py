"""Evaluations; they return tables and print nothing."""
