"""The network: captures keys and values, and reads retrieved ones, in a forward pass."""
