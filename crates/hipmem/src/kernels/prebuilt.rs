//! Made by `cargo xtask kernels`; not for editing.

use super::{Format, Image, Provenance};

pub(super) const PROVENANCE: Provenance = Provenance {
    sources_sha256: "b268c9b60c1904e8f5c0e3ac02b5cacb769ee769f65ee344a8ab22059f449e9e",
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
        sha256: "b4a8c9363bb6a3c1351b8a187cf451ca198937573e27e64562a2e1cedcdc61a3",
        warp: 32,
    },
    Image {
        target: "aarch64",
        format: Format::Host,
        bytes: include_bytes!("../../prebuilt/aarch64.so"),
        sha256: "1af561c878e55aa2a1c2b7be3cefaf11c7452aed11886e7801e1d5cf5c887577",
        warp: 32,
    },
];

pub(super) const POST_IMAGES: &[Image] = &[
    Image {
        target: "gfx90a",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx90a.hsaco"),
        sha256: "c5806386740708ae9779794551b67eee6a48a777fb04915400a141f63d742209",
        warp: 64,
    },
    Image {
        target: "gfx942",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx942.hsaco"),
        sha256: "686ef6706fa42c3779399ee78eb8d1051eaf925c7311f0989626ffecead81c9c",
        warp: 64,
    },
    Image {
        target: "gfx950",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx950.hsaco"),
        sha256: "1090ba43bdd1cbf3cd8a8fbb39428055392ad25681f9d2c699c1387d1350145e",
        warp: 64,
    },
    Image {
        target: "gfx1100",
        format: Format::CodeObject,
        bytes: include_bytes!("../../prebuilt/post-gfx1100.hsaco"),
        sha256: "db46b4f1a8a9f1b08705da964dee375a0c0609cbfe358512144c9df9d4cf14e5",
        warp: 32,
    },
    Image {
        target: "sm_80",
        format: Format::Ptx,
        bytes: concat!(include_str!("../../prebuilt/post-sm_80.ptx"), "\0").as_bytes(),
        sha256: "39f8e88c2822e50e07a3335f09e3bf60688e3619e318c68cfcc8850b7968b28b",
        warp: 32,
    },
];
