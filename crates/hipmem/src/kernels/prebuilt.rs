//! Made by `cargo xtask kernels`; not for editing.

use super::{Format, Image, Provenance};

pub(super) const PROVENANCE: Provenance = Provenance {
    sources_sha256: "4e9e0bc7c1ed99ab00ec1296ad070100647d6284b778686c25e38cdda5cebb03",
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
        sha256: "8bd81966ace66ee91a1ea234d6b25bb091b311a7cd46f863383770ce98bd4b7b",
        warp: 32,
    },
    Image {
        target: "aarch64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/aarch64.so"),
        sha256: "aa2ba8a73fe91da1e2951e4a5d4854cd67feffb931a00c1880b8a823d3885a8c",
        warp: 32,
    },
];

pub(super) const POST_IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx90a.hsaco"),
        sha256: "c7c990c6acf1f1a3bc3158550501addc20bb4f7549fe5927f2bb9f3204a0405c",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx942.hsaco"),
        sha256: "d13cd3c914f8fb1951c954b905a379f4acffd647887997aa4ecf0d2b986e46dd",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx950.hsaco"),
        sha256: "da7ac5da19ae84408962c4f270ca0881d7bdc74af044635711b7a23269c4b90a",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx1100.hsaco"),
        sha256: "dc8e9fb04dc1e8506cc83731390ba89812cf86adf16b9f6c6ed6957b5d766d02",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/post-sm_80.ptx"), "\0").as_bytes(),
        sha256: "4c2388daccc131b3bb75ff9edb5c04ea04a41ed691b4ae74082e2d4a38d4849e",
        warp: 32,
    },
];
