"""Base64 in C against the standard library, with every instruction set."""

from __future__ import annotations

import base64
import binascii
import random
import re

import pytest

from evmp._native import Base64Error, base64_decode

pytestmark = pytest.mark.usefixtures("simd")

# Around the blocks of every level: 4, 32 + 16, 64 and 64 + 24 characters.
LENGTHS = [*range(150), 1000, 1023, 1024, 1025, 4096, 99_999, 100_000]
STRICT = re.compile(rb"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


def decode(text: str | bytes, **options: bool) -> bytes:
    dst = bytearray(len(text))
    return bytes(dst[: base64_decode(text, dst, **options)])


def fault(text: str | bytes, **options: bool) -> tuple[str, int]:
    with pytest.raises(Base64Error) as caught:
        decode(text, **options)
    return str(caught.value), caught.value.position


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda text: text.decode()])
def test_text_may_be_of_any_kind(kind: type) -> None:
    assert decode(kind(b"aGVsbG8=")) == b"hello"


@pytest.mark.parametrize("url", [False, True])
def test_every_length_decodes(url: bool) -> None:
    rng = random.Random(1)
    encode = base64.urlsafe_b64encode if url else base64.b64encode
    for length in LENGTHS:
        data = rng.randbytes(length)

        assert decode(encode(data), url=url) == data


def test_every_character_has_its_value_at_every_place() -> None:
    values = bytes(range(64)) * 4
    for shift in range(4):
        bits = "".join(f"{value:06b}" for value in values[shift:] + values[:shift])
        data = int(bits, 2).to_bytes(len(bits) // 8, "big")

        assert decode(base64.b64encode(data)) == data
        assert decode(base64.urlsafe_b64encode(data), url=True) == data


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("AB*D", 2),  # not in the alphabet
        ("AB D", 2),
        ("AB-D", 2),
        ("A===", 1),  # padding too early
        ("=", 0),
        ("AB=x", 3),  # padding cut off by a character
        ("AA==AA", 4),  # text behind the end
        ("AAAAAA==\n", 8),
        ("ABC", 3),  # not a multiple of four
        ("AB=", 3),
        ("AAAAA", 5),
        ("AB==", 1),  # bits behind the last byte are not zero
        ("AAAAABC=", 6),
        ("AAA\xe9", 3),  # not ASCII
        ("AAAA\u4e2d", 4),
    ],
)
def test_fault_is_found_at_its_position(text: str, position: int) -> None:
    assert fault(text)[1] == position
    assert fault("A" * 400 + text)[1] == 400 + position


def test_message_says_what_and_where() -> None:
    assert fault("AB*D")[0] == "bad Base64 character 0x2a at position 2"
    assert fault("AB=x")[0] == "bad Base64 padding: 0x78 at position 3"
    assert fault("ABC")[0] == "truncated Base64: ends at position 3, inside a group of 4"
    assert fault("AB==")[0] == "bad Base64: bits behind the last byte are not zero at position 1"


def test_bad_character_is_found_wherever_it_is() -> None:
    text = base64.b64encode(bytes(range(252)))
    for position in range(len(text)):
        for bad in b"-_*\x00\x80\xff \n":
            damaged = bytearray(text)
            damaged[position] = bad

            assert fault(damaged)[1] == position, (position, bad)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_padding_inside_the_text_is_found_wherever_it_is(place: int) -> None:
    text = "QQ" * 200
    for group in range(0, 396, 4):
        damaged = text[: group + place] + "=" + text[group + place + 1 :]

        # Where it may stand, the next character is the fault.
        assert fault(damaged)[1] == (group + place if place < 2 else group + 3 + (place == 3))


def test_alphabets_do_not_mix() -> None:
    assert fault("AB+/", url=True)[1] == 2
    assert fault("AB-_")[1] == 2
    assert decode("AB-_", url=True) == decode("AB+/")


