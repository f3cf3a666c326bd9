"""Data sets of the Hugging Face hub, streamed with the ``datasets`` library.

The library finds the files, knows the splits and decodes the rows. Reading goes through shards of our own
(:mod:`datamodules.sources`), one of the data set each: so a row that is bad is told by its number instead of ending the
stream, a fault of the network is followed by another try at the next row, and a run goes on at an exact row and block.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from lightning_memlong.errors import UserError

from .network import retry
from .records import Columns
from .sources import HubShard

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


@dataclass(frozen=True)
class Hub:
    """A data set of the hub (or a folder laid out like one)."""

    id: str
    """owner/name, or a folder."""
    config: str | None = None
    """Configuration name, where the data set has several."""
    revision: str | None = None
    """Branch, tag or commit; None: the newest."""
    files: dict[str, str] = field(default_factory=dict)
    """Of each split, the files in the repository (a glob); for data sets that only load through a script."""

    def _arguments(self, by_line: bool = False) -> dict[str, Any]:
        if not self.files:
            return {"path": self.id, "name": self.config, "revision": self.revision}
        if self.config:
            raise UserError(
                f"data.hub_config={self.config!r} means nothing beside data.hub_files, which name the files "
                "themselves. Allowed: one of the two. Fix: leave one out."
            )
        base = f"hf://datasets/{self.id}" + (f"@{self.revision}" if self.revision else "")
        kinds = {suffix for pattern in self.files.values() for suffix in PurePosixPath(pattern).suffixes}
        builder = next((name for suffix, name in BUILDERS.items() if suffix in kinds), None)
        if builder is None:
            raise UserError(
                f"data.hub_files={self.files!r} name no known format. Allowed: patterns ending in "
                f"{', '.join(BUILDERS)}, compressed or not. Fix: give such files."
            )
        here = PurePosixPath(self.id).is_absolute()
        how = {"sample_by": "line" if by_line else "document"} if builder == "text" else {}
        return {
            "path": builder,
            **how,
            "data_files": {s: f"{self.id if here else base}/{f}" for s, f in self.files.items()},
        }

    def splits(self, retries: int, by_line: bool = False) -> dict[str, Any]:
        """A streaming data set for each split there is; nothing is downloaded yet.

        Args:
            retries: How often a network fault is followed by another try.
            by_line: Whether the lines of plain text files are rows, or the files.

        Raises:
            UserError: If there is no such data set or configuration, or it cannot be reached.
        """
        from datasets import load_dataset_builder  # half a second of imports, for those who use it
        from pyarrow.dataset import ParquetFragmentScanOptions

        def open_splits() -> dict[str, Any]:
            builder = load_dataset_builder(**self._arguments(by_line))
            if hasattr(builder.config, "fragment_scan_options"):  # of parquet: a page whose checksum is wrong is told
                builder.config.fragment_scan_options = ParquetFragmentScanOptions(page_checksum_verification=True)
            return dict(builder.as_streaming_dataset())

        try:
            return retry(open_splits, self.id, retries)
        except UserError:
            raise
        except Exception as error:
            raise self._user_error(error) from error

    def _user_error(self, error: Exception) -> UserError:
        text = " ".join(str(error).split())
        if "scripts are no longer supported" in text:
            return UserError(
                f"data.hub_id={self.id!r} only loads through a script, which the datasets library no longer runs. "
                "Allowed: a data set of parquet, JSON or text files. Fix: name its files with --data.hub_files, give "
                "another --data.hub_id, or a local copy as --data.path."
            )
        if "onfig" in text and ("missing" in text.lower() or "not found" in text):
            return UserError(f"data.hub_config={self.config!r}: {text}. Fix: --data.hub_config with one of these.")
        return UserError(
            f"data.hub_id={self.id!r} cannot be loaded ({type(error).__name__}: {text[:300]}). Allowed: a data set of "
            "the hub that this machine can reach. Fix: check the id and the network, or give a local copy or an "
            "http:// address as --data.path."
        )

    def identity(self, retries: int) -> str:
        """What tells one state of the data set from another: the commits or dates of its files."""
        from datasets import load_dataset_builder  # half a second of imports, for those who use it

        try:
            builder = retry(lambda: load_dataset_builder(**self._arguments()), self.id, retries)
        except Exception as error:
            raise self._user_error(error) from error
        return repr((self, file_versions(builder)))


def file_versions(builder: Any) -> dict[str, tuple[list[str], Any]]:
    """Of each split, the files of a data set and what tells their versions apart: commits on the hub, else dates.

    ``datasets`` offers no such thing. This needs, of a ``DatasetBuilder``, ``config.data_files`` (a dict of lists of
    addresses, or None if the data set has no files), and of each list ``origin_metadata`` (one tuple of plain values a
    file), which is not documented. It is in no way needed to read, only to notice that a data set has changed.
    """
    files = builder.config.data_files or {}
    return {split: (list(names), names.origin_metadata) for split, names in files.items()}


def hub_shards(hub: Hub, name: str, dataset: Any, columns: Columns, retries: int) -> list[HubShard]:
    """The shards of a streaming data set, which are read as if they were files."""
    count, known_by = dataset.num_shards, cache(lambda: hub.identity(retries))
    return [
        HubShard(f"{name}/{i}", dataset.shard(num_shards=count, index=i), columns, known_by, retries)
        for i in range(count)
    ]
