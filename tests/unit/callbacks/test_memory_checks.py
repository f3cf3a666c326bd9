"""What a batch of a DataModule of one's own must be."""

import pytest
import torch

from callbacks.memory_checks import check_batch
from lightning_memlong.errors import UserError


@pytest.mark.parametrize(
    ("shape", "words"), [((1, 64), "rows of a batch=1.*Allowed: 2"), ((2, 60), "=60.*chunk_size=16")]
)
def test_another_batch_than_the_banks_is_told(shape: tuple[int, int], words: str) -> None:
    check_batch({"input_ids": torch.zeros(2, 64)}, 2, 16)
    with pytest.raises(UserError, match=words):
        check_batch({"input_ids": torch.zeros(*shape)}, 2, 16)
