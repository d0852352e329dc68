"""Scalars in TensorBoard's event files, written without TensorFlow.

A file is records: length (uint64), masked CRC of the length, bytes, masked CRC of the bytes
(tensorflow/core/lib/io/record_writer.cc); a record is a protocol buffer Event
(tensorflow/core/util/event.proto): wall_time = 1 (double), step = 2 (int64), file_version = 3
(string), summary = 5 of value = 1 of tag = 1 (string) and simple_value = 2 (float), session_log = 7
of status = 1 (START = 1: what was written for this step and later does not count). The CRC is
CRC-32C, masked as rotr(crc, 15) + 0xa282ead8.
"""

from __future__ import annotations

import os
import pathlib
import struct
import time
from collections.abc import Mapping

from placement.training.appending import append, open_to_append

_POLYNOMIAL = 0x82F63B78


class EventFile:
    """One run's scalars. A context manager."""

    def __init__(self, folder: str | pathlib.Path, *, first_step: int) -> None:
        """first_step: the one that is written first; an earlier run's from there on are void."""
        folder = pathlib.Path(folder)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{os.getpid()}"
        self.path = folder / name
        self._table = _crc_table()
        self._file = open_to_append(self.path)
        self._record(_double(1, time.time()) + _string(3, b"brain.Event:2"))
        if first_step > 1:
            started = b"\x10" + _varint(first_step) + _string(7, b"\x08\x01")
            self._record(_double(1, time.time()) + started)

    def __enter__(self) -> EventFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of one step, by tag."""
        values = b"".join(
            _string(1, _string(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
            for tag, value in scalars.items()
        )
        self._record(_double(1, time.time()) + b"\x10" + _varint(step) + _string(5, values))

    def _record(self, content: bytes) -> None:
        length = struct.pack("<Q", len(content))
        append(self._file, length + self._masked(length) + content + self._masked(content))

    def _masked(self, content: bytes) -> bytes:
        crc = 0xFFFFFFFF
        for byte in content:
            crc = self._table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        crc ^= 0xFFFFFFFF
        rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
        return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _string(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value
