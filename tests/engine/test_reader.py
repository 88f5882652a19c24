"""read_ahead: in order, ahead of the consumer, and without a wait for what is ready."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from runs import rows, run_here, write_recipe, write_shards, write_student

from dasd_engine import reader, train
from dasd_engine.reader import read_ahead


@pytest.fixture
def futures(monkeypatch):
    """What the reader's thread was given to do."""
    submitted = []

    class Recorded(ThreadPoolExecutor):
        def submit(self, *arguments):
            submitted.append(super().submit(*arguments))
            return submitted[-1]

    monkeypatch.setattr(reader, "ThreadPoolExecutor", Recorded)
    return submitted


def test_places_in_order_with_what_was_read():
    found = [(place, value) for place, value, _ in read_ahead(lambda place: place * place, range(7))]
    assert found == [(place, place * place) for place in range(7)]
    assert list(read_ahead(str, [])) == []


def test_the_next_is_read_while_one_is_used():
    """Place i + 1 is read before the consumer of place i asks for it, and place i + 2 is not."""
    read = [threading.Event() for _ in range(6)]
    for place, _, _ in read_ahead(lambda place: read[place].set(), range(6)):
        if place + 1 < 6:
            assert read[place + 1].wait(timeout=60)
        assert not any(event.is_set() for event in read[place + 2 :])


def test_what_is_ready_has_cost_no_wait(futures):
    hold = threading.Event()

    def read(place):
        if place == 3:
            hold.wait(timeout=60)

    waits = []
    for place, _, waited in read_ahead(read, range(5)):
        waits.append(waited)
        if place == 2:
            threading.Timer(0.05, hold.set).start()  # place 3 is asked for before it is there
        else:
            wait(futures)
    assert waits[1:3] == [0.0, 0.0] and waits[3] > 0.0 and waits[4] == 0.0


def test_an_error_is_raised_at_its_place():
    def read(place):
        if place == 2:
            raise ValueError("place 2 cannot be read")
        return place

    places = read_ahead(read, range(5))
    assert [next(places)[0], next(places)[0]] == [0, 1]
    with pytest.raises(ValueError, match="place 2"):
        next(places)


def test_a_reader_that_is_closed_reads_no_further():
    read = []
    places = read_ahead(read.append, range(1000))
    next(places)
    places.close()
    assert len(read) <= 2 and threading.active_count() < 50
    assert not [t for t in threading.enumerate() if t.name.startswith("reader")]


def test_training_waits_for_data_under_one_percent_of_the_time(tmp_path, monkeypatch, futures):
    """A step that takes as long as reading the next one costs that one no wait at all: only the first of a stage
    waits, though these steps are of milliseconds."""
    write_student(tmp_path / "student")
    write_shards(tmp_path / "data0")
    step = train.Run.step

    def long_enough(self, *arguments):
        step(self, *arguments)
        wait(futures)

    monkeypatch.setattr(train.Run, "step", long_enough)
    metrics = rows(run_here(write_recipe(tmp_path), "train.epochs=24"))
    assert len(metrics) > 40 and {row["wait_s"] for row in metrics[1:]} == {0.0}
    assert sum(row["wait_s"] for row in metrics) < 0.01 * sum(row["step_s"] for row in metrics)
