"""A corpus of archives that want more than a folder: each is refused, nothing is left, and nothing outside changes."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_dropin.airgap.unpack import Caps, survey, unpack
from vllm_dropin.errors import ConfigurationError, InputOutputError

Entry = tuple[str, bytes, bytes | str]
"""Name, kind, and the data of a file or the target of a link."""

FILE, FOLDER, LINK, HARD = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def member(name: str, kind: bytes = FILE, data: bytes | str = b"", **more: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o644
    body = b""
    if isinstance(data, str):
        info.linkname = data
    else:
        body, info.size = data, len(data)
    for field, value in more.items():
        setattr(info, field, value)
    return info, body


def pack(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info, body in members:
            tar.addfile(info, io.BytesIO(body) if body else None)
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to work in, with a canary beside it that has to stay as it is."""
    canary = tmp_path / "canary"
    canary.write_text("alive")
    work = tmp_path / "work"
    work.mkdir()
    yield work
    assert sorted(os.listdir(tmp_path)) == ["canary", "work"]
    assert canary.read_text() == "alive"
    assert stat.S_IMODE(canary.stat().st_mode) == 0o644


def refused(place: Path, *members: tuple[tarfile.TarInfo, bytes], words: str) -> None:
    archive = pack(place / "x.tar", *members)
    with pytest.raises(ConfigurationError, match=words) as error:
        unpack(archive, place / "out")
    assert error.value.message.startswith("x.tar: ")
    assert error.value.remedy
    assert error.value.message.isprintable()
    assert os.listdir(place) == ["x.tar"]


def test_what_build_and_tar_write_is_unpacked(place):
    source = place / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "deep" / "er" / "file").write_bytes(b"x" * 3_000_000)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o750)
    (source / "empty").touch()
    (source / "ünï").write_text("name")
    (source / "link").symlink_to("deep/er/file")
    (source / ("n" * 90)).write_text("long")
    os.link(source / "run.sh", source / "same.sh")
    for form in ("gnu", "pax", "ustar"):
        archive = place / f"{form}.tar.gz"
        subprocess.run(["tar", f"--format={form}", "-czf", archive, "-C", source, "."], check=True, timeout=20)
        found = unpack(archive, place / form)
        assert found.files == 6
        assert subprocess.run(["diff", "-r", source, place / form], timeout=20).returncode == 0
        assert stat.S_IMODE((place / form / "run.sh").stat().st_mode) == 0o755
        assert stat.S_IMODE((place / form / "empty").stat().st_mode) == 0o644
        assert os.readlink(place / form / "link") == "deep/er/file"


@pytest.mark.parametrize("name", ["../canary", "a/../../canary", "..", "a/..", "./../canary"])
def test_a_name_that_leads_out(place, name):
    refused(place, member(name, data=b"dead"), words="leads out of the folder")


@pytest.mark.parametrize("name", ["/canary", "//canary", "/"])
def test_an_absolute_name(place, name):
    refused(place, member(name, data=b"dead"), words="absolute name")


def test_an_absolute_name_of_the_canary_itself(place):
    refused(place, member(str(place.parent / "canary"), data=b"dead"), words="absolute name")


@pytest.mark.parametrize("target", ["..", "../canary", "/etc/passwd", "a/../../canary", "a/..//../canary"])
def test_a_link_out(place, target):
    refused(place, member("a", FOLDER), member("link", LINK, target), words="out of the folder|No such file")


def test_a_link_out_cannot_be_written_through(place):
    refused(
        place, member("link", LINK, ".."), member("link/canary", data=b"dead"), words="below link, which is no folder"
    )


def test_links_that_only_together_lead_out(place):
    """Each looks harmless by its name: `far/a/b/up` is the root, and `out` goes one further from there."""
    chain = (member("far/a/b", FOLDER), member("far/a/b/up", LINK, "../../.."), member("out", LINK, "far/a/b/up/.."))
    refused(place, *chain, words="'far/a/b/up/..', out of the folder")


def test_links_in_a_circle_and_into_nothing(place):
    refused(place, member("a", LINK, "b"), member("b", LINK, "a"), words="'b': Too many levels")
    refused(place, member("a", LINK, "nothing"), words="'nothing': No such file")


def test_a_link_longer_than_the_kernel_follows(place):
    """realpath gives up at PATH_MAX, and what gives up quietly takes the rest for safe (CVE-2025-4517)."""
    folders = [member("/".join(["d" * 240] * depth), FOLDER) for depth in range(1, 17)]
    links = [member(f"l{'x' * number}", LINK, "/".join(["d" * 240] * 16) + "/.." * number) for number in (1, 17, 20)]
    refused(place, *folders, *links, words="link to|can't be a name")


