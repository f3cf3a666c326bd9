"""What we take from Lightning and jsonargparse beyond what they promise: all of it, with what for and why.

``tests/unit/cli/test_lightning_private.py`` fails by name when a release changes one of these.
"""

import argparse
from abc import abstractmethod
from collections.abc import Iterator

from lightning.pytorch.cli import LightningCLI


class CheckpointAwareCLI(LightningCLI):
    """LightningCLI, with hooks where it has none."""

    argv: list[str]
    """Arguments; set before LightningCLI begins."""
    NAMES: tuple[str, ...] = ()
    """Of all subcommands."""

    def _parse_ckpt_path(self) -> None:
        # Needed: Lightning puts a checkpoint's hyperparameters over what was typed, silently; here they go under it.
        # Not public: nothing switches it off, and it runs between parse_arguments and the first public hook.
        self.merge_stored_settings()

    @abstractmethod
    def merge_stored_settings(self) -> None:
        """Change ``self.config``, which has been parsed and from which nothing has been built yet."""

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommands and the arguments they do not expose; only the one asked for, as each costs start-up time."""
        # Needed: the arguments, to know which is asked for. Not public: Lightning declares a static method, which knows
        # no arguments; that it asks its instance, and not its class, is not promised.
        hidden = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        asked = [argument for argument in self.argv if argument in self.NAMES][:1]
        return {name: hidden for name in asked or self.NAMES}


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments a parser has."""
    # Needed: their names, to suggest the nearest, and their help, to correct Lightning's. Not public: argparse hands an
    # action to who adds it, and here that is Lightning; jsonargparse's get_defaults() knows no subcommands.
    return parser._actions


def all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its subcommands."""
    for action in actions(parser):
        yield action
        if isinstance(action.choices, dict):  # a subcommand is a choice of a parser
            for subcommand in action.choices.values():
                yield from actions(subcommand)
