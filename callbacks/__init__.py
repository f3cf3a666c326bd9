"""Lightning callbacks: the memory bank's, and observers that change no logit."""
