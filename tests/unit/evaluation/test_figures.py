"""Pictures tell settings apart."""

from lightning_memlong.evaluation.figures import looks, short_tokens


def test_no_two_of_many_settings_look_alike() -> None:
    found = looks(str(number) for number in range(36))
    assert len({tuple(sorted(look.items())) for look in found.values()}) == 36


def test_tokens_on_an_axis() -> None:
    assert [short_tokens(n) for n in (0, 50, 1023, 1024, 1536, 24576)] == ["0", "50", "1023", "1k", "1.5k", "24k"]
