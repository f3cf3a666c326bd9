"""What a window or a text retrieves with, and the frozen encoders."""
