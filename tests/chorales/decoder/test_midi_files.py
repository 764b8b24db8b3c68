"""MIDI files as notes: pedals, what ends notes, and files that are not to be believed."""

# ruff: noqa: E402 (what cannot be imported is skipped first)

import functools
import struct

import pytest

from tests.chorales.helpers import require

require("hypothesis", "mido", "miditok", "symusic")

import mido
from hypothesis import strategies as st

from examples.chorales.decoder.languages import MidiLanguage, read_performance
from examples.chorales.decoder.sound import read_chorale
from tests import draws


def raw(*tracks, division=480, kind=1):
    """The bytes of a MIDI file whose tracks are bytes."""
    header = b"MThd" + struct.pack(">LHHH", 6, kind, len(tracks), division)
    return header + b"".join(b"MTrk" + struct.pack(">L", len(track)) + track for track in tracks)


def delta(ticks):
    assert ticks >= 0, "events out of order"
    digits = [ticks & 127]
    while ticks := ticks >> 7:
        digits.insert(0, ticks & 127 | 128)
    return bytes(digits)


def track(*events):
    """Events (ticks from the beginning, bytes) as a track's bytes."""
    text, now = b"", 0
    for tick, event in events:
        text, now = text + delta(tick - now) + event, tick
    return text + b"\x00\xff\x2f\x00"


def on(pitch, channel=0):
    return bytes([0x90 | channel, pitch, 80])


def off(pitch, channel=0):
    return bytes([0x80 | channel, pitch, 0])


def control(number, value, channel=0):
    return bytes([0xB0 | channel, number, value])


def tempo(microseconds):
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def heard(path, content):
    """(pitch, start, end) in ticks of the file, which are those of the score, given its default tempo and division."""
    path.write_bytes(content)
    (piano,) = read_performance(path).tracks
    return sorted((note.pitch, note.start, note.end) for note in piano.notes)


