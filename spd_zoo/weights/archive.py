"""A strict parser of the zip files that `torch.save` writes.

Parsers that disagree on where a zip file's directory is read different contents from the same file. Therefore only this
parser reads these files, and it refuses everything that `torch.save` never writes: bytes outside of records,
compression, comments, a second directory. Section numbers in comments refer to the specification of the format,
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT.
"""

import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from io import BufferedReader

__all__ = ["Archive", "FormatError"]

_LOCAL = struct.Struct("<4s5H3L2H")  # 4.3.7
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")  # 4.3.9
_CENTRAL = struct.Struct("<4s6H3L5H2L")  # 4.3.12
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_LOCATOR64 = struct.Struct("<4sLQL")  # 4.3.15
_END = struct.Struct("<4s4H2LH")  # 4.3.16
_SIZES_FOLLOW, _UTF8 = 1 << 3, 1 << 11  # flags, 4.4.4
_MOST16, _MOST32 = 0xFFFF, 0xFFFFFFFF  # placeholders for a larger number, which is stored elsewhere
_LARGEST_DIRECTORY = 8 * 2**20  # bytes; 10,000 tensors need a tenth of it


class FormatError(ValueError):
    """A file that is invalid or of an unsupported format; the message completes "the file is ..."."""


@dataclass(frozen=True)
class _Record:
    """An entry of the directory."""

    name: bytes
    flags: int
    crc: int
    size: int
    header: int  # offset of its local header


class Archive:
    """The records of a zip file, by their names inside the top-level folder that `torch.save` creates.

    Every byte of the file must belong to exactly one record, to its header, or to the directory at the end.

    Args:
        file: The file, open for reading.
        size: Its length in bytes.

    Raises:
        FormatError: If it is not as `torch.save` writes it.
    """

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file = file
        records, directory = self._directory(size)
        ends = [record.header for record in records[1:]] + [directory]
        if not records or records[0].header != 0:
            raise FormatError("a zip file that does not begin with its first record")
        folder = records[0].name.partition(b"/")[0] + b"/"
        self._places: dict[str, tuple[int, _Record]] = {}
        for record, end in zip(records, ends, strict=True):
            name = record.name.removeprefix(folder).decode("utf-8")
            if name in self._places or not record.name.startswith(folder):
                raise FormatError("a zip file with two records of one name, or with several folders")
            self._places[name] = self._check(record, end), record

    @property
    def names(self) -> Collection[str]:
        """The records' names."""
        return self._places.keys()

    def size(self, name: str) -> int:
        """The length of a record in bytes."""
        return self._places[name][1].size

    def read(self, name: str) -> bytearray:
        """The bytes of a record.

        Raises:
            FormatError: If they do not match its checksum.
        """
        start, record = self._places[name]
        content = bytearray(record.size)
        self._file.seek(start)
        if self._file.readinto(content) != record.size:
            raise FormatError("a file that ends too early")
        if record.crc not in (0, zlib.crc32(content)):  # 0: torch.serialization.set_crc32_options(False)
            raise FormatError("a damaged file: the checksum of a record is wrong")
        return content

    def _directory(self, size: int) -> tuple[list[_Record], int]:
        """The records in their order, and the offset of the directory."""
        end = size - _END.size
        sign, disk, first_disk, here, count, length, start, comment = _END.unpack(self._bytes(end, _END.size))
        if sign != b"PK\5\6" or disk or first_disk or here != count or comment:
            raise FormatError("a zip file that is cut, or followed by other bytes")
        if end >= _LOCATOR64.size + _END64.size:
            locator = end - _LOCATOR64.size
            sign, disk, place, disks = _LOCATOR64.unpack(self._bytes(locator, _LOCATOR64.size))
            if sign == b"PK\6\7":
                end = locator - _END64.size
                values = _END64.unpack(self._bytes(end, _END64.size))
                if (
                    (disk, place, disks) != (0, end, 1)
                    or values[:2] != (b"PK\6\6", _END64.size - 12)
                    or any(values[4:6])
                ):
                    raise FormatError("a zip file whose two ends contradict each other")
                small, large = (here, count, length, start), values[6:]
                most = (_MOST16, _MOST16, _MOST32, _MOST32)
                if any(a not in (b, c) for a, b, c in zip(small, large, most, strict=True)):
                    raise FormatError("a zip file whose two ends contradict each other")
                here, count, length, start = large
        if here != count or start + length != end or length > _LARGEST_DIRECTORY:
            raise FormatError("a zip file whose directory is not where its end says, or too large")
        directory = self._bytes(start, length)
        records, position = [], 0
        for _ in range(count):
            record, position = _record(directory, position)
            records.append(record)
        if position != length:
            raise FormatError("a zip file with more than one directory")
        return records, start

    def _check(self, record: _Record, end: int) -> int:
        """The offset of a record's bytes, after checking its local header and that the record ends at `end`."""
        header = self._bytes(record.header, _LOCAL.size)
        sign, _, flags, method, _, _, crc, *sizes, name_length, extra = _LOCAL.unpack(header)
        name = self._bytes(record.header + _LOCAL.size, name_length)
        not_yet_known = {0} if flags & _SIZES_FOLLOW else set()
        if (
            (sign, flags, method, name) != (b"PK\3\4", record.flags, 0, record.name)
            or crc not in {record.crc} | not_yet_known
            or not {record.size, _MOST32} | not_yet_known >= set(sizes)
        ):
            raise FormatError("a zip file whose directory and records contradict each other")
        start = record.header + _LOCAL.size + name_length + extra
        follows = b""
        if flags & _SIZES_FOLLOW:
            pack = _DESCRIPTOR if end - start - record.size == _DESCRIPTOR.size else _DESCRIPTOR64
            if record.size > _MOST32 and pack is _DESCRIPTOR:
                raise FormatError("a zip file whose directory and records contradict each other")
            follows = pack.pack(b"PK\7\x08", record.crc, record.size, record.size)
        if start + record.size + len(follows) != end or self._bytes(start + record.size, len(follows)) != follows:
            raise FormatError("a zip file whose records overlap, or leave bytes between them")
        return start

    def _bytes(self, start: int, count: int) -> bytes:
        if start < 0:
            raise FormatError("a file that ends too early")
        self._file.seek(start)
        content = self._file.read(count)
        if len(content) != count:
            raise FormatError("a file that ends too early")
        return content


