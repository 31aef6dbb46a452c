import threading

import pytest

from infra.background import Background


def test_one_piece_of_work_at_a_time_in_its_order() -> None:
    done: list[int] = []
    go_on = threading.Event()
    with Background() as background:
        background.start(lambda: done.append(1) if go_on.wait(10) else None)
        assert not done  # nobody waits
        go_on.set()
        background.start(lambda: done.append(2))
        assert done[0] == 1
    assert done == [1, 2]


@pytest.mark.parametrize("by", ["start", "wait", "end"])
def test_what_goes_wrong_is_raised_once(by: str) -> None:
    def fail() -> None:
        raise SystemExit("full")

    background = Background()
    with pytest.raises(SystemExit, match="full"), background:
        background.start(fail)
        if by == "start":
            background.start(lambda: None)
        elif by == "wait":
            background.wait()
    background.wait()


def test_what_ends_a_run_waits_for_it() -> None:
    done: list[int] = []
    late = threading.Event()
    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.start(lambda: done.append(1) if late.wait(0.2) is False else None)
        raise KeyboardInterrupt
    assert done == [1]