SCALE = [event for index in range(8) for event in ((480 * index, on(60 + index)), (480 * index + 400, off(60 + index)))]
FAR = 2**28 - 1  # the longest delta


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (raw(track(*SCALE, (4000 + FAR, on(90)), (4100 + FAR, off(90)))), "no note begins or ends for 279,6"),
        (raw(track(*((FAR * n + i, e) for n in range(10) for i, e in ((0, on(60)), (9, off(60)))))), "no note begins or ends for 279,6"),
        (raw(track((FAR, on(50)), (FAR + 100, off(50)))), "no note begins or ends for 279,6"),
        (raw(track(*SCALE, (480 * 300, on(90)), (480 * 300 + 9, off(90)))), "no note begins or ends for 146 seconds from 4 on"),
        (raw(track((0, on(50)), (100 * 960, off(50)))), "no note begins or ends for 100 seconds from 0 on"),
        (raw(track(*SCALE), division=0), "a division of 0 ticks per beat"),
        (raw(track(*SCALE), division=0xE700), "a division of 25 frames per second and 0 ticks per frame"),
        (raw(track(*SCALE), division=0x8001), "a division of 128 frames"),
        (raw(track(*SCALE), division=1), "no note begins or ends for 2"),
        (raw(track((0, tempo(0)), *SCALE)), "a tempo of 0 microseconds per beat, from tick 0 on"),
        (raw(track((0, tempo(1)), *SCALE)), "a tempo of 1 microseconds per beat, from tick 0 on"),
        (raw(track((500, tempo(0))), track(*SCALE)), "a tempo of 0 microseconds per beat, from tick 500 on"),
        (raw(track((0, b"\xff\x51\x02\x07\xa1"), *SCALE)), "a tempo of 0 microseconds"),
        (raw(track(*SCALE))[:-9], "it ends too early"),
        (raw(track(*SCALE), track(*SCALE), kind=2), "2 tracks of format 2"),
        (raw(track(*SCALE)) + raw(track(*SCALE))[14:], "more tracks than the 1 of its header"),
        (raw(track(*SCALE)).replace(on(61), b"\x90\x3d\xd0"), "data byte must be in range"),
        (b"", "it ends too early"),
        (b"RIFF and so on", "MThd not found"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_faithfully_is_named_with_the_reason(tmp_path, content, reason):
    """Some of these ended the run, others lost their times, or became a chord or a day of silence, without a word."""
    path = tmp_path / "file.mid"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read as MIDI") as caught:
        MidiLanguage().encode(path)
    assert f"{path}: cannot be read as MIDI ({reason}" in str(caught.value)


def test_odd_but_readable_files(tmp_path):
    """A tempo of 0 in which no time passes, meta data that makes no sense or is of an unknown kind, time in frames."""
    expected = [(60 + index, 480 * index, 480 * index + 400) for index in range(8)]
    path = tmp_path / "file.mid"
    assert heard(path, raw(track(*SCALE))) == expected
    assert heard(path, raw(track((0, tempo(0)), (0, tempo(500_000)), *SCALE, (4000, tempo(0))))) == expected
    signature = b"\xff\x59\x02\x12\x00"
    assert heard(path, raw(track((0, signature), *SCALE[:4], (900, b"\xff\x60\x01\x00"), (950, b"\xff\x00\x00"), *SCALE[4:]))) == expected
    path.write_bytes(raw(track((0, on(60)), (1000, off(60))), division=0xE728))  # 25 frames of 40 ticks: milliseconds
    (piano,) = read_performance(path).tracks
    assert [(note.start, note.end) for note in piano.notes] == [(0, 960)]


PEDAL = control(64, 127)
UP = control(64, 0)


@pytest.mark.parametrize(
    ("tracks", "expected"),
    [
        pytest.param(
            [track((0, on(60)), (100, off(60))), track((0, on(40)), (50, PEDAL), (400, UP), (500, off(40)))],
            [(40, 0, 500), (60, 0, 400)],
            id="two tracks on one channel",
        ),
        pytest.param([track((50, PEDAL), (400, UP)), track((0, on(60)), (100, off(60)))], [(60, 0, 400)], id="a track of its own"),
        pytest.param([track((0, on(60)), (100, off(60))), track((50, PEDAL), (400, UP))], [(60, 0, 400)], id="a track of its own, last"),
        pytest.param(
            [track((0, on(60)), (50, PEDAL), (60, b"\xc0\x05"), (100, off(60)), (110, on(62)), (120, off(62)), (400, UP))],
            [(60, 0, 400), (62, 110, 400)],
            id="a program change",
        ),
        pytest.param(
            [track((50, control(64, 127, 1)), (400, control(64, 0, 1))), track((0, on(60)), (100, off(60)))],
            [(60, 0, 100)],
            id="another channel",
        ),
        pytest.param(
            [track((50, b"\xff\x21\x01\x01"), (50, PEDAL), (400, UP)), track((0, on(60)), (100, off(60)))],
            [(60, 0, 100)],
            id="another port",
        ),
        pytest.param(
            [track((0, on(60)), (50, PEDAL), (50, UP), (100, off(60)), (900, on(70)), (950, off(70)))],
            [(60, 0, 100), (70, 900, 950)],
            id="down and up at one tick",
        ),
        pytest.param(
            [track((0, PEDAL), (0, on(60)), (50, off(60)), (90, UP), (90, PEDAL), (100, on(62)), (120, off(62)), (300, UP))],
            [(60, 0, 90), (62, 100, 300)],
            id="up and down at one tick",
        ),
        pytest.param(
            [track((0, PEDAL), (0, on(60)), (50, off(60)), (90, on(62)), (95, off(62)))], [(60, 0, 95), (62, 90, 95)], id="never up"
        ),
        pytest.param(
            [track((0, PEDAL), (0, on(60)), (50, off(60)), (90, control(121, 0)), (95, on(62)), (99, off(62)))],
            [(60, 0, 90), (62, 95, 99)],
            id="reset",
        ),
        pytest.param([track((0, on(60)), (9, on(64)), (50, control(123, 0)), (90, on(62)), (95, off(62)))],
            [(60, 0, 50), (62, 90, 95), (64, 9, 50)], id="all notes off",
        ),
        pytest.param(
            [track((0, on(60)), (10, PEDAL), (50, control(123, 0)), (90, UP), (95, on(62)), (99, off(62)))],
            [(60, 0, 90), (62, 95, 99)],
            id="all notes off, under the pedal",
        ),
        pytest.param(
            [track((0, on(60)), (0, on(64)), (10, PEDAL), (20, off(64)), (50, control(120, 0)), (90, UP), (95, on(62)), (99, off(62)))],
            [(60, 0, 50), (62, 95, 99), (64, 0, 50)],
            id="all sound off",
        ),
        pytest.param([track((0, on(60)), (90, control(120, 0)))], [(60, 0, 90)], id="nothing else ends it"),
        pytest.param([track((0, on(60))), track((50, control(123, 0)), (90, on(62)), (95, off(62)))],
            [(60, 0, 50), (62, 90, 95)], id="all notes off, from another track",
        ),
        pytest.param(
            [track((0, on(60)), (50, control(123, 0, 1)), (90, off(60)))], [(60, 0, 90)], id="all notes off, of another channel"
        ),
        pytest.param([track((0, on(60)), (10, on(60)), (20, off(60)), (30, off(60)))], [(60, 0, 20), (60, 10, 30)], id="twice"),
        pytest.param([track((0, on(60)), (10, on(62)), (20, off(62)))], [(60, 0, 20), (62, 10, 20)], id="never ended"),
    ],
)  # fmt: skip
def test_the_pedal_and_what_ends_notes_belong_to_the_channel(tmp_path, tracks, expected):
    """symusic's notes and controllers are those of a track and a program; it drops what controllers 120 and 123 end."""
    assert heard(tmp_path / "file.mid", raw(*tracks)) == expected


def test_midos_own_reading_is_left_alone(tmp_path):
    path = tmp_path / "file.mid"
    heard(path, raw(track((0, tempo(400_000)), *SCALE)))
    assert mido.MidiFile(path).tracks[0][0].tempo == 400_000


@pytest.mark.parametrize(
    "meta", [b"\xff\x59\x02\x12\x00", b"\xff\x59\x00", b"\xff\x58\x01\x04", b"\xff\x54\x00", tempo(0), b"\xff\x51\x00"]
)
def test_meta_data_of_a_chorale_need_not_make_sense(tmp_path, meta):
    """A key signature of 18 flats, or a tempo of 0, refused a prime whose notes are fine."""
    path = tmp_path / "chorale.mid"
    voices = [track((0, meta), (0, on(pitch, voice)), (480, off(pitch, voice))) for voice, pitch in enumerate((72, 67, 60, 48))]
    path.write_bytes(raw(*voices))
    assert read_chorale(path).tolist() == [[72, 67, 60, 48]] * 4


def test_a_chorale_that_cannot_be_read_faithfully_is_named(tmp_path):
    path = tmp_path / "chorale.mid"
    for content, reason in (
        (raw(track(*SCALE), division=0), "a division of 0 ticks per beat"),
        (raw(track(*SCALE), division=0xE728), "it counts frames, not beats"),
        (raw(track(*SCALE, (FAR, on(60)), (FAR + 9, off(60)))), "no note begins or ends for 559,2"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="--prime ") as caught:
            read_chorale(path)
        assert f"--prime {path}: cannot be read as MIDI ({reason}" in str(caught.value)


VALID = [
    raw(track((0, tempo(400_000)), (0, PEDAL), *SCALE, (4000, UP))),
    raw(track((0, tempo(600_000)), (900, tempo(300_000))), track(*SCALE), track((5, PEDAL), (700, UP), (900, PEDAL))),
    raw(*(track((0, on(pitch, voice)), (480, off(pitch, voice)), (480, b"\xc0\x13")) for voice, pitch in enumerate((72, 67, 60, 48)))),
    raw(track(*SCALE, (3900, control(123, 0))), division=0xE728, kind=0),
]
ODD = [delta(FAR), delta(2**21), b"\xff\xff\xff\xff\x7f", tempo(0), tempo(1), PEDAL, control(120, 0), b"\xff\x59\x02\x12\x00", b"MTrk"]
language = functools.cache(MidiLanguage)


@draws.given
def test_damaged_files_are_read_or_named(tmp_path_factory, draw):
    """`make explore` damages other ones: bytes changed, lost or put in, deltas and lengths among them, and ends cut off."""
    content = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        place, damage = draw(st.integers(0, len(content))), draw(st.sampled_from(["change", "lose", "put", "cut"]))
        if damage == "change":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif damage == "lose":
            del content[place : place + draw(st.integers(1, 8))]
        elif damage == "put":
            content[place:place] = draw(st.sampled_from(ODD) | st.binary(min_size=1, max_size=4))
        else:
            del content[place:]
    path = tmp_path_factory.getbasetemp() / "damaged.mid"
    path.write_bytes(content)
    for read, most in ((language().encode, 5_000), (lambda given: read_chorale(given).ravel(), 50_000)):
        try:
            assert len(read(path)) <= most  # silences fill no data set
        except ValueError as error:
            if f"{path}: " not in str(error):
                raise