def _record(directory: bytes, position: int) -> tuple[_Record, int]:
    """The record at a position in the directory, and the position of the next one."""
    if position + _CENTRAL.size > len(directory):
        raise FormatError("a zip file whose directory ends too early")
    values = _CENTRAL.unpack_from(directory, position)
    sign, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, _, header = values
    if sign != b"PK\1\2" or flags & ~(_SIZES_FOLLOW | _UTF8) or comment or disk:
        raise FormatError("a zip file that torch.save did not write")
    if method or packed != size:
        raise FormatError("a compressed zip file; torch.save does not compress")
    position += _CENTRAL.size
    name = directory[position : position + name_length]
    extra = directory[position + name_length : position + name_length + extra_length]
    position += name_length + extra_length
    if position > len(directory):
        raise FormatError("a zip file whose directory ends too early")
    if _MOST32 in (size, header):
        size, header = _large(extra, size, header)
    return _Record(name, flags, crc, size, header), position


def _large(extra: bytes, size: int, header: int) -> tuple[int, int]:
    """Size and offset of a record beyond 4 GiB, from the ZIP64 extra field (4.5.3)."""
    count = (2 if size == _MOST32 else 0) + (1 if header == _MOST32 else 0)
    field = struct.Struct(f"<2H{count}Q")
    if extra[:4] != struct.pack("<2H", 1, 8 * count) or len(extra) < field.size:
        raise FormatError("a zip file whose directory does not say how large a record is")
    numbers = list(field.unpack_from(extra)[2:])
    if size == _MOST32:
        packed, size = numbers.pop(0), numbers.pop(0)
        if packed != size:
            raise FormatError("a compressed zip file; torch.save does not compress")
    return size, numbers.pop() if header == _MOST32 else header
