"""What comes with the project wherever it stands: YAML files by their names, and two folders by two names."""

from lightning_memlong.shipped.second_names import claim_names
from lightning_memlong.shipped.yamls import CONF, INSTALLED, find_yaml, hides_packaged, packaged_names

__all__ = ["CONF", "INSTALLED", "claim_names", "find_yaml", "hides_packaged", "packaged_names"]
