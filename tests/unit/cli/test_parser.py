"""What the parser says of mistakes."""

import pytest

from lightning_memlong.cli.parser import Parser

OF_A_UNION = """Parser key "evaluation":
  Does not validate against any of the Union subtypes
  Errors:
    - lm-eval is not installed. Allowed: version 1. Fix: pip install it.
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""


def test_a_message_of_ours_among_others_is_told_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for message, told in (
        (OF_A_UNION, "lm-eval is not installed. Allowed: version 1. Fix: pip install it."),
        ("another\n  - Expected", "another\n  - Expected"),
    ):
        with pytest.raises(SystemExit) as ended:
            Parser().error(message)
        assert ended.value.code == 2 and capsys.readouterr().err == f"error: {told}\n"