@pytest.mark.parametrize("target", ["../canary", "nothing", "folder", "link"])
def test_a_hard_link_to_something_else_than_a_file_before_it(place, target):
    before = (member("folder", FOLDER), member("file", data=b"x"), member("link", LINK, "file"))
    refused(place, *before, member("hard", HARD, target), words="hard link to|leads out")


def test_a_hard_link_to_the_canary(place):
    refused(place, member("hard", HARD, str(place.parent / "canary")), words="absolute name")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.BLKTYPE, "is a device"),
        (tarfile.FIFOTYPE, "is a named pipe"),
        (b"V", "an entry of type b'V'"),
    ],
)
def test_what_is_no_file(place, kind, words):
    refused(place, member("odd", kind, devmajor=1, devminor=3), words=words)


def test_a_sparse_file(place):
    source = place / "source"
    source.mkdir()
    with (source / "holes").open("wb") as file:
        file.truncate(50_000_000)
    for form in ("gnu", "pax"):
        archive = place / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", "-S", "-cf", archive, "-C", source, "."], check=True, timeout=20)
        with pytest.raises(ConfigurationError, match="is a sparse file"):
            unpack(archive, place / "out")
    assert not (place / "out").exists()


def test_no_special_right_survives(place):
    rights = (
        member("su", data=b"x", mode=0o6755),
        member("open", data=b"x", mode=0o1666),
        member("d", FOLDER, mode=0o7777),
    )
    found = unpack(pack(place / "x.tar", *rights), place / "out").folder
    assert {name: stat.S_IMODE((found / name).stat().st_mode) for name in ("su", "open", "d")} == {
        "su": 0o755, "open": 0o644, "d": 0o755,
    }  # fmt: skip
    assert {(found / name).stat().st_uid for name in ("su", "open")} == {os.geteuid()}


@pytest.mark.parametrize(
    "twins",
    [
        ("a", "a"),
        ("a", "./a"),
        ("d/a", "d//a"),
        ("a", "a/b"),
        ("a/b", "a"),
    ],
)
def test_a_name_twice(place, twins):
    """tarfile's own filter takes these: the later one wins here, the earlier one elsewhere."""
    refused(place, *(member(name, data=b"x") for name in twins), words="is there twice|which is no folder")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\x7f", "a\tb", "a\x00b"])
def test_control_characters_in_a_name(place, name):
    info, body = member("plain", data=b"x")
    info.pax_headers = {"path": name}
    refused(place, (info, body), words="control character")


def test_a_name_that_is_no_utf8(place):
    info, body = member("caf\udce9", data=b"x")
    archive = place / "x.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        tar.addfile(info, io.BytesIO(body))
    with pytest.raises(ConfigurationError, match=r"'caf\\udce9' is no UTF-8"):
        unpack(archive, place / "out")


def test_a_name_that_no_file_can_have(place):
    refused(place, member("x" * 300, data=b"x"), words="can't be a name of a file: File name too long")


def test_a_bomb(place):
    archive = pack(place / "x.tar.gz", member("zeros", data=bytes(20_000_000)))
    assert archive.stat().st_size < 200_000
    caps = Caps(ratio_from=1 << 20)
    with pytest.raises(ConfigurationError, match="decompression bomb"):
        unpack(archive, place / "out", caps)
    assert os.listdir(place) == ["x.tar.gz"]
    assert unpack(archive, place / "out", Caps(ratio=2000)).size == 20_000_000


def test_more_than_is_allowed(place):
    archive = pack(place / "x.tar", *(member(f"f{number}", data=b"x" * 1000) for number in range(10)))
    with pytest.raises(ConfigurationError, match="more than 9 entries"):
        unpack(archive, place / "out", Caps(entries=9))
    with pytest.raises(ConfigurationError, match="'f5' would be 1,000 bytes: more than is allowed"):
        unpack(archive, place / "out", Caps(size=5500))
    assert os.listdir(place) == ["x.tar"]


@pytest.mark.parametrize("size", [1 << 62, 9 << 40, -512, -(1 << 40)])
def test_a_size_that_lies(place, size):
    """A negative one sends tarfile back in the file, again and again (CVE-2025-8194)."""
    archive = pack(
        place / "x.tar", member("first", data=b"x"), member("liar", data=b"x" * 600), form=tarfile.GNU_FORMAT
    )
    data = bytearray(archive.read_bytes())
    header = data[1024:1536]
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    if size < 0:
        header[124] = 0xFF
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    archive.write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"more than is allowed|would be -[\d,]+ bytes"):
        unpack(archive, place / "out")
    assert os.listdir(place) == ["x.tar"]


