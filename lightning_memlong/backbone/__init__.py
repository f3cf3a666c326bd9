"""Hugging Face decoders: loaded, their layers chosen, frozen and tuned."""