def test_damage_is_accepted_only_where_it_is_strict_base64() -> None:
    rng = random.Random(2)
    for _ in range(3000):
        text = bytearray(base64.b64encode(rng.randbytes(rng.randrange(120))))
        for _ in range(rng.randrange(3)):
            if text:
                text[-rng.randrange(1, min(len(text), rng.choice([4, 160])) + 1)] = rng.choice(
                    b"=AQgw+/-_\n\xff"
                )
        del text[len(text) - rng.randrange(2) :]
        # Python 3.10 has no strict mode; encoding again finds bits that are not zero.
        data = base64.b64decode(text) if STRICT.fullmatch(text) else None

        if data is not None and base64.b64encode(data) == text:
            assert decode(text) == data
        else:
            with pytest.raises(Base64Error):
                decode(text)


def test_white_space_is_skipped_when_asked() -> None:
    data = random.Random(3).randbytes(5000)
    lines = base64.encodebytes(data)

    assert decode(lines, whitespace=True) == data
    assert decode(lines.replace(b"\n", b"\r\n \t\f"), whitespace=True) == data
    assert decode(b" \n", whitespace=True) == b""
    assert fault(lines)[1] == 76


def test_white_space_anywhere_keeps_data_and_positions() -> None:
    rng = random.Random(4)
    for _ in range(300):
        data = rng.randbytes(rng.randrange(3000))
        text = bytearray(base64.b64encode(data))
        for _ in range(rng.choice([1, 5, 500])):
            text.insert(rng.randrange(len(text) + 1), rng.choice(b" \t\n\f\r"))
        assert decode(text, whitespace=True) == data

        position = rng.randrange(len(text))
        text[position] = ord("!")

        # One "=" of two may stand before the damage: then it is the padding that is bad.
        assert fault(text, whitespace=True)[1] == position


def test_padding_ends_the_text_whatever_the_white_space() -> None:
    assert fault("AA==  AA==", whitespace=True)[1] == 6
    assert fault("AA==" + " " * 3000 + "=", whitespace=True)[1] == 3004
    assert fault("A A = \n", whitespace=True)[1] == 7
    assert decode("AA=" + " " * 3000 + "=  ", whitespace=True) == b"\0"


def test_vertical_tab_and_no_break_space_are_not_white_space() -> None:
    assert fault("AAAA\x0b", whitespace=True)[1] == 4
    assert fault("AAAA\xa0", whitespace=True)[1] == 4


@pytest.mark.parametrize("length", [1, 2, 3, 4, 47, 48, 49, 64, 65, 66, 200])
def test_nothing_is_written_behind_the_end(length: int) -> None:
    data = bytes(length)
    dst = bytearray(b"\xff" * (length + 100))

    n = base64_decode(base64.b64encode(data), dst)

    assert n == length
    assert dst == data + b"\xff" * 100


@pytest.mark.parametrize("length", [1, 2, 3, 48, 64, 100, 1000])
def test_destination_must_be_large_enough(length: int) -> None:
    text = base64.b64encode(bytes(length))
    base64_decode(text, bytearray(length))

    with pytest.raises(
        ValueError, match=f"destination of {length - 1} bytes is too small"
    ) as error:
        base64_decode(text, bytearray(length - 1))
    assert not isinstance(error.value, Base64Error)


def test_destination_must_be_writable_and_contiguous() -> None:
    with pytest.raises(TypeError):
        base64_decode("AAAA", b"...")
    with pytest.raises(TypeError):
        base64_decode("AAAA", memoryview(bytearray(10))[::2])
    with pytest.raises(BufferError):
        base64_decode(memoryview(b"AAAAAAAA")[::2], bytearray(10))
    with pytest.raises(TypeError):
        base64_decode(3, bytearray(10))  # type: ignore[arg-type]


def test_refused_call_releases_its_buffers() -> None:
    text, dst = bytearray(b"AB*D"), bytearray(10)

    with pytest.raises(Base64Error):
        base64_decode(text, dst)

    text.append(0)
    dst.append(0)


def test_nothing_that_binascii_refuses_is_accepted() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        text = bytes(rng.choices(b"AB=\n*", k=rng.randrange(9)))
        try:
            data = decode(text)
        except Base64Error:
            continue
        assert binascii.a2b_base64(text) == data