def test_a_file_that_does_not_fit_is_said_before_it_is_written(place):
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    info, _ = member("large")
    info.size = free * 2
    archive = place / "x.tar"
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputOutputError, match="does not fit on the disk") as error:
        unpack(archive, place / "out", Caps(size=1 << 60))
    assert error.value.exit_code == 74
    assert os.listdir(place) == ["x.tar"]


def test_a_header_that_would_fill_the_memory(place):
    info, _ = member("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = 1 << 33
    archive = place / "x.tar.gz"
    archive.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    with pytest.raises(ConfigurationError, match="claims to be 8,589,934,592 bytes long"):
        unpack(archive, place / "out")


def test_a_thousand_headers_for_one_name(place):
    one = tarfile.TarInfo("././@LongLink")
    one.type, one.size = tarfile.GNUTYPE_LONGNAME, 512
    archive = place / "x.tar"
    archive.write_bytes((one.tobuf(tarfile.GNU_FORMAT) + b"n" * 512) * 2000 + bytes(1024))
    with pytest.raises(ConfigurationError, match="cut off or is no tar"):
        unpack(archive, place / "out")


def damaged(change: Callable[[bytearray], object], name: str = "x.tar") -> Callable[[Path], Path]:
    def make(place: Path) -> Path:
        archive = pack(
            place / name, member("a", data=b"a" * 5000), member("b", data=b"b" * 5000), form=tarfile.GNU_FORMAT
        )
        data = bytearray(archive.read_bytes())
        change(data)
        archive.write_bytes(data)
        return archive

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (damaged(lambda data: data.__delitem__(slice(3000, None))), "cut off in 'a': 2,512 bytes are missing"),
        (damaged(lambda data: data.__delitem__(slice(5632, None))), "cut off or broken at byte 5,632"),
        (damaged(lambda data: data.__setitem__(slice(5640, 5650), b"broken-one")), "cut off or broken at byte 6,144"),
        (damaged(lambda data: data.__delitem__(slice(0, 100))), "is no tar archive"),
        (damaged(lambda data: data.clear()), "is no tar archive"),
        (damaged(lambda data: data.extend(data[:6144])), "more data follows the end"),
        (damaged(lambda data: data.__delitem__(slice(-20, None)), "x.tar.gz"), "cut off or is no tar archive"),
        (damaged(lambda data: data.__setitem__(-8, data[-8] ^ 1), "x.tar.gz"), "cut off or is no tar archive: CRC"),
        (damaged(lambda data: data.__setitem__(40, data[40] ^ 1), "x.tar.gz"), "cut off or"),
    ],
)  # fmt: skip
def test_a_damaged_archive(place, make, words):
    """Python's tarfile takes the second and the third for whole: a broken header counts as the end."""
    archive = make(place)
    with pytest.raises(ConfigurationError, match=words) as error:
        unpack(archive, place / "out")
    assert "again" in error.value.remedy
    assert os.listdir(place) == [archive.name]


def test_what_pythons_own_filter_lets_through(place):
    """The reason for this module: each of these is unpacked by extractall(filter="data") without a word."""
    cases = {
        "twice": [member("a", data=b"one"), member("a", data=b"two")],
        "control": [member("a\x1b[2J", data=b"x")],
        "many": [member(f"f{number}", data=b"x") for number in range(20)],
    }
    for name, members in cases.items():
        archive = pack(place / f"{name}.tar", *members)
        with tarfile.open(archive) as tar:
            tar.extractall(place / f"{name}-theirs", filter="data")
        with pytest.raises(ConfigurationError):
            unpack(archive, place / f"{name}-ours", Caps(entries=10))
    broken = damaged(lambda data: data.__setitem__(slice(5640, 5650), b"broken-one"))(place)
    with tarfile.open(broken) as tar:
        assert tar.getnames() == ["a"]


def test_an_archive_that_can_not_be_read(place):
    with pytest.raises(InputOutputError, match="No such file"):
        unpack(place / "nothing.tar", place / "out")


def test_a_folder_that_is_used_as_it_is(place):
    folder = place / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_bytes(b"12345")
    (folder / "inside").symlink_to("sub/file")
    (folder / "also").symlink_to("sub")
    found = survey(folder)
    assert (found.files, found.size) == (1, 5)
    (folder / "out").symlink_to(place.parent)
    with pytest.raises(ConfigurationError, match=r"out in .* is a link to .*, which is not in the folder"):
        survey(folder)
    (folder / "out").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(ConfigurationError, match=r"pipe in .* is no file"):
        survey(folder)
