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


class ChunkIndex:
    """Inner-product search over unit vectors (paper, section 2: retrieval).

    An entry is known by its place in the order of insertion, so that an index after eviction is the same as one
    built afresh from the embeddings that stayed. Types that need training (IVF, PQ) search exactly until they
    hold enough vectors, and are then trained once on what they hold; that is logged.

    Args:
        size: Length of an embedding.
        factory: FAISS ``index_factory`` string.
        gpu: Keep the index on the GPU; needs a faiss-gpu build.

    Raises:
        UserError: If FAISS does not know the string.
    """

    def __init__(self, size: int, factory: str = "Flat", gpu: bool = False) -> None:
        self.size, self.factory, self._gpu = size, factory, gpu
        try:
            self._target = faiss.index_factory(size, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise UserError(
                f"memory.index={factory!r} cannot be built for embeddings of size {size}. Allowed: a FAISS "
                "index_factory string such as Flat, IVF64,Flat or HNSW32. Fix: use Flat, which is exact."
            ) from error
        self.reset()

    def __len__(self) -> int:
        return self._index.ntotal

    def reset(self) -> None:
        """Forget all vectors; what was trained stays trained."""
        self._target.reset()
        plain = self._target if self._target.is_trained else faiss.IndexFlatIP(self.size)
        self._index = _on_device(plain, self._gpu)

    def add(self, embeddings: Tensor) -> None:
        """Append vectors (n, size)."""
        self._index.add(np.ascontiguousarray(embeddings.float().numpy()))

    def rebuild(self, embeddings: Tensor) -> None:
        """Hold exactly these vectors (n, size), training the index if it needs that and now can."""
        if not self._target.is_trained and len(embeddings) >= self._training_size():
            log.info("Training FAISS index %s on %d embeddings", self.factory, len(embeddings))
            self._target.train(np.ascontiguousarray(embeddings.float().numpy()))
        self.reset()
        self.add(embeddings)

    def wants_training(self) -> bool:
        """Whether enough vectors have come together to train an index type that needs it."""
        return not self._target.is_trained and len(self) >= self._training_size()

    def _training_size(self) -> int:
        lists = getattr(faiss.extract_index_ivf(self._target), "nlist", 1) if "IVF" in self.factory else 1
        # FAISS asks for 39 points a centroid; product quantisers have 256 centroids.
        return 39 * max(lists, 256 if "PQ" in self.factory else 1)

    def search(self, query: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Best ``top_k`` of the stored vectors for one query (size,).

        Returns:
            Scores (k,) float32, best first, and places in the order of insertion (k,) int64; k is smaller where
            fewer vectors are stored.
        """
        k = min(top_k, len(self))
        if k == 0:
            return torch.empty(0), torch.empty(0, dtype=torch.long)
        scores, places = self._index.search(np.ascontiguousarray(query.float().numpy()[None]), k)
        found = torch.from_numpy(places[0])
        return torch.from_numpy(scores[0])[found >= 0], found[found >= 0]
