//! Made by `cargo xtask kernels`; not for editing.

use super::{Format, Image, Provenance};

pub(super) const PROVENANCE: Provenance = Provenance {
    sources_sha256: "b1f1c0676920c9a489c8d10e1f7b5b4f73d4174c0f1b62aec1abcc1f893def71",
    compiler: "Debian clang version 22.1.8 (1~deb12u1)",
};

pub(super) const IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx90a.hsaco"),
        sha256: "a3f7bcb1bc0f325edf411ed47afed2a97aef0f2584bbbd4552bde7d27a509c77",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx942.hsaco"),
        sha256: "de5b21b638acaea26c66b5d5ce370aa67183928423a0dd63833f6d67abdb5a11",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx950.hsaco"),
        sha256: "57978badd1461e7c7223b05baeee2977d946f67126d10daf301591a518262174",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/gfx1100.hsaco"),
        sha256: "aa775a48a930bb92300681a18dc8d08499de6b951ccba927178961c73c60a67b",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/sm_80.ptx"), "\0").as_bytes(),
        sha256: "f2da7675bbe8bfecefe442027b423e95a16a689d5f9c5bdbd03f7a77265d35ee",
        warp: 32,
    },
    Image {
        target: "x86_64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/x86_64.so"),
        sha256: "cdca1cea002d3d7f21a7c4e573ad5b4f4bebe65c6a0864002e55482393342b8d",
        warp: 32,
    },
    Image {
        target: "aarch64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/aarch64.so"),
        sha256: "949f6e50fbe3b6e90b1e838456d401aafa2316386311ef5bdecaaea1d9c72c0c",
        warp: 32,
    },
];

pub(super) const POST_IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx90a.hsaco"),
        sha256: "18d71fde95b3ed73f863e3fa26ae9a6e2d1dd894249104752d3a55e7d6bcf11b",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx942.hsaco"),
        sha256: "9dc9be73358369de533f09ccceac55a6ae3e5b2a7cfc669a28b0d8bef010a884",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx950.hsaco"),
        sha256: "41aad1d718aedb7c194e9ea9eb905de9f63d7698c946c66e00c82090c0abf93f",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx1100.hsaco"),
        sha256: "b5f0b4a66247ccdfdf367ff8722a2597837bd4d2dea17befcfe34e7c67849104",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/post-sm_80.ptx"), "\0").as_bytes(),
        sha256: "3dcfb9020403b4fdc6a8ec08a3eb3bc54dfd7084db1da991cdbbd9d0664db9b9",
        warp: 32,
    },
];
