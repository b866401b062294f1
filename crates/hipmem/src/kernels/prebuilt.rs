//! Made by `cargo xtask kernels`; not for editing.

use super::{Format, Image, Provenance};

pub(super) const PROVENANCE: Provenance = Provenance {
    sources_sha256: "b8886ffe4a70f48216be98b98088ccdbb7bf2c29a897f24553e4ad01cb5a1f29",
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
        sha256: "1b541d9318706bff7675ea85f92e22686a2de687672835be522207abdd509de8",
        warp: 32,
    },
    Image {
        target: "aarch64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/aarch64.so"),
        sha256: "9cab5df7c0b7a88f612a95a8d1963ac54268aa585fa6c8b9f309ae1c66eb91ce",
        warp: 32,
    },
];

pub(super) const POST_IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx90a.hsaco"),
        sha256: "89ed5ec8a57c41976651fe8e9bc77d414ab5eb3bdbeee6e4ce6e40571054e75b",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx942.hsaco"),
        sha256: "e770a9f8fae91b86b7874bcf9f396dcae503a830d90f08e204c50c6c56bf3e3e",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx950.hsaco"),
        sha256: "d8bbc7f78c51cebfb3ca4a83e8d1f87381866d91484bf0c095407b0dc4112040",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx1100.hsaco"),
        sha256: "7c4285d5a05bc404f68d1a17439e7cf99d28b679f805f3ac56138f03a4fd5970",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/post-sm_80.ptx"), "\0").as_bytes(),
        sha256: "f6e7bf513af151e2f038fd07bcede57932d86eea3c07ef0d5ce3c51dfd125674",
        warp: 32,
    },
];
