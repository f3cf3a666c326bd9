"""FAISS behind one small interface: the embeddings of one bank row, numbered in order of insertion."""

import logging
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lightning_memlong.errors import UserError

try:
    import faiss
except ImportError as error:
    raise UserError(
        "FAISS is not installed. Allowed: faiss-cpu or faiss-gpu. Fix: pip install -e '.[cpu]' (or '.[gpu]')."
    ) from error

log = logging.getLogger(__name__)


def has_gpu_index() -> bool:
    """Whether this build of FAISS has GPU indexes and a GPU to put them on."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@cache
def _gpu_resources() -> "faiss.StandardGpuResources":
    # Scratch memory of the GPU indexes; must outlive them, so one for the process.
    return faiss.StandardGpuResources()


def _on_device(index: faiss.Index, gpu: bool) -> faiss.Index:
    if not gpu:
        return index
    try:
        return faiss.index_cpu_to_gpu(_gpu_resources(), torch.cuda.current_device(), index)
    except RuntimeError as error:
        raise UserError(
            f"memory.index: {type(index).__name__} has no GPU form in FAISS. Allowed on a GPU: Flat, IVF and PQ types. "
            "Fix: use Flat, which is exact."
        ) from error


class FlatIndex:
    """Exact search (paper, section 2: retrieval) right in the ledger's embeddings, which therefore exist once.

    An entry is known by its place in the order of insertion. Nothing is built, so nothing has to follow an eviction.

    Args:
        room: (S, size) unit vectors; the first so many of them are live.
        gpu: Search on the GPU; needs a faiss-gpu build.
    """

    def __init__(self, room: Tensor, gpu: bool = False) -> None:
        self._room, self._gpu, self._count = room, gpu, 0

    def __len__(self) -> int:
        return self._count

    def add(self, count: int) -> None:
        """Note that ``count`` more vectors are live."""
        self._count += count

    def rebuild(self, count: int) -> None:
        """Note that the first ``count`` vectors are the live ones now."""
        self._count = count

    def reset(self) -> None:
        """Forget all vectors."""
        self._count = 0

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Best ``top_k`` of the stored vectors for each of Q queries (Q, size), in one call.

        Returns:
            Scores (Q, k) float32, best first, and places in the order of insertion (Q, k) int64, -1 where nothing was
            found; k is smaller where fewer vectors are stored.
        """
        k = min(top_k, self._count)
        if k == 0:
            return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        questions = np.ascontiguousarray(queries.float().numpy())
        # Not kept as an array: a tensor's memory moves where it goes to another process.
        live = self._room[: self._count].numpy()
        if self._gpu:
            scores, places = faiss.knn_gpu(_gpu_resources(), questions, live, k, metric=faiss.METRIC_INNER_PRODUCT)
        else:
            scores, places = faiss.knn(questions, live, k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(scores), torch.from_numpy(places)


class ChunkIndex:
    """Inner-product search by any other FAISS index, which copies the vectors.

    An entry is known by its place in the order of insertion, so that an index after eviction is the same as one
    built afresh from the embeddings that stayed. Types that need training (IVF, PQ) search exactly until they
    hold enough vectors, and are then trained once on what they hold; that is logged.

    Args:
        room: (S, size) unit vectors; the first so many of them are live.
        factory: FAISS ``index_factory`` string.
        gpu: Keep the index on the GPU; needs a faiss-gpu build.

    Raises:
        UserError: If FAISS does not know the string.
    """

    def __init__(self, room: Tensor, factory: str, gpu: bool = False) -> None:
        self._room, self.size, self.factory, self._gpu = room, room.shape[1], factory, gpu
        size = self.size
        try:
            self._target = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UserError(
                f"memory.index={factory!r} cannot be built for embeddings of size {size}. Allowed: a FAISS "
                "index_factory string such as Flat, IVF64,Flat or HNSW32. Fix: use Flat, which is exact."
            ) from error
        self.reset()

    def __len__(self) -> int:
        return self.faiss_index.ntotal

    def reset(self) -> None:
        """Forget all vectors; what was trained stays trained."""
        self._target.reset()
        plain = self._target if self._target.is_trained else faiss.IndexFlatIP(self.size)
        self.faiss_index = _on_device(plain, self._gpu)

    def add(self, count: int) -> None:
        """Take in the ``count`` vectors that follow, training the index if it needs that and now can."""
        held = len(self)
        self._take(held, held + count)
        if not self._target.is_trained and len(self) >= self._training_size():
            self.rebuild(len(self))

    def rebuild(self, count: int) -> None:
        """Hold exactly the first ``count`` vectors."""
        if not self._target.is_trained and count >= self._training_size():
            log.info("Training FAISS index %s on %d embeddings", self.factory, count)
            self._target.train(np.ascontiguousarray(self._room[:count].numpy()))
        self.reset()
        self._take(0, count)

    def _take(self, start: int, stop: int) -> None:
        self.faiss_index.add(np.ascontiguousarray(self._room[start:stop].numpy()))

    def _training_size(self) -> int:
        lists = getattr(faiss.extract_index_ivf(self._target), "nlist", 1) if "IVF" in self.factory else 1
        # FAISS asks for 39 points a centroid; product quantisers have 256 centroids.
        return 39 * max(lists, 256 if "PQ" in self.factory else 1)

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Best ``top_k`` of the stored vectors for each of Q queries (Q, size), in one call.

        Returns:
            Scores (Q, k) float32, best first, and places in the order of insertion (Q, k) int64, -1 where nothing was
            found; k is smaller where fewer vectors are stored.
        """
        k = min(top_k, len(self))
        if k == 0:
            return torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
        scores, places = self.faiss_index.search(np.ascontiguousarray(queries.float().numpy()), k)
        return torch.from_numpy(scores), torch.from_numpy(places)


def make_index(room: Tensor, factory: str = "Flat", gpu: bool = False) -> FlatIndex | ChunkIndex:
    """The index a configuration names, over vectors (S, size) that are filled in order of insertion."""
    return FlatIndex(room, gpu) if factory == "Flat" else ChunkIndex(room, factory, gpu)
