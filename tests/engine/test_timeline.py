"""Every moment of a program belongs to one name, and to the right one."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fastmeta.engine import timeline
from fastmeta.engine.timeline import Timeline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timeline.time, "perf_counter", made)
    return made


def play(line: Timeline, clock: Clock, *events: str | float) -> None:
    """Numbers are time that passes; a name begins a span, ``/`` ends it."""
    opened: list[tuple[str, float]] = []
    for event in events:
        if isinstance(event, float):
            clock.now += event
        elif event == "/":
            line.close(*opened.pop())
        else:
            opened.append((event, line.open(event)))


STEP = ("preparation", 1.0, "/", 0.25, "meta-step", 8.0, "/")


def test_a_training_loop(clock: Clock) -> None:
    line = Timeline()
    loop = (*STEP, 0.5, "backward", 2.0, "/", 0.125, "outer step", 4.0, "/", 16.0)
    play(line, clock, 32.0, *loop, *loop, "preparation", 1.0, "/", "evaluation", 64.0, "/", 128.0)
    line.end()
    assert {name: seconds for name, seconds in line.totals.items() if seconds} == {
        "start": 32.0,
        "preparation": 1.25 + 1.25 + 1.0,
        "meta-step": 16.0,
        "backward": 2 * (0.5 + 2.0 + 0.125),
        "outer step": 8.0,
        "data": 32.0,
        "evaluation": 64.0,
        "end": 128.0,
    }
    assert line.seconds == sum(line.totals.values())
    assert [(s.name, s.begin, s.seconds) for s in line.spans[:2]] == [
        ("preparation", 32.0, 1.0),
        ("meta-step", 33.25, 8.0),
    ]
    clock.now += 1000.0
    assert line.seconds == sum(line.totals.values())


def test_without_an_outer_step_the_rest_is_not_told_apart(clock: Clock) -> None:
    line = Timeline()
    play(line, clock, *STEP, 3.0, *STEP)
    assert line.totals["between meta-steps"] == 3.0
    assert line.totals["data"] == line.totals["backward"] == 0.0


def test_what_runs_inside_is_taken_out(clock: Clock) -> None:
    line = Timeline()
    play(
        line, clock, "backward", 1.0, "meta-step", 10.0, "profile", 0.5, "/", "/", 2.0, "/", 7.0, "outer step", 1.0, "/"
    )
    assert (line.totals["backward"], line.totals["meta-step"], line.totals["profile"]) == (10.0, 10.0, 0.5)
    assert line.totals["outer step"] == 1.0
    play(line, clock, "profile", 5.0, "/", 3.0, "preparation", "/")
    assert line.totals["data"] == 3.0  # what the profile does is no neighbour


def test_spans_are_kept_up_to_a_number_and_totals_go_on(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST", 3)
    line = Timeline()
    play(line, clock, *STEP * 4)
    assert len(line.spans) == 3
    assert line.totals["meta-step"] == 32.0


def test_another_thread_leaves_it_alone() -> None:
    line = Timeline()

    def elsewhere() -> None:
        assert line.inside()
        with line.span("meta-step"):
            pass

    run(elsewhere)
    assert line.spans == []
    with line.span("meta-step"):
        assert line.inside()
    assert [span.name for span in line.spans] == ["meta-step"]
    line.end()
    with line.span("meta-step"):
        pass
    assert len(line.spans) == 1
    assert line.ended


def run(target: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            target()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    assert not failed
