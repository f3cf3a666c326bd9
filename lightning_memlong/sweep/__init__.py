"""Ablation sweeps: many runs of the command line from one file, and one report of them.

``memlong sweep sweeps/top_k.yaml``, or ``python -m lightning_memlong.sweep conf/sweeps/top_k.yaml`` in a checkout.
"""
