import io

from loralab.training.progress import Progress, time_text


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_every_few_seconds_with_time_left():
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, interval=5, clock=clock) as progress:
        progress.expect(200)
        step = progress.pack("pack 1/2", n_steps=50, n_slots=2)
        for i in range(1, 51):
            clock.now = i * 0.5
            step(i, 50, [0.5, float("nan")])
        assert progress.seconds_left == 25.0
    lines = stream.getvalue().splitlines()
    assert lines[0] == ("pack 1/2: step 10/50, best loss 0.5, 1 diverged; total 10 %, 45 s left")
    assert len(lines) == 6 and lines[-1].startswith("pack 1/2: 50 steps")


def test_a_terminal_gets_a_live_line_per_pack_and_a_total():
    stream = Terminal()
    with Progress(stream) as progress:
        progress.expect(20)
        step = progress.pack("pack 1/2", n_steps=10, n_slots=1)
        step(10, 10, [0.25])
        progress.pack("pack 2/2", n_steps=10, n_slots=1)(10, 10, [0.125])
    shown = stream.getvalue()
    assert "pack 1/2: 10 steps, best loss 0.25" in shown and "total" in shown
    assert "\x1b[" in shown


def test_quiet_writes_nothing():
    stream = io.StringIO()
    with Progress(stream, interval=0, quiet=True) as progress:
        progress.pack("pack", 1, 1)(1, 1, [1.0])
    assert stream.getvalue() == ""


def test_times_are_readable():
    assert [time_text(s) for s in (0.4, 65, 7800)] == ["0 s", "1 min 05 s", "2 h 10 min"]
