"""The file that `compress` writes: about 55 bytes beside what the range coder wrote.

TTLZ, version 1 | fingerprint of model and tokenizer 16 | digest of the content 8 | of the machine 4
numbers, 7 bits a byte: lanes, threads, window, stride, tokens, three for each package's version
payload | CRC-32 of all before it
"""

import platform
import re
import struct
import zlib
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from testtime._core.errors import StateError
from testtime.decode.models import fingerprint, tokenizer_fingerprint

MAGIC = b"TTLZ"
VERSION = 2
FIXED = struct.Struct("<4sB16s8s4s")
PACKAGES = ("torch", "transformers", "constriction")


@dataclass(frozen=True, kw_only=True)
class File:
    """What a compressed file says of itself, and its payload.

    Attributes:
        lanes: parts that were coded side by side.
        threads: that torch had.
        window: tokens of context at most.
        stride: tokens dropped when the window is full.
        tokens: how many were coded; 0 where the payload is the content itself.
        versions: three numbers of each package.
        fingerprint: of model and tokenizer.
        digest: of the content.
        machine: stands for the build of torch and for what the model ran on.
        payload: of the range coder.
    """

    lanes: int
    threads: int
    window: int
    stride: int
    tokens: int
    versions: tuple[int, ...]
    fingerprint: bytes
    digest: bytes
    machine: bytes
    payload: bytes

    def pack(self) -> bytes:
        """The bytes of the file."""
        numbers = (self.lanes, self.threads, self.window, self.stride, self.tokens, *self.versions)
        data = FIXED.pack(MAGIC, VERSION, self.fingerprint, self.digest, self.machine)
        data += b"".join(map(_packed, numbers)) + self.payload
        return data + struct.pack("<I", zlib.crc32(data))


def inspect(data: bytes) -> File:
    """Reads a compressed file as far as no model is needed.

    Raises:
        StateError: it is no such file, of another version, or damaged.

    Example:
        >>> inspect(b"PK...")
        Traceback (most recent call last):
        testtime._core.errors.StateError: this is no file of testtime compress: it does not begin
        with b'TTLZ'
    """
    if data[:4] != MAGIC:
        raise StateError(f"this is no file of testtime compress: it does not begin with {MAGIC!r}")
    if data[4:5] != bytes([VERSION]):
        raise StateError(
            f"the file has version {data[4] if len(data) > 4 else 'none'}, and this testtime reads "
            f"{VERSION}; decompress it with the testtime that made it"
        )
    if len(data) < FIXED.size + 4 or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise StateError(
            f"the file is damaged or cut short: its checksum does not fit its {len(data)} bytes"
        )
    _, _, fingerprint, digest, machine = FIXED.unpack_from(data)
    try:
        numbers, end = _unpacked(data[:-4], FIXED.size, 5 + 3 * len(PACKAGES))
    except IndexError as error:
        raise StateError(f"the file ends in its head, after {len(data)} bytes") from error
    lanes, threads, window, stride, tokens, *versions = numbers
    if not (0 < lanes < 2**16 and 0 < threads < 2**16 and 0 < stride < window < 2**32):
        raise StateError(
            f"the file says lanes {lanes}, threads {threads}, window {window}, stride {stride}; "
            "no file of testtime compress does"
        )
    return File(
        lanes=lanes, threads=threads, window=window, stride=stride, tokens=tokens,
        versions=tuple(versions), fingerprint=fingerprint, digest=digest, machine=machine,
        payload=data[end:-4],
    )  # fmt: skip


def digest(content: bytes, size: int = 8) -> bytes:
    """Bytes that stand for a content."""
    return blake2b(content, digest_size=size).digest()


def identity(model: nn.Module, tokenizer: Any) -> bytes:
    """16 bytes that stand for the weights, the configuration and the tokenizer's rules."""
    return digest((fingerprint(model) + tokenizer_fingerprint(tokenizer)).encode(), 16)


def versions() -> tuple[int, ...]:
    """Three numbers for each package on which the last bits of a sum depend."""
    found = [re.findall(r"\d+", version(name))[:3] for name in PACKAGES]
    return tuple(int(number) for each in found for number in [*each, 0, 0][:3])


def named(numbers: tuple[int, ...]) -> str:
    """Versions as words.

    Example:
        >>> named((2, 9, 1, 5, 0, 0, 0, 4, 2))
        'torch 2.9.1, transformers 5.0.0, constriction 0.4.2'
    """
    parts = [".".join(map(str, numbers[3 * i : 3 * i + 3])) for i in range(len(PACKAGES))]
    return ", ".join(f"{name} {part}" for name, part in zip(PACKAGES, parts, strict=True))


def machine(model: nn.Module) -> bytes:
    """4 bytes that stand for the kind of build of torch and for what a model runs on."""
    device = next(model.parameters()).device
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    return digest(f"{torch.__version__.partition('+')[2]} {device.type} {kind}".encode(), 4)


def _packed(number: int) -> bytes:
    """A number, 7 bits a byte, the lowest first; the eighth bit says that more follow."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _packed(rest) if rest else bytes([low])


def _unpacked(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """Numbers from a place on, and the place behind them."""
    found: list[int] = []
    for _ in range(count):
        number = shift = 0
        while (byte := data[at]) > 0x7F:
            number, shift, at = number | (byte & 0x7F) << shift, shift + 7, at + 1
        found.append(number | byte << shift)
        at += 1
    return found, at
