"""The parts of ``benchmarks/gpu.py``: each a module whose ``run`` gives rows as they are measured."""
