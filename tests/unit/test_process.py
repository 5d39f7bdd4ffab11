"""What is set for the whole process."""

from __future__ import annotations

import gc

from betterhalf.process import settled


def test_what_exists_is_put_aside_and_comes_back_once() -> None:
    before = gc.get_freeze_count()
    with settled():
        frozen = gc.get_freeze_count()
        assert frozen > before
        with settled():
            assert gc.get_freeze_count() == frozen
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == before == 0
