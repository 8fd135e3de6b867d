"""Model sizes of arXiv 2507.15857 by their listed names."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """Shape of a listed model."""

    hidden_size: int
    kv_channels: int
    num_attention_heads: int
    num_layers: int


PRESETS: dict[str, Preset] = {
    "7M": Preset(128, 32, 4, 3),
    "14M": Preset(224, 32, 7, 4),
    "20M": Preset(288, 32, 7, 5),
    "35M": Preset(448, 32, 7, 6),
    "44M": Preset(512, 64, 8, 8),
    "57M": Preset(576, 64, 9, 9),
    "74M": Preset(640, 64, 10, 10),
    "90M": Preset(640, 64, 10, 13),
    "106M": Preset(640, 64, 10, 16),
    "117M": Preset(768, 64, 12, 12),
    "140M": Preset(768, 64, 12, 15),
    "163M": Preset(768, 64, 12, 18),
    "175M": Preset(896, 64, 14, 14),
    "196M": Preset(896, 64, 14, 16),
    "217M": Preset(896, 64, 14, 18),
    "251M": Preset(1024, 64, 16, 16),
    "278M": Preset(1024, 64, 16, 18),
    "306M": Preset(1024, 64, 16, 20),
    "425M": Preset(1280, 128, 10, 18),
    "489M": Preset(1280, 128, 10, 21),
    "509M": Preset(1408, 128, 11, 18),
    "552M": Preset(1280, 128, 10, 24),
    "587M": Preset(1408, 128, 11, 21),
    "632M": Preset(1536, 128, 12, 19),
    "664M": Preset(1408, 128, 11, 24),
    "724M": Preset(1536, 128, 12, 22),
    "816M": Preset(1536, 128, 12, 25),
    "893M": Preset(1792, 128, 14, 20),
    "1018M": Preset(1792, 128, 14, 23),
    "1143M": Preset(1792, 128, 14, 26),
    "1266M": Preset(2048, 128, 16, 22),
    "1424M": Preset(2176, 128, 17, 22),
    "1429M": Preset(2048, 128, 16, 25),
    "1593M": Preset(2048, 128, 16, 28),
    "1609M": Preset(2176, 128, 17, 25),
    "1731M": Preset(2304, 128, 18, 24),
    "1794M": Preset(2176, 128, 17, 28),
    "2007M": Preset(2304, 128, 18, 28),
    "2283M": Preset(2304, 128, 18, 32),
    "2298M": Preset(2560, 128, 20, 26),
    "2639M": Preset(2560, 128, 20, 30),
    "2980M": Preset(2560, 128, 20, 34),
    "3530M": Preset(2688, 128, 21, 36),
    "3802M": Preset(2816, 128, 22, 36),
    "4084M": Preset(2944, 128, 23, 36),
    "4516M": Preset(3072, 128, 24, 36),
    "6796M": Preset(3584, 128, 28, 40),
    "9293M": Preset(4096, 128, 32, 42),
    "11452M": Preset(4352, 128, 32, 47),
    "12295M": Preset(4608, 128, 36, 44),
    "12569M": Preset(4608, 128, 32, 47),
    "13735M": Preset(4864, 128, 32, 47),
    "14940M": Preset(4992, 128, 32, 49),
    "16183M": Preset(5120, 128, 40, 47),
}


def swiglu_width(hidden_size: int) -> int:
    """Feed-forward width that the published models really have: floor(8h/3/64)·64 (the listed width is not used)."""
    return 8 * hidden_size // 3 // 64 * 64
