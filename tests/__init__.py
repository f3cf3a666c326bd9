"""Tests: no network, so the hub's client is told before it is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
