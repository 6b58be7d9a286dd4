"""The processor of the host, from what the system says about it."""

from __future__ import annotations

import sys

import pytest

from icenet.core.host import processor

AVX512 = "avx512f avx512dq avx512bw avx512vl"
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo exists on Linux")


@linux
@pytest.mark.parametrize(
    ("text", "is_amd", "has_avx512"),
    [
        (f"vendor_id\t: AuthenticAMD\nflags\t: fpu avx2 {AVX512}\n", True, True),
        ("vendor_id\t: AuthenticAMD\nflags\t: fpu avx2\n", True, False),
        (f"vendor_id\t: GenuineIntel\nflags\t: fpu avx2 {AVX512}\n", False, False),
        (None, False, False),
    ],
)
def test_amd_processors(text: str | None, is_amd: bool, has_avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object, **kwargs: object) -> str:
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(processor.Path, "read_text", read)
    assert (processor.is_amd(), processor.is_amd_with_avx512()) == (is_amd, has_avx512)


@linux
@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx512f bf16", False)]
)
def test_processors_with_products_of_bf16(flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.Path, "read_text", lambda *args, **options: f"flags\t\t: fpu {flags}\n")
    assert processor.multiplies_bf16() == expected


def test_systems_without_a_description_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.sys, "platform", "win32")
    monkeypatch.setattr(processor.platform, "processor", lambda: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD")
    assert processor.is_amd()
    assert not processor.is_amd_with_avx512()
